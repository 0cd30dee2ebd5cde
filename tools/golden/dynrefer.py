"""DynRefer against the official modules' arrays (spec 11); the tolerances are those of the data's own description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from foveate.data.text import clean_caption
from foveate.errors import FoveateError
from foveate.methods.dynrefer.configuration import CANDIDATE_VIEWS, DynReferConfig
from foveate.methods.dynrefer.conversion import DERIVED, convert_state_dict, load_converted
from foveate.methods.dynrefer.losses import asymmetric_loss, region_text_contrast
from foveate.methods.dynrefer.modeling import DynReferModel, gathered_contrast, group_maximum
from foveate.methods.dynrefer.processing import DynReferProcessor, Vocabulary, attribute_prompts
from foveate.methods.dynrefer.views import (
    boxes_in_views,
    build_views,
    interpolate_boxes,
    pixel_boxes,
    region_from_mask,
    region_from_polygons,
    search_coefficients,
)
from foveate.methods.dynrefer.words import control_pool, control_words, tag_sets
from foveate.metrics.classification import ovad_map
from foveate.metrics.detection import DenseCaptionImage, dense_caption_map, match_dense_captions, merge_ground_truth
from foveate.ops.phash import dct_block, perceptual_hash, to_grey
from foveate.vision.images import decode_rle
from golden import CONFIG, GoldenFolder, Report, Tracked, consume

PATCH = 14

# Settings that only repeat the shapes of arrays.
SHAPES = ("ns", "ab", "ahw", "text_dim", "ntags", "syn", "nov")

# Which part of the model each file of arrays brings the weights of, as prefixes of our keys.
PARTS = {
    "align.safetensors": ("cvem_align.",),
    "refer.safetensors": ("vision_tower.model.post_layernorm.", "cvem_mlp.", "qformer.", "query_tokens"),
    "decoders.safetensors": ("tag_", "attr_"),
    "llm.safetensors": ("language_model.", "t5_proj.", "cem_memory"),
    "text_encoder.safetensors": ("text_encoder.",),
}


def check(golden: GoldenFolder, report: Report) -> None:
    """A row for every array of `golden` that our code can produce; inputs and weights are read."""
    expected = {*PARTS, "views.npz", "views.json", "densecap.json", "ovad.npz", "ovad.json", "text.json"}
    absent = sorted(name for name in expected if name not in golden)
    if absent:
        report.notes.append(f"not in this folder, so not checked: {', '.join(absent)}")
    parts = [name for name in PARTS if name in golden]
    if parts:
        _run("network", report, lambda: check_model(golden, report, parts))
    if "views.npz" in golden:
        _run("views", report, lambda: check_views(golden["views.json"], golden["views.npz"], report))
    if "densecap.json" in golden:
        _run("densecap", report, lambda: check_dense_captions(golden["densecap.json"], report))
    if "ovad.npz" in golden:
        _run("ovad", report, lambda: check_attributes(golden["ovad.json"], golden["ovad.npz"], report))
    if "text.json" in golden:
        _run("text", report, lambda: check_text(golden["text.json"], report))


def _run(name: str, report: Report, part: Callable[[], None]) -> None:
    """A part that breaks off is a FAIL with its reason, and the other parts still run."""
    try:
        part()
    except (FoveateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        report.fail(name, f"{type(error).__name__}: {' '.join(str(error).split())}")


# -------------------------------------------------------------------- network


def check_model(golden: GoldenFolder, report: Report, parts: list[str]) -> None:
    """Weights through `conversion.py`, then each file's calls, then all of them in one chain."""
    sizes, official = golden[CONFIG], golden.weights()
    for name in SHAPES:
        sizes.get(name)
    model = build_model(sizes, official)
    not_given = tuple(prefix for name, prefixes in PARTS.items() if name not in parts for prefix in prefixes)
    tower = tuple(key for key in model.state_dict() if key.startswith("vision_tower.") and "post_layernorm" not in key)
    load_converted(model, convert_state_dict(official), allow_missing=(*tower, *not_given))
    embeds = {key: official[key] for key in DERIVED if key.endswith("_embeds") and key in official}
    threshold = sizes.get("kwargs", {}).get("tag_thr", model.config.tag_threshold)
    calls = {
        "align.safetensors": lambda arrays: check_align(model, arrays, report),
        "refer.safetensors": lambda arrays: check_refer(model, arrays, report),
        "decoders.safetensors": lambda arrays: check_decoders(model, arrays, embeds, threshold, report),
        "llm.safetensors": lambda arrays: check_captioner(model, arrays, report),
        "text_encoder.safetensors": lambda arrays: check_text_encoder(model, arrays, report),
    }
    with torch.no_grad():
        for name in parts:
            _run(name, report, lambda name=name: calls[name](golden[name]))
        if {"align.safetensors", "refer.safetensors", "decoders.safetensors", "llm.safetensors"} <= set(parts):
            _run("chain", report, lambda: check_chain(model, golden, embeds, report))


