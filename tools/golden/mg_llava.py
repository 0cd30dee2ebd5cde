"""MG-LLaVA against the official modules' arrays (spec 11); the tolerances are those of the data's own description."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.errors import FoveateError, InputError
from foveate.language.templates import IMAGE_ID, VIDEO_ID, encode_turns, find_template, render_conversation
from foveate.methods.mg_llava.boxes import CLOSE, prepare_boxes
from foveate.methods.mg_llava.configuration import MGLlavaConfig
from foveate.methods.mg_llava.conversion import convert_state_dict
from foveate.methods.mg_llava.fusion import (
    ChannelConcat,
    ConvConcat,
    ConvGate,
    CrossAttention,
    GateConcat,
    PatchInfoMining,
    Resampler,
    TokenConcat,
    position_table,
)
from foveate.methods.mg_llava.modeling import MGLlavaModel
from foveate.methods.mg_llava.objects import pool_objects
from foveate.methods.mg_llava.processing import MGLlavaProcessor
from foveate.metrics.vqa import anls, extract_letters, normalise_answer, vqa_accuracy
from foveate.vision.ram_plus import RamPlus, Swin, clean_keys
from golden import CASES, GoldenFolder, Report, Tracked, consume

CANVAS = 768
"""Side of the square that the flows' boxes refer to, whatever the size of their pictures."""
RESAMPLER_HEADS = 2
EXACT = 1e-5
CLOSE_ENOUGH = 1e-4

FILES = ("fuse_variants.safetensors", "preprocess.json", "text_encoding.json", "metrics.json", "ram_plus.json")


def check(golden: GoldenFolder, report: Report) -> None:
    """A row for every array of `golden` that our code can produce; inputs and weights are read."""
    flows = sorted(name.removesuffix(".json") for name in golden.files if name.startswith("flow_") and ".json" in name)
    absent = [name for name in FILES if name not in golden] + ([] if flows else ["flow_*.json"])
    if absent:
        report.notes.append(f"not in this folder, so not checked: {', '.join(absent)}")
    with torch.no_grad():
        for flow in flows:
            _run(flow, report, lambda flow=flow: check_flow(golden, flow, report))
        for name, part in (
            ("fuse_variants.safetensors", lambda: check_fusions(golden["fuse_variants.safetensors"], report)),
            ("preprocess.json", lambda: check_preparation(golden, report)),
            ("text_encoding.json", lambda: check_text(golden["text_encoding.json"], report)),
            ("metrics.json", lambda: check_metrics(golden["metrics.json"], report)),
            ("ram_plus.json", lambda: check_ram_plus(golden, report)),
        ):
            if name in golden:
                _run(name.split(".")[0], report, part)


def _run(name: str, report: Report, part: Callable[[], None]) -> None:
    """A part that breaks off is a FAIL with its reason, and the other parts still run."""
    try:
        part()
    except (FoveateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        report.fail(name, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _pixels(stored: Tensor) -> Tensor:
    return stored.float() / 64 - 2


# ------------------------------------------------------------------- the flows


def build_model(sizes: Mapping[str, Any]) -> MGLlavaModel:
    """A model of the sizes in a flow's `config`; what it does not tell is as the data's description says."""
    config = MGLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": sizes["clip_hidden"],
            "intermediate_size": 2 * sizes["clip_hidden"],
            "num_hidden_layers": sizes["clip_layers"],
            "num_attention_heads": 2,
            "image_size": sizes["clip_image"],
            "patch_size": sizes["clip_patch"],
        },
        high_res_config={
            "model_type": "convnext",
            "hidden_sizes": consume(sizes["dims"]),
            "depths": consume(sizes["depths"]),
            "num_channels": 3,
            "patch_size": 4,
        },
        language_config={
            "model_type": "llama",
            "hidden_size": sizes["llm_hidden"],
            "intermediate_size": 2 * sizes["llm_hidden"],
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": sizes.get("kv", 4),
            "vocab_size": sizes["vocab"],
        },
        high_res_size=sizes["aux_image"],
        box_canvas=CANVAS,
    )
    return MGLlavaModel(config).eval()


