from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mg_llava_parts import (  # pyright: ignore[reportMissingImports] (conftest.py loads it)
    LLAMA,
    VOCABULARY,
    make_config,
    make_model,
    make_tokenizer,
)
from torch import Tensor
from transformers import AutoModel

import foveate  # noqa: F401 (registers the model with AutoModel)
from foveate.errors import CheckpointError, InputError
from foveate.language.templates import IMAGE_ID, VIDEO_ID
from foveate.methods.mg_llava.configuration import FUSIONS, OBJECT_LEVELS, OBJECTS, MGLlavaConfig
from foveate.methods.mg_llava.fusion import ConvGate
from foveate.methods.mg_llava.modeling import MGLlavaModel

PHI3 = {**LLAMA, "model_type": "phi3", "num_key_value_heads": 4, "pad_token_id": 258, "sliding_window": 2047}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}


def pictures(count: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, 16, 16, generator=generator),
        "pixel_values_aux": torch.randn(count, 3, 64, 64, generator=generator),
        "boxes": [torch.tensor([[4.0, 8.0, 40.0, 30.0], [30.0, 30.0, 64.0, 60.0]])[: 1 + i % 2] for i in range(count)],
    }


def batch(seed: int = 0) -> dict[str, Any]:
    """Two rows of different lengths, each with a picture, the second padded."""
    ids = torch.tensor([[256, 10, IMAGE_ID, 11, 12, 13, 14, 257], [256, IMAGE_ID, 20, 21, 22, 258, 258, 258]])
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    labels = ids.clone()
    labels[:, :4] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **pictures(seed=seed)}


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "labels"}


# ---------------------------------------------------------------- fusion


def test_a_fresh_conv_gate_is_the_identity_bit_by_bit() -> None:
    fresh = ConvGate(16, 12)
    low, high = torch.randn(2, 16, 16), torch.randn(2, 12, 4, 4)
    fused, logit = fresh(low, high)
    assert torch.equal(fused, low)
    assert logit.shape == (2, 1)
    fused.square().sum().backward()
    # Zero projections: they learn first, what is behind them later (spec 2.3).
    assert fresh.slow_proj.weight.grad is not None
    assert fresh.slow_proj.weight.grad.abs().max() > 0
    assert fresh.slow_conv.weight.grad is not None
    assert fresh.slow_conv.weight.grad.abs().max() == 0


def test_the_released_fusion_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ConvGate(1024, 1536).parameters())
    assert round(count / 1e6, 3) == 6.085


def test_high_resolution_reaches_the_answer(model: Any) -> None:
    inputs = without_labels(batch())
    seen = model(**inputs).logits
    blind = model(**{**inputs, "pixel_values_aux": torch.zeros(2, 3, 64, 64)}).logits
    assert (seen - blind).abs().max() > 1e-3


# ---------------------------------------------------------------- layout


def test_the_layout_is_text_image_tokens_object_tokens_text(model: Any) -> None:
    inputs = batch()
    visual = model.encode(inputs["pixel_values"], inputs["pixel_values_aux"], inputs["boxes"])
    made = model.assemble(inputs["input_ids"], inputs["attention_mask"], [visual.sequence(0), visual.sequence(1)])
    words = model.get_input_embeddings()
    row = made.inputs_embeds[0]
    assert torch.equal(row[:2], words(torch.tensor([256, 10])))
    assert torch.equal(row[2:6], visual.image[0])
    assert torch.equal(row[6:7], visual.objects[0])
    assert torch.equal(row[7:12], words(torch.tensor([11, 12, 13, 14, 257])))
    # The second has two objects and is two tokens shorter: 1 + 4 + 2 + 3 = 10.
    assert made.attention_mask.tolist() == [[1] * 12, [1] * 10 + [0] * 2]
    assert made.position_ids.tolist() == [[*range(12)], [*range(10), 0, 0]]
    left = model.assemble(
        inputs["input_ids"], inputs["attention_mask"], [visual.sequence(0), visual.sequence(1)], left_padding=True
    )
    assert left.attention_mask.tolist() == [[1] * 12, [0] * 2 + [1] * 10]
    assert left.position_ids.tolist() == [[*range(12)], [0, 0, *range(10)]]
    assert torch.equal(left.inputs_embeds[1, 2:], made.inputs_embeds[1, :10])