def build_model(sizes: Mapping[str, Any], official: Mapping[str, Tensor]) -> DynReferModel:
    """A model of the sizes in `model_config.json`; depths that it does not tell are those of the weights."""
    text, heads = sizes["text"], sizes.get("heads", 4)
    distances = "t5_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    config = DynReferConfig(
        # The arrays start behind the tower, of which only the final norm takes part.
        vision_config={
            "model_type": "blip_2_vision_model",
            "hidden_size": sizes["C"],
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": sizes["img"],
            "patch_size": PATCH,
        },
        text_config={
            "vocab_size": text["vocab"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["ctx"],
            "hidden_act": "gelu",
            "projection_dim": text["embed"],
            "bos_token_id": 0,
            "eos_token_id": 2,  # transformers' name for the official pooling: at the highest id
        },
        qformer_config={
            "hidden_size": sizes["qh"],
            "num_hidden_layers": sizes["ql"],
            "num_attention_heads": sizes["qheads"],
            "intermediate_size": sizes["qi"],
        },
        language_config={
            "model_type": "t5",
            "vocab_size": sizes["vocab"],
            "d_model": sizes["d"],
            "d_kv": sizes["dkv"],
            "d_ff": sizes["dff"],
            "num_layers": _depth(official, "t5_model.encoder.block."),
            "num_decoder_layers": _depth(official, "t5_model.decoder.block."),
            "num_heads": sizes["th"],
            "relative_attention_num_buckets": len(official[distances]) if distances in official else 32,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        num_views=sizes["views"],
        image_size=sizes["img"],
        num_query_tokens=sizes["nq"],
        head_size=sizes["E"],
        head_layers=_depth(official, "tag_head.encoder.layer."),
        head_num_attention_heads=heads,
        generation={"num_beams": sizes["beams"], "max_new_tokens": sizes["mnt"]},
    )
    return DynReferModel(config).eval()


def _depth(official: Mapping[str, Tensor], prefix: str) -> int:
    layers = {int(key.removeprefix(prefix).split(".")[0]) for key in official if key.startswith(prefix)}
    return max(layers, default=1) + (0 if not layers else 1)


@contextmanager
def _outputs(**modules: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of modules in the next call, by the given names."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        return lambda _, inputs, output: seen.__setitem__(name, (inputs[0], output))

    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_align(model: DynReferModel, arrays: Tracked, report: Report) -> None:
    with _outputs(value_proj=model.cvem_align.value_proj, offset_mask=model.cvem_align.offset_mask) as seen:
        aligned = model.cvem_align(arrays["in.ref"], arrays["in.input"])
    for name in ("offset_mask", "value_proj"):
        report.compare(f"align mid.{name}", seen[name][1], arrays[f"mid.{name}"], absolute=5e-5)
    report.compare("align out.aligned", aligned, arrays["out.aligned"], absolute=5e-5)


def check_refer(model: DynReferModel, arrays: Tracked, report: Report) -> None:
    norm: Any = model.vision_tower.model.post_layernorm
    boxes, tokens = arrays["in.region_bboxes"], norm(arrays["in.vit_tokens"])
    features, _ = model.region_features(tokens, boxes)
    with _outputs(fusion=model.cvem_mlp) as seen:
        query_output = model.encode_regions(tokens, boxes)
    fused, output = seen["fusion"]
    rois = rearrange(fused, "r l (n c) -> (r n) l c", n=model.config.num_views)
    for name, found in (
        ("mid.ln_vision", tokens),
        ("mid.roi_align", features.flatten(0, 1)),
        ("mid.rois_tokens", rois),
        ("mid.cvem_out", output),
        ("out.query_output", query_output),
    ):
        report.compare(f"refer {name}", found, arrays[name], absolute=1e-4)


def check_decoders(
    model: DynReferModel, arrays: Tracked, embeds: dict[str, Tensor], threshold: float, report: Report
) -> None:
    query_output, captions = arrays["in.query_output"], arrays["in.caption_embeds"]
    tag_logits = model.tag_logits(query_output, embeds["clip_embeds"])
    report.compare("decoders out.tag_logits", tag_logits, arrays["out.tag_logits"], absolute=1e-4)
    report.compare("decoders out.tag_pred", torch.sigmoid(tag_logits) > threshold, arrays["out.tag_pred"])
    attributes = group_maximum(
        torch.sigmoid(model.text_logits(query_output, embeds["att_embeds"])), arrays["in.syn_group_sizes"].tolist()
    )
    report.compare("decoders out.attr_scores", attributes, arrays["out.attr_scores"], absolute=1e-4)
    classes = model.text_logits(query_output, embeds["ov_embeds"])
    report.compare("decoders out.ov_logits", classes, arrays["out.ov_logits"], absolute=1e-4)

    config = model.config
    tags = _tag_targets(arrays["in.tags"])
    losses = {"loss_tag": config.tag_loss_weight * asymmetric_loss(tag_logits, tags)}
    similarity = model.text_logits(query_output, captions)
    single = region_text_contrast(similarity.T, similarity, model.attr_t, model.attr_b)
    losses["loss_att_single"] = config.contrast_loss_weight * single
    queries, texts = [query_output], [captions]
    while f"in.query_output_rank{len(queries)}" in arrays:
        rank = len(queries)
        queries.append(arrays[f"in.query_output_rank{rank}"])
        texts.append(arrays[f"in.caption_embeds_rank{rank}"])
    for rank in range(len(queries) if "out.loss_att_rank0" in arrays else 0):
        contrast = gathered_contrast(model, queries[rank], texts[rank], torch.cat(queries), torch.cat(texts), rank)
        losses[f"loss_att_rank{rank}"] = config.contrast_loss_weight * contrast

    logits, targets = arrays["in.asl_logits"], arrays["in.asl_targets"]
    losses["asl_default"] = asymmetric_loss(logits, targets, gamma_negative=4, gamma_positive=1)
    with torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        losses["asl"] = asymmetric_loss(leaf, targets)
        (gradient,) = torch.autograd.grad(losses["asl"], leaf)
    for name, loss in losses.items():
        report.compare(f"decoders out.{name}", loss, arrays[f"out.{name}"], relative=1e-5)
    report.compare("decoders out.asl_grad", gradient, arrays["out.asl_grad"], relative=1e-5)


def _tag_targets(tags: Tensor) -> Tensor:
    """(R, 2V) subject block and object block -> (R, V) their union."""
    subjects, objects = tags.bool().chunk(2, dim=1)
    return subjects | objects


def check_captioner(model: DynReferModel, arrays: Tracked, report: Report) -> None:
    query_output = arrays["in.query_output"]
    control = arrays["in.control_ids"], arrays["in.control_mask"]
    inputs_embeds, attention_mask = model.language_inputs(query_output, *control)
    report.compare("llm mid.inputs_embeds", inputs_embeds, arrays["mid.inputs_embeds"], absolute=1e-4)
    report.compare("llm mid.attention_mask", attention_mask, arrays["mid.attention_mask"])
    loss = model.caption_loss(query_output, *control, arrays["in.caption_ids"], arrays["in.caption_mask"])
    report.compare("llm out.loss_llm", loss, arrays["out.loss_llm"], absolute=1e-4)
    generated = model.generate(query_output, *control)
    report.compare("llm out.sequences", generated.sequences, arrays["out.sequences"])
    report.compare("llm out.sequences_scores", generated.log_scores, arrays["out.sequences_scores"], absolute=1e-4)
    report.compare("llm out.scores_exp", generated.scores, arrays["out.scores_exp"], absolute=1e-4)


def check_text_encoder(model: DynReferModel, arrays: Tracked, report: Report) -> None:
    embeds = model.encode_text(arrays["in.token_ids"])
    report.compare("text_encoder out.text_embeds", embeds, arrays["out.text_embeds"], absolute=1e-5)


def check_chain(model: DynReferModel, golden: GoldenFolder, embeds: dict[str, Tensor], report: Report) -> None:
    """From the tower's tokens to tags, scores, captions and the training objective, nothing in between replaced.

    Only where the files follow from each other: their region tokens must be those that refer.safetensors ends with.
    """
    refer, decoders, llm = (golden[f"{name}.safetensors"] for name in ("refer", "decoders", "llm"))
    tokens = refer["out.query_output"]
    for other in (decoders, llm):
        given = other["in.query_output"]
        if given.shape != tokens.shape or (given - tokens).abs().max() > 1e-4:
            report.notes.append(f"{other.name} does not continue refer.safetensors, so the chain is not checked")
            return
    norm: Any = model.vision_tower.model.post_layernorm
    views, boxes = norm(refer["in.vit_tokens"]), refer["in.region_bboxes"]
    control = {"control_ids": llm["in.control_ids"], "control_mask": llm["in.control_mask"]}

    query_output = model.encode_regions(views, boxes)
    tags = model.tag_logits(query_output, embeds["clip_embeds"])
    report.compare("chain out.tag_logits", tags, decoders["out.tag_logits"], absolute=1e-4)
    attributes = torch.sigmoid(model.text_logits(query_output, embeds["att_embeds"]))
    attributes = group_maximum(attributes, decoders["in.syn_group_sizes"].tolist())
    report.compare("chain out.attr_scores", attributes, decoders["out.attr_scores"], absolute=1e-4)
    classes = model.text_logits(query_output, embeds["ov_embeds"])
    report.compare("chain out.ov_logits", classes, decoders["out.ov_logits"], absolute=1e-4)
    generated = model.generate(query_output, *control.values())
    report.compare("chain out.sequences", generated.sequences, llm["out.sequences"])
    report.compare("chain out.scores_exp", generated.scores, llm["out.scores_exp"], absolute=1e-4)

    # The model's own forward, with the outputs of its two frozen encoders given, as the arrays start behind them.
    encode_views, encode_text = model.encode_views, model.encode_text
    captions = decoders["in.caption_embeds"]
    model.encode_views = lambda pixel_values: views
    model.encode_text = lambda input_ids, attention_mask=None: captions
    try:
        output = model(
            pixel_values=views,
            region_boxes=boxes,
            tag_embeds=embeds["clip_embeds"],
            tag_targets=_tag_targets(decoders["in.tags"]),
            caption_text_ids=captions,
            caption_ids=llm["in.caption_ids"],
            caption_mask=llm["in.caption_mask"],
            **control,
        )
    finally:
        model.encode_views, model.encode_text = encode_views, encode_text
    expected = {
        "tag": decoders["out.loss_tag"],
        "contrast": decoders["out.loss_att_single"],
        "caption": llm["out.loss_llm"],
    }
    for name, value in expected.items():
        report.compare(f"chain loss of {name}", output.losses[name], value, relative=1e-4)
    report.compare("chain loss", output.loss, torch.stack(list(expected.values())).sum(), relative=1e-4)


# -------------------------------------------------------------------- views


def check_views(settings: Tracked, arrays: Tracked, report: Report) -> None:
    size, count = settings["image_size"], settings["num_views"]
    processor = DynReferProcessor(Vocabulary(), None, None)
    candidates = np.array([0.0, *CANDIDATE_VIEWS])
    for number, case in enumerate(settings["cases"]):
        pixels = arrays[case["image"]]
        image = Image.fromarray(pixels)
        width, height = image.size
        grey = to_grey(torch.from_numpy(pixels))
        report.compare(f"views gray{number}", grey, arrays[f"gray{number}"])
        regions = np.stack([_region(consume(item), height, width) for item in case["segmentations"]])
        report.compare(f"views bboxes{number}", regions, arrays[f"bboxes{number}"])
        boxes = interpolate_boxes(regions, candidates, width, height)
        report.compare(f"views cand_boxes{number}", boxes, arrays[f"cand_boxes{number}"])
        crops = torch.from_numpy(pixel_boxes(boxes, width, height))
        report.compare(f"views dct{number}", dct_block(grey, crops), arrays[f"dct{number}"], absolute=0.05)
        report.compare(f"views hash{number}", perceptual_hash(grey, crops), arrays[f"hash{number}"])
        chosen = search_coefficients(image, regions, count - 1)
        report.compare(f"views ratios{number}", chosen, arrays[f"ratios{number}"])
        views = interpolate_boxes(regions, chosen, width, height)
        report.compare(f"views view_boxes_px{number}", views, arrays[f"view_boxes_px{number}"])
        batch = build_views(image, regions, chosen, size)
        report.compare(f"views region_bboxes{number}", batch.region_boxes, arrays[f"region_bboxes{number}"])
        by_hand = boxes_in_views(pixel_boxes(regions, width, height), pixel_boxes(views, width, height), size)
        report.compare(f"views region_bboxes{number} (boxes_in_views)", by_hand, arrays[f"region_bboxes{number}"])
        # The arrays call the crops of image 0 `view_images0`; of the other images there are none.
        name = f"view_images{number}"
        if name in arrays:
            found = processor.pixel_values(batch.crops)[torch.from_numpy(batch.view_index)]
            report.compare(f"views {name}", found[: len(arrays[name])], arrays[name], absolute=2e-3)


def _region(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, dict):
        return region_from_mask(decode_rle(segmentation, size=(height, width)))
    return region_from_polygons(segmentation)


# -------------------------------------------------------------------- metrics


def check_dense_captions(content: Tracked, report: Report) -> None:
    images: list[DenseCaptionImage] = []
    merged: list[tuple[list[str], list[float]]] = []
    expected_merged: list[tuple[list[str], list[float]]] = []
    for entry in content["images"]:
        truth = entry["target_boxes"], entry["target_text"]
        images.append(DenseCaptionImage(entry["boxes"], entry["scores"], entry["text"], *truth))
        # The order of the groups carries no meaning, that inside a group does.
        boxes, groups = merge_ground_truth(*truth)
        merged.extend(sorted(zip(map(list, groups), boxes.tolist(), strict=True)))
        expected_merged.extend(sorted(zip(entry["merged_text"], entry["merged_boxes"], strict=True)))
    report.same("densecap merged_text", [text for text, _ in merged], [text for text, _ in expected_merged])
    found_boxes, expected_boxes = ([box for _, box in groups] for groups in (merged, expected_merged))
    report.compare("densecap merged_boxes", found_boxes, expected_boxes, absolute=1e-6)

    records, expected = match_dense_captions(images), content["records"]
    report.same("densecap records candidate", records.candidates, [item["candidate"] for item in expected])
    references = [list(group) for group in records.references]
    report.same("densecap records references", references, [item["references"] for item in expected])
    report.compare("densecap records ok", records.matched, [item["ok"] for item in expected])
    report.compare("densecap records iou", records.overlaps, [item["iou"] for item in expected], absolute=1e-6)
    report.compare("densecap records img_info", records.image_indices, [item["img_info"] for item in expected])
    report.compare("densecap npos", records.positives, content["npos"])

    found, result = dense_caption_map(records, content["meteors_per_record"]), content["result"]
    report.compare("densecap map", found.map, result["map"], absolute=1e-6)
    report.compare("densecap detmap", found.det_map, result["detmap"], absolute=1e-6)
    joint = {f"iou_{iou}_meteor_{meteor:g}": ap for (iou, meteor), ap in found.average_precisions.items()}
    located = {f"iou_{iou}": ap for iou, ap in found.det_average_precisions.items()}
    for name, ours in (("ap_breakdown", joint), ("det_breakdown", located)):
        reference = consume(result[name])
        report.same(f"densecap {name} thresholds", sorted(ours), sorted(reference))
        values = [ours.get(key, np.nan) for key in reference]
        report.compare(f"densecap {name}", values, list(reference.values()), absolute=1e-6)


def check_attributes(content: Tracked, arrays: Tracked, report: Report) -> None:
    result = ovad_map(arrays["pred"], arrays["att_vec"], consume(content["attributes"]))
    reference = [np.nan if value is None else value for value in content["per_class_ap"]]
    report.compare("ovad per_class_ap", result.per_attribute, reference, absolute=1e-9)
    # Threshold and top-k enter other figures of the benchmark, of the average precision only the name.
    prefix, _ = f"PC_t{content['threshold']}/", content["top_k"]
    expected = consume(content["map_percent"])
    ours = {f"{prefix}{name}/ap": value for name, value in result.map_percent.items()}
    report.same("ovad map_percent groups", sorted(ours), sorted(expected))
    values = [ours.get(key, np.nan) for key in expected]
    report.compare("ovad map_percent", values, [np.nan if v is None else v for v in expected.values()], absolute=1e-9)


# -------------------------------------------------------------------- strings


def check_text(content: Tracked, report: Report) -> None:
    if "caption_clean" in content:
        cases = content["caption_clean"]
        found = [clean_caption(case["in"]) for case in cases]
        report.same("text caption_clean", found, [case["out"] for case in cases])
    if "tag_parser" in content:
        section = content["tag_parser"]
        parsed = [tag_sets(consume(case["graph"]), section["tag_list"]) for case in section["cases"]]
        for number, name in enumerate(("tag_set1", "tag_set2")):
            expected = [sorted(case[name]) for case in section["cases"]]
            report.same(f"text tag_parser {name}", [sets[number] for sets in parsed], expected)
    if "control_words_train_nodrop" in content:
        cases = content["control_words_train_nodrop"]
        found = [sorted(control_pool([tuple(p) for p in case["pos_tags"]], _named(case))) for case in cases]
        report.same("text control_words_train_nodrop", found, [case["words"] for case in cases])
    if "control_words_eval" in content:
        cases = content["control_words_eval"]
        found = [sorted(control_words(case["controls"], case["pred_tags"])) for case in cases]
        report.same("text control_words_eval", found, [sorted(case["words"]) for case in cases])
    if "attribute_templates" in content:
        section = content["attribute_templates"]
        groups = [attribute_prompts(item["name"], item["is_has_att"]) for item in section["attributes"]]
        report.same("text attribute templates", [prompt for group in groups for prompt in group], section["templates"])
        report.same("text attribute group_sizes", [len(group) for group in groups], section["group_sizes"])


def _named(case: Tracked) -> list[str]:
    """Names of the tags that the subject half or the object half of the vector has set."""
    names, vector = case["tag_list"], case["tag_vector"]
    return [name for half in (0, len(names)) for k, name in enumerate(names) if vector[half + k]]