def check_flow(golden: GoldenFolder, flow: str, report: Report) -> None:
    """The path of pictures and texts to the loss, step by step, each from our own result of the step before."""
    case, arrays = golden[f"{flow}.json"], golden[f"{flow}.io.safetensors"]
    model = build_model(case["config"])
    official = dict(golden[case["weights"]].items())
    model.load_state_dict(convert_state_dict(official))
    case.get("seed")
    conversations, frames = case["batch"], case["video_frames"] or 1

    aux = [_pixels(arrays[f"in.pixel_values_aux_u8_{row}"]) for row in range(conversations)]
    high = torch.stack(aux) if not case["video_frames"] else torch.cat([clip.transpose(0, 1) for clip in aux])
    numbers = [
        f"{row}_{t}" if case["video_frames"] else f"{row}" for row in range(conversations) for t in range(frames)
    ]
    boxes = [arrays[f"in.boxes_{number}"] for number in numbers]
    listed = [own for row in consume(case["boxes"]) for own in (row if case["video_frames"] else [row])]
    for number, ours, own in zip(numbers, boxes, listed, strict=True):
        report.compare(f"{flow} boxes {number}", ours, torch.tensor(own, dtype=torch.float32).reshape(-1, 4))

    def compare(name: str, found: Tensor, tolerance: float | None = CLOSE_ENOUGH) -> None:
        expected = arrays[f"out.{name}"]
        report.compare(f"{flow} out.{name}", found, expected[: len(found)], absolute=tolerance)

    low = model.encode_low(_pixels(arrays["in.pixel_values_u8"]))
    compare("low_res_tokens", low)
    stages = model.encode_high(high)
    for number, stage in enumerate(stages):
        if f"out.stage_{number}" in arrays:
            compare(f"stage_{number}", stage[:1])
    fused, logit = model.fuse(low, stages)
    assert logit is not None
    compare("gate_logit", logit)
    compare("fused_tokens", fused)
    pooled = model.object_features(model.pool_boxes(stages, boxes), [len(own) for own in boxes])
    dense = pool_objects(stages, boxes, canvas=CANVAS, bins=model.config.object_bins or 56, pooling="dense")
    for number, (ours, reference) in enumerate(zip(pooled, dense, strict=True)):
        compare(f"roi_pooled_{number}", ours, EXACT)
        report.compare(
            f"{flow} dense roi_pooled_{number}", reference, arrays[f"out.roi_pooled_{number}"], absolute=EXACT
        )
    visual = model.encode(_pixels(arrays["in.pixel_values_u8"]), high, boxes)
    compare("image_embeds", visual.image)
    for number, tokens in enumerate(visual.objects):
        compare(f"object_embeds_{number}", tokens)

    ids, mask, labels = arrays["in.input_ids"], arrays["in.attention_mask"], arrays["in.labels"]
    report.same(
        f"{flow} text", [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)], consume(case["text"])
    )
    # A text without a placeholder has a picture all the same, which nothing of it looks at.
    shown = [row for row in range(conversations) if ((ids[row] == IMAGE_ID) | (ids[row] == VIDEO_ID)).any()]
    seen = visual.take([row * frames + t for row in shown for t in range(frames)])
    inputs = model.assemble(ids, mask, [seen.sequence(n * frames, frames) for n in range(len(shown))], labels)
    assert inputs.labels is not None
    compare("inputs_embeds", inputs.inputs_embeds)
    compare("labels", inputs.labels, None)
    compare("attention_mask", inputs.attention_mask, None)
    compare("position_ids", inputs.position_ids, None)
    call = {"visual_tokens": seen, "visual_counts": [frames] * len(shown)}
    loss = model(ids, mask, labels, **call).loss
    report.compare(f"{flow} out.loss", loss.reshape(1), arrays["out.loss"].reshape(1), absolute=CLOSE_ENOUGH)
    unpadded = inputs.attention_mask[:, -1] == 1
    logits = model(ids, mask, **call).logits[unpadded, -1]
    expected = arrays["out.logits_last"][: len(unpadded)][unpadded]
    report.compare(f"{flow} out.logits_last", logits, expected, absolute=CLOSE_ENOUGH)