def test_a_video_alternates_image_and_object_tokens_of_its_frames(model: Any) -> None:
    frames = pictures(3)
    visual = model.encode(**frames)
    ids = torch.tensor([[256, VIDEO_ID, 7]])
    made = model.assemble(ids, None, [visual.sequence(0, 3)])
    parts = [part for number in range(3) for part in (visual.image[number], visual.objects[number])]
    assert torch.equal(made.inputs_embeds[0, 1:-1], torch.cat(parts))
    # num_frames is 3: a video takes so many pictures without being told.
    assert torch.equal(model(ids, **frames).logits, model(ids, visual_tokens=visual, visual_counts=[3]).logits)


def test_several_pictures_in_one_text(model: Any) -> None:
    both = model.encode(**pictures())
    ids = torch.tensor([[256, IMAGE_ID, 5, IMAGE_ID, 6]])
    made = model.assemble(ids, None, [both.sequence(0), both.sequence(1)])
    assert made.inputs_embeds.shape[1] == 3 + 4 + 1 + 4 + 2
    swapped = model.assemble(ids, None, [both.sequence(1), both.sequence(0)])
    assert not torch.equal(made.inputs_embeds[0, :8], swapped.inputs_embeds[0, :8])


def test_labels_are_next_tokens_of_answers_only(model: Any) -> None:
    inputs = batch()
    loss = model(**inputs).loss
    logits = model(**without_labels(inputs)).logits
    # Row 0: ids 12, 13, 14, 257 are learnt, at places 8..11 behind the visual tokens; row 1: 22 at place 9.
    said = logits.log_softmax(-1)
    by_hand = [said[0, 7, 12], said[0, 8, 13], said[0, 9, 14], said[0, 10, 257], said[1, 8, 22]]
    assert loss.item() == pytest.approx(-torch.stack(by_hand).mean().item(), abs=1e-5)


def test_rows_of_a_batch_are_what_they_are_alone(model: Any) -> None:
    inputs = without_labels(batch())
    together = model(**inputs).logits
    alone = model(
        inputs["input_ids"][1:, :5],
        pixel_values=inputs["pixel_values"][1:],
        pixel_values_aux=inputs["pixel_values_aux"][1:],
        boxes=inputs["boxes"][1:],
    ).logits
    torch.testing.assert_close(together[1, :10], alone[0], atol=1e-5, rtol=1e-4)


def test_texts_without_pictures(model: Any) -> None:
    ids = torch.tensor([[256, 10, 11, 257]])
    assert torch.equal(model(ids).logits, model.language_model(ids).logits)
    # What lies between towers and language model stays in the graph of a batch of texts only (spec 2.5).
    model.train()
    model.set_stage("sft")
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.bridge_parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_ids": torch.full((2, 8), 5)}, None),
        ({"input_ids": torch.full((2, 8), IMAGE_ID)}, "13 placeholders that stand for 13 pictures, and 2"),
        ({"boxes": [torch.zeros(1, 4)]}, "2 pictures need 2 tensors of boxes, 1 given"),
        ({"boxes": [torch.zeros(1, 4), torch.zeros(0, 4)]}, r"picture 1 must be \(K, 4\) with at least one"),
        ({"pixel_values_aux": torch.zeros(2, 3, 32, 32)}, r"must be \(pictures, 3, 64, 64\)"),
        ({"pixel_values_aux": None}, "looks at pictures in high resolution"),
        ({"visual_counts": [1]}, "2 placeholders that stand for 1"),
    ],
)
def test_inputs_that_do_not_fit(model: Any, change: dict[str, Any], sentence: str | None) -> None:
    inputs = {**without_labels(batch()), **change}
    if sentence is None:  # pictures that no text looks at are allowed
        model(**inputs)
        return
    with pytest.raises(InputError, match=sentence):
        model(**inputs)


# ---------------------------------------------------------------- alternatives


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("objects", OBJECTS)
def test_every_alternative_trains_and_generates(fusion: str, objects: str) -> None:
    model = make_model(fusion=fusion, objects=objects).train().set_stage("pretrain")
    inputs = batch()
    model(**inputs).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == wanted
    assert wanted
    assert not any(name.startswith(("vision_tower.", "high_res_tower.", "language_model.")) for name in wanted)
    assert hasattr(model, "high_res_tower") == (fusion != "none" or objects != "none")
    model.eval()
    said = model.generate(**{**without_labels(inputs), "max_new_tokens": 2, "do_sample": False})
    assert said.shape == (2, 2)
    if objects != "none":
        other = [box + torch.tensor([0.0, 0.0, 8.0, 8.0]) for box in inputs["boxes"]]
        moved = model(**{**without_labels(inputs), "boxes": other}).logits
        assert not torch.allclose(model(**without_labels(inputs)).logits, moved, atol=1e-5)


@pytest.mark.parametrize("levels", OBJECT_LEVELS)
@pytest.mark.parametrize("pooling", ["separable", "dense"])
def test_levels_of_objects(levels: str, pooling: str) -> None:
    model = make_model(object_levels=levels, object_pooling=pooling)
    reference = make_model(object_levels=levels)
    inputs = without_labels(batch())
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert model.box_projector[0].in_features == {"all": 44, "multi_level": 16, "last": 16}[levels]


def test_patch_info_mining_of_the_last_stage_only() -> None:
    model = make_model(fusion="patch_info_mining", patch_info_stages="last")
    low = torch.randn(1, 4, 16)
    high = torch.randn(1, 16, 2, 2)
    fused, _ = model.fuse(low, [high])
    # One cell for each patch: the softmax of one is 1, and its value is added.
    values = model.fusion.value(high.flatten(2).transpose(1, 2))
    torch.testing.assert_close(fused, low + values)


def test_b_to_f_looks_at_the_tokens_that_it_is_told_to() -> None:
    fused, unfused = (make_model(objects="b_to_f", unfused_keys=flag) for flag in (False, True))
    unfused.load_state_dict(fused.state_dict())
    inputs = without_labels(batch())
    assert not torch.allclose(fused(**inputs).logits, unfused(**inputs).logits, atol=1e-5)


def test_padded_boxes_are_not_seen_by_f_to_b() -> None:
    model = make_model(objects="f_to_b")
    inputs = without_labels(batch())
    together = model.encode(inputs["pixel_values"], inputs["pixel_values_aux"], inputs["boxes"]).image[0]
    alone = model.encode(inputs["pixel_values"][:1], inputs["pixel_values_aux"][:1], inputs["boxes"][:1]).image[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- training


def test_stages_train_what_they_should() -> None:
    model = make_model()

    def trained() -> set[str]:
        return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}

    bridge = {"fusion", "image_projector", "box_projector"}
    model.set_stage("pretrain")
    assert trained() == bridge
    model.set_stage("sft")
    assert trained() == bridge | {"language_model"}
    with pytest.raises(InputError, match="no training stage 'third'"):
        model.set_stage("third")


def test_frozen_towers_stay_deterministic_in_training() -> None:
    trunk = {**make_config().high_res_config.to_dict(), "drop_path_rate": 0.9}
    model = make_model(high_res_config=trunk).train()
    inputs = batch()
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    legacy = make_model(high_res_config=trunk, legacy_tower_train_mode=True).train()
    assert len({legacy(**inputs).loss.item() for _ in range(4)}) > 1
    legacy.eval()
    assert torch.equal(legacy(**inputs).loss, legacy(**inputs).loss)