# ---------------------------------------------------------------- the variants


def check_fusions(arrays: Tracked, report: Report) -> None:
    low, high, fine, boxes = (arrays[f"in.{name}"] for name in ("low", "high", "high_map3x", "boxes"))
    width, deep, wide, boxed = low.shape[-1], high.shape[1], fine.shape[1], boxes.shape[-1]
    grid = math.isqrt(low.shape[1])

    def given(name: str) -> Tensor:
        """Another variant's reference output, this one's input."""
        return arrays[f"{name}.out"]

    variants: dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]] = {
        "conv_gate": (ConvGate(width, deep), lambda: (low, high)),
        "gate_channel_concat": (GateConcat(width, deep), lambda: (low, high)),
        "conv_channel_concat": (ConvConcat(width, deep), lambda: (low, high)),
        "channel_concat": (ChannelConcat(), lambda: (low, high)),
        "seq_concat": (TokenConcat(width, deep), lambda: (low, high)),
        "patch_info_mining": (PatchInfoMining(width, wide), lambda: (low, fine)),
        "f_to_b": (CrossAttention(width, boxed), lambda: (given("conv_gate"), boxes)),
        "b_to_f": (CrossAttention(boxed, width), lambda: (boxes, given("conv_gate"))),
    }
    if "resampler.out" in arrays:
        weights = {key.removeprefix("resampler.w."): key for key in arrays if key.startswith("resampler.w.")}
        out = arrays["resampler.w.proj"].shape[0]
        variants["resampler"] = (Resampler(width, out, grid, RESAMPLER_HEADS), lambda: (given("seq_concat"),))
        if "pos_embed" in weights:
            table = position_table(grid, out)
            report.compare("fuse_variants resampler.w.pos_embed", table, arrays[weights["pos_embed"]], absolute=EXACT)
    for name, (module, inputs) in variants.items():
        if f"{name}.out" not in arrays:
            continue
        official = {
            f"fuse_module.{key.removeprefix(f'{name}.w.')}": arrays[key]
            for key in [*arrays]
            if key.startswith(f"{name}.w.") and not key.endswith(".pos_embed")
        }
        ours = {key.removeprefix("fusion."): value for key, value in convert_state_dict(official).items()}
        module.load_state_dict(ours)
        found = module(*inputs())
        found = found[0] if isinstance(found, tuple) else found
        report.compare(f"fuse_variants {name}.out", found, arrays[f"{name}.out"], absolute=CLOSE_ENOUGH)


# ------------------------------------------------------------- pictures, texts