@pytest.mark.parametrize("language", [LLAMA, PHI3, QWEN2], ids=lambda config: config["model_type"])
def test_language_models_train_save_load_and_generate(language: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(language_config=dict(language)).train().set_stage("sft")
    inputs = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MGLlavaModel)
    prompt = without_labels(inputs)
    assert torch.equal(loaded(**prompt).logits, model(**prompt).logits)
    # A batch padded on the left says what each row says alone.
    together = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row in range(2):
        alone = model.generate(
            prompt["input_ids"][row : row + 1, : int(prompt["attention_mask"][row].sum())],
            pixel_values=prompt["pixel_values"][row : row + 1],
            pixel_values_aux=prompt["pixel_values_aux"][row : row + 1],
            boxes=prompt["boxes"][row : row + 1],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
        assert together[row].tolist() == alone[0].tolist()


def test_generation_equals_the_argmax_of_ever_longer_inputs(model: Any) -> None:
    inputs = {**pictures(1), "input_ids": torch.tensor([[256, IMAGE_ID, 20, 21]])}
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist()
    ids: Tensor = inputs.pop("input_ids")
    for token in said:
        assert int(model(ids, **inputs).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_collated_batch_with_padded_boxes_is_the_same(processor: Any, picture: Any) -> None:
    model = make_model()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    ids, labels = processor.encode(talk)
    two = [[0, 0, 9, 9], [5, 5, 40, 30]]
    seen = [processor.picture(picture(1), [[3, 4, 20, 30]]), processor.picture(picture(2), two)]
    samples = [{"input_ids": ids, "labels": labels, "pictures": [[one]]} for one in seen]
    text = processor.encode([{"from": "human", "value": "Say ok"}, {"from": "gpt", "value": "ok"}])
    samples.append({"input_ids": text[0], "labels": text[1]})
    collated = processor.collate(samples)
    assert collated["box_counts"].tolist() == [1, 2]
    apart = [model(**processor.collate([sample])).loss for sample in samples]
    counts = torch.tensor([sum(label != -100 for label in sample["labels"]) for sample in samples])
    mean = (torch.stack(apart) * counts).sum() / counts.sum()
    torch.testing.assert_close(model(**collated).loss, mean, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- sizes


def test_vicuna_7b_builds_on_the_meta_device_with_the_right_size() -> None:
    config = MGLlavaConfig(
        language_config={
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        }
    )
    with torch.device("meta"):
        model = MGLlavaModel(config).eval()

    def count(name: str) -> float:
        return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())

    # 32000 * 4096 * 2 + 32 * (4 * 4096^2 + 3 * 4096 * 11008 + 2 * 4096) + 4096, Llama-2 7B's 6.738 billion.
    assert count("language_model") == 6_738_415_616
    assert count("image_projector") == (1024 + 4096 + 2) * 4096
    assert count("box_projector") == (2880 + 4096 + 2) * 4096
    assert round(count("fusion") / 1e6, 3) == 6.085
    assert round(count("high_res_tower") / 1e6) == 196
    assert count("vision_tower") == 303_507_456
    # The paper's 7.4 billion counts both towers, projectors and fusion.
    assert 7.25e9 < sum(parameter.numel() for parameter in model.parameters()) < 7.45e9

    boxes = [torch.tensor([[0.0, 0.0, 767.0, 767.0]]).repeat(100, 1)]
    ids = torch.tensor([[1, 5, IMAGE_ID, 6, 7]])
    images = {
        "pixel_values": torch.empty(1, 3, 336, 336, device="meta"),
        "pixel_values_aux": torch.empty(1, 3, 768, 768, device="meta"),
    }
    # With SDPA transformers looks at the values of the mask, which there are none of here.
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        stages = model.encode_high(images["pixel_values_aux"])
        assert [tuple(stage.shape[1:]) for stage in stages] == [
            (192, 192, 192),
            (384, 96, 96),
            (768, 48, 48),
            (1536, 24, 24),
        ]
        visual = model.encode(**images, boxes=boxes)
        assert [tuple(tokens.shape) for tokens in visual.image] == [(576, 4096)]
        assert tuple(visual.objects[0].shape) == (100, 4096)
        assert tuple(model(ids, visual_tokens=visual).logits.shape) == (1, 4 + 676, 32000)


# ---------------------------------------------------------------- files


def test_a_checkpoint_with_missing_or_broken_weights_is_refused(tmp_path: Path) -> None:
    model = make_model()
    state = model.state_dict()
    gone = {key: value for key, value in state.items() if key != "fusion.gate.0.bias"}
    model.save_pretrained(tmp_path / "a", state_dict=gone)
    with pytest.raises(CheckpointError, match=r"1 missing \(fusion.gate.0.bias\)"):
        MGLlavaModel.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict={**state, "more": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(more\)"):
        MGLlavaModel.from_pretrained(tmp_path / "b")
    broken = {**state, "box_projector.0.bias": torch.full((32,), float("nan"))}
    model.save_pretrained(tmp_path / "c", state_dict=broken)
    with pytest.raises(CheckpointError, match=r"not finite \(box_projector.0.bias\)"):
        MGLlavaModel.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fusion": "conv_gat"}, "did you mean 'conv_gate'"),
        ({"high_res_size": 96}, "image_size / patch_size must equal"),
        ({"high_res_size": 70}, "not a multiple of the trunk's stride 32"),
        ({"box_iou": 1.5}, "box_iou must be a number from 0 to 1"),
        ({"box_limit": True}, "box_limit must be a whole number"),
        ({"vision_layer": 7}, "vision_layer must be one of"),
        ({"base_models": {"language": "llama-world"}}, "names unknown parts: language"),
        ({"base_models": {"vision": 7}}, "must be the name of a checkpoint, not 7"),
        ({"base_models": ["clip-world"]}, "base_models must be an object"),
        ({"template": "vicunna"}, "template must be one of"),
        ({"fusion": "resampler", "resampler_heads": 5}, "does not split into 5 heads"),
    ],
)
def test_configurations_that_cannot_be(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_config(**change)


def test_the_miniature_fits_its_tokenizer() -> None:
    assert len(make_tokenizer()) <= VOCABULARY