def check_preparation(golden: GoldenFolder, report: Report) -> None:
    arrays = golden["preprocess.safetensors"]
    for number, case in enumerate(golden["preprocess.json"][CASES]):
        options = case["options"]
        size, low_size = options["image_size_aux"], options["low_res"]
        image = Image.fromarray(arrays[f"case{number}.image_u8"].numpy().astype(np.uint8))
        if image.size != (case["width"], case["height"]):
            raise InputError(
                f"case {number} says {case['width']}x{case['height']} pixels, and its picture has {image.size}"
            )
        config = MGLlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": low_size, "patch_size": low_size},
            high_res_config={"model_type": "convnext", "patch_size": 1, "hidden_sizes": [8], "depths": [1]},
            language_config={"model_type": "llama"},
            high_res_size=size,
            fusion="none",
            pad_to_square=options["pad_to_square"],
        )
        processor = MGLlavaProcessor(None, config)
        aux = processor.high_resolution(image, options["pad_to_square"])
        low = F.interpolate(aux[None], low_size, mode="bilinear", align_corners=False)[0]
        close = options["text_length"] >= options["max_length"] - CLOSE
        boxes = prepare_boxes(
            consume(case["boxes"]),
            consume(case["labels"]),
            consume(case["scores"]),
            *image.size,
            canvas=size,
            pad_to_square=options["pad_to_square"],
            iou=options["iou"],
            limit=options["limit"],
            mode=options["mode"],
            crowded=close,
        )
        where = f"preprocess case{number}"
        expected = {name: arrays[f"case{number}.{name}"] for name in ("pixel_values_aux", "pixel_values", "boxes")}
        report.compare(f"{where}.pixel_values_aux", aux, expected["pixel_values_aux"], absolute=EXACT)
        report.compare(f"{where}.pixel_values", low, expected["pixel_values"], absolute=EXACT)
        report.compare(f"{where}.boxes", boxes.boxes, expected["boxes"])
        report.same(f"{where}.out_labels", boxes.labels, consume(case["out_labels"]))
        length = min(options["text_length"], options["max_length"])
        report.same(f"{where}.out_text_length", [length], [case["out_text_length"]])


class ByteTokenizer:
    """UTF-8 bytes, id = byte + 3."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]


def check_text(content: Tracked, report: Report) -> None:
    for case in content[CASES]:
        where = f"text {case['template']} {case['name']}"
        template = find_template(case["template"])
        turns = render_conversation(consume(case["conversations"]), template)
        rendered = [
            {"input": turn.input, "output": turn.output, "need_eos_token": turn.adds_eos, "sep": turn.separator}
            for turn in turns
        ]
        ids, labels = encode_turns(turns, ByteTokenizer())
        longest = case["max_length"]
        report.same(f"{where} rendered", rendered, consume(case["rendered"]))
        report.same(f"{where} input_ids", ids[:longest], consume(case["input_ids"]))
        report.same(f"{where} labels", labels[:longest], consume(case["labels"]))


def check_metrics(content: Tracked, report: Report) -> None:
    cases = consume(content)
    for name, score in (("anls", anls), ("textvqa", vqa_accuracy)):
        if name in cases:
            found = [score(case["prediction"], case["answers"]) for case in cases[name]]
            report.compare(f"metrics {name}", found, [case["score"] for case in cases[name]], absolute=1e-9)
    if "textvqa" in cases:
        found = [normalise_answer(case["prediction"]) for case in cases["textvqa"]]
        report.same("metrics textvqa processed", found, [case["processed"] for case in cases["textvqa"]])
    if "multiple_choice" in cases:
        found = [extract_letters(case["prediction"]) for case in cases["multiple_choice"]]
        report.same("metrics multiple_choice", found, [case["extracted"] for case in cases["multiple_choice"]])


# ------------------------------------------------------------------- the tagger


def check_ram_plus(golden: GoldenFolder, report: Report) -> None:
    sizes, arrays = golden["ram_plus.json"], golden["ram_plus.safetensors"]
    swin = sizes["swin"]
    model = RamPlus(
        Swin(swin["img"], swin["dim"], consume(swin["depths"]), consume(swin["heads"]), swin["win"]),
        tags=sizes["num_class"],
        descriptions=sizes["descriptions_per_class"],
        projected=sizes["proj"],
        hidden=sizes["hidden"],
        heads=sizes["heads"],
    ).eval()
    weights, _ = clean_keys({key.removeprefix("w."): arrays[key] for key in [*arrays] if key.startswith("w.")})
    model.load_state_dict(weights)
    pixels = _pixels(arrays["in.image_u8"])
    embeds = model.image_embeds(pixels)
    for name, found in (
        ("swin_tokens", model.visual_encoder(pixels)),
        ("image_embeds", embeds),
        ("label_query", model.label_queries(embeds)),
        ("logits", model(pixels)),
    ):
        report.compare(f"ram_plus out.{name}", found, arrays[f"out.{name}"], absolute=CLOSE_ENOUGH)
