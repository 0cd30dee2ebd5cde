"""The Vicuna variant through files: conversion of official weights, training from a recipe, and what describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import foveate
from foveate import cli
from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.conversion import (
    check_checkpoint,
    convert_checkpoint,
    convert_state_dict,
    convert_text_encoder,
    initialise_from_blip2,
)
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.processing import DynReferProcessor
from foveate.methods.dynrefer.recipe import build
from foveate.training.recipes import load_recipe
from foveate.training.runner import train

RECIPE = "recipes/dynrefer/vg12.yaml"


@pytest.fixture(scope="session")
def files(official_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All source files; the base's language model has no row for [PAD]. Do not change them."""
    return official_files.write_official_files(tmp_path_factory.mktemp("official"), language=official_files.VICUNA)


@pytest.fixture(scope="session")
def converted(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that they become; do not write into it."""
    out = tmp_path_factory.mktemp("converted") / "dynrefer"
    convert_checkpoint(files.official, **files.paths, out=out)
    return out


@pytest.fixture
def changed(files: Any, official_files: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the released file with some tensors replaced, or taken away (None)."""

    def write(changes: dict[str, Tensor | None]) -> Path:
        path = tmp_path / "changed.pth"
        state = {key: value for key, value in (files.read() | changes).items() if value is not None}
        official_files.save_lavis(path, state)
        return path

    return write


def vicuna(official_files: Any, folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A language model and its tokenizer in a folder of their own."""
    model = official_files.randomise(LlamaForCausalLM(LlamaConfig(**{**official_files.VICUNA, **changes})), 9)
    model.save_pretrained(folder)
    official_files.tokenizer(clip=True).save_pretrained(folder)
    return model


# ---------------------------------------------------------------- conversion


def test_every_tensor_arrives(files: Any, converted: Path) -> None:
    model = AutoModel.from_pretrained(converted)
    found = dict(model.named_parameters())
    elsewhere = ("vision_tower.", "text_encoder.", "language_model.", "query_tokens")
    expected = {key: value for key, value in files.trained.named_parameters() if not key.startswith(elsewhere)}
    assert {"llm_proj.weight", "llm_proj.bias", "cem_memory"} < expected.keys()
    expected |= {f"text_encoder.{key}": value for key, value in files.text_encoder.named_parameters()}
    expected |= {f"vision_tower.model.{key}": value for key, value in files.blip2.vision_model.named_parameters()}
    expected |= {f"language_model.{key}": value for key, value in files.blip2.language_model.named_parameters()}
    expected["query_tokens"] = files.blip2.query_tokens
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            assert torch.equal(found[key][:16], value)
            torch.testing.assert_close(found[key][16:], value.mean(dim=0, keepdim=True))
        else:
            assert torch.equal(found[key], value), key
    config = model.config
    assert (config.num_views, config.max_text_tokens, config.language_config.model_type) == (2, 256, "llama")
    language = config.language_config
    assert (language.vocab_size, language.bos_token_id, language.eos_token_id, language.pad_token_id) == (
        17,
        15,
        15,
        16,
    )
    assert not language.tie_word_embeddings


def test_what_is_not_used_is_named(files: Any, converted: Path) -> None:
    unused = json.loads((converted / "manifest.json").read_text())["unused"]
    text_branch = {key for key in files.read() if ".intermediate." in key or ".output.LayerNorm.bias" in key}
    text_branch -= {key for key in text_branch if "attention.output" in key or "head.encoder" in key}
    assert len(text_branch) == 6
    assert set(unused["official"]) == text_branch | {
        "Qformer.bert.embeddings.position_embeddings.weight",
        "Qformer.bert.embeddings.position_ids",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "clip_embeds",
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    assert "language_projection.weight" in unused["base"]


def test_the_folder_computes_what_the_parts_do(files: Any, converted: Path) -> None:
    """Prompt and first logits against BLIP-2's own language model, which knows nothing of [PAD]."""
    model = DynReferModel.from_pretrained(converted)
    words = DynReferProcessor.from_pretrained(converted)
    assert (words.decoder_only, words.max_text_tokens) == (True, 256)
    queries = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    ids, mask = words.language_ids(["red,car|"])
    assert ids.tolist() == [[15, 8, 2, 7, 3]]
    with torch.no_grad():
        visual = queries @ files.trained.llm_proj.weight.T + files.trained.llm_proj.bias
        embedded = files.blip2.language_model.get_input_embeddings()(ids) + files.trained.cem_memory
        inputs = torch.cat([visual, embedded], dim=1)
        torch.testing.assert_close(model.language_inputs(queries, ids, mask)[0], inputs)
        expected = files.blip2.language_model(inputs_embeds=inputs).logits
        found = model.language_model(inputs_embeds=inputs).logits
    torch.testing.assert_close(found[..., :16], expected, rtol=1e-5, atol=1e-5)


def test_the_language_model_of_the_released_file_is_preferred(
    files: Any, official_files: Any, changed: Any, tmp_path: Path
) -> None:
    """All of it, with the row of [PAD] that the authors' class adds."""
    larger = LlamaForCausalLM(LlamaConfig(**{**official_files.VICUNA, "vocab_size": 17}))
    theirs = official_files.randomise(larger, 5).state_dict()
    path = changed({f"llm_model.{key}": value for key, value in theirs.items()})
    result = convert_checkpoint(path, **files.paths, out=tmp_path / "out")
    found = DynReferModel.from_pretrained(tmp_path / "out").language_model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in theirs.items())
    assert {part.name: part.source for part in result.parts}["language model"] == "official"
    # Without the language model's weights of its own, the base's again.
    assert {part.name: part.source for part in check(files, files.official).parts}["language model"] == "base"


def test_a_language_model_in_a_folder_of_its_own(files: Any, official_files: Any, tmp_path: Path) -> None:
    """Vicuna 1.5 in the place of BLIP-2's."""
    theirs = vicuna(official_files, tmp_path / "vicuna", num_hidden_layers=3)
    out = tmp_path / "out"
    convert_checkpoint(files.official, **files.paths, language=tmp_path / "vicuna", out=out)
    model = DynReferModel.from_pretrained(out)
    assert model.config.language_config.num_hidden_layers == 3
    found = model.language_model.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(found[key][: len(value)], value), key
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["sources"]["language"]) == {"config.json", "model.safetensors"}
    assert "language_model.lm_head.weight" in manifest["unused"]["base"]
    with pytest.raises(CheckpointError, match=r"t5-world is a 't5', but the language model of .* a 'llama'"):
        check(files, files.official, language="t5-world")


def check(files: Any, official: Path, **options: Any) -> Any:
    return check_checkpoint(official, base=files.paths["base"], text=files.paths["text"], **options)


def test_all_misfits_are_one_error(files: Any, changed: Any, tmp_path: Path) -> None:
    state = files.read()
    broken = changed(
        {
            "llm_proj.weight": state["llm_proj.weight"][:7],
            "cem_memory": None,
            "t5_proj.weight": state["llm_proj.weight"],
            "llm_model.model.layers.7.mlp.up_proj.weight": torch.ones(24, 16),
            "llm_model.model.norm.weight": torch.ones(15),
            "t5_model.shared.weight": torch.ones(16, 16),
            "Qformer.bert.encoder.layer.0.intermediate_query.dense.bias": None,
        }
    )
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(broken, **files.paths, out=tmp_path / "out")
    sentence = str(caught.value)
    assert "2 missing (Qformer.bert.encoder.layer.0.intermediate_query.dense.bias, cem_memory)" in sentence
    unknown = "llm_model.model.layers.7.mlp.up_proj.weight, t5_model.shared.weight, t5_proj.weight"
    assert f"3 unknown ({unknown})" in sentence
    assert "llm_proj.weight (7, 24) for (16, 24)" in sentence
    assert "llm_model.model.norm.weight (15,) for (16,)" in sentence
    assert not (tmp_path / "out").exists()


def test_weights_of_the_other_variant(files: Any, official_files: Any, tmp_path: Path) -> None:
    """A file of the Vicuna variant does not pass for one of T5, nor the other way round."""
    other = official_files.write_official_files(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"2 missing \(llm_proj.bias, llm_proj.weight\).* \(t5_proj.bias, t5_proj"
    ):
        check(files, other.official)
    with pytest.raises(CheckpointError, match=r"2 missing \(t5_proj.bias, t5_proj.weight\)") as caught:
        check(other, files.official)
    # There, a Q-Former's branch for texts is no part of the layout either.
    for key in ("llm_proj.weight", "Qformer.bert.encoder.layer.0.intermediate.dense.weight", "rotary_emb.inv_freq"):
        assert key in str(caught.value)


def test_convert_state_dict_by_the_kind_of_its_keys() -> None:
    weight = torch.ones(2, 2)
    converted = convert_state_dict(
        {
            "text.transformer.resblocks.0.attn.in_proj_weight": torch.ones(6, 2),
            "llm_proj.weight": weight,
            "llm_model.lm_head.weight": weight,
            "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": weight[0],
        }
    )
    ours = {key for key in converted if not key.startswith("text_encoder.")}
    assert ours == {"llm_proj.weight", "language_model.lm_head.weight"}
    assert len(converted) == 5
    with pytest.raises(CheckpointError, match=r"1 keys are not DynRefer's: t5_model\.shared\.weight"):
        convert_state_dict({"llm_proj.weight": weight, "t5_model.shared.weight": weight})


def test_initialise_from_blip2(files: Any, official_files: Any, tmp_path: Path) -> None:
    model = DynReferModel(files.trained.config)
    initialise_from_blip2(model, files.paths["base"])
    assert torch.equal(model.llm_proj.weight, files.blip2.language_projection.weight)
    assert torch.equal(model.query_tokens, files.blip2.query_tokens)
    other = official_files.write_official_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors \(llm_proj.bias, llm_proj.weight\)"):
        initialise_from_blip2(model, other.paths["base"])


# ---------------------------------------------------------------- command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, stdout, stderr) of the command line in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_convert_then_describe(run: Any, files: Any, official_files: Any, picture: Path, tmp_path: Path) -> None:
    vicuna(official_files, tmp_path / "vicuna")
    options = [part for name, path in files.paths.items() for part in (f"--{name.replace('_', '-')}", path)]
    out = tmp_path / "out"
    code, printed, err = run(
        "convert", "dynrefer", files.official, *options, "--language", tmp_path / "vicuna", "--out", out
    )
    assert code == 0, err
    assert any(line.split()[:3] == ["language", "model", "language"] for line in printed.splitlines())
    code, printed, err = run("describe", picture, "--box", "5,5,40,40", "--model", out, "--format", "json")
    assert code == 0, err
    region = json.loads(printed)[0]["regions"][0]
    assert region["caption"]
    assert 0 < region["caption_score"] <= 1
    code, _, error = run("convert", "dynrefer", files.official, *options, "--language", "t5-world", "--check")
    assert code == 2
    assert "give a language model of the same kind" in error


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def settings(files: Any, official_files: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The published recipe on a language model that is a folder of its own, small, and two captioned regions."""
    folder = tmp_path_factory.mktemp("recipe")
    vicuna(official_files, folder / "vicuna")
    convert_text_encoder(files.paths["text"], folder / "text", text_tokenizer=files.paths["text_tokenizer"])
    (folder / "images").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "1.png")
    annotations = [
        {"id": number, "image_id": 1, "caption": caption, "bbox": [5, 5, 60, 50], "extra_info": {}}
        for number, caption in enumerate(["the red car", "a dog", "a striped dog", "the hat"])
    ]
    images = [{"id": 1, "file_name": "1.png", "width": 90, "height": 70}]
    (folder / "train.json").write_text(json.dumps({"dataset": {}, "images": images, "annotations": annotations}))
    base = files.paths["base"]
    return [
        f"data={{format: controlcap, root: {folder}, tags: {files.paths['tags']}, classes: coco, each_caption: true}}",
        f"model.base_models={{vision: {base}, text: {folder / 'text'}, language: {folder / 'vicuna'}}}",
        f"model.qformer_from={base}",
        "model.image_size=56",
        "model.num_query_tokens=5",
        "model.align_groups=2",
        "model.head_size=16",
        "training.batch_size=4",
        "training.epochs=1",
        "training.workers=0",
        "training.precision=fp32",
    ]


def test_a_model_trains_and_describes(run: Any, settings: list[str], picture: Path, tmp_path: Path) -> None:
    task = build(load_recipe(RECIPE, settings))  # pyright: ignore[reportArgumentType]
    model: Any = task.model
    assert len(task.shard) == 2  # the layers of the language model, which a run may split
    assert model.config.language_config.vocab_size == 17
    assert model.language_model.dtype == torch.bfloat16
    before = model.llm_proj.weight.detach().clone()

    result = train(RECIPE, settings, out=tmp_path / "run")
    assert result.steps == 1
    assert {"caption", "tag", "contrast"} <= result.history[0].keys()
    describer = foveate.load(result.checkpoint)
    assert (describer.processor.decoder_only, describer.processor.max_text_tokens) == (True, 256)
    assert not torch.equal(describer.model.llm_proj.weight, before)
    assert (describer.model.llm_proj.weight - before).abs().max() < 1e-3
    assert not (result.checkpoint / "language_tokenizer").exists()

    code, printed, error = run(
        "describe",
        picture,
        "--box",
        "5,5,40,40",
        "--model",
        result.checkpoint,
        "--format",
        "json",
        "--tasks",
        "caption,tags,category",
    )
    assert code == 0, error
    assert json.loads(printed)[0]["regions"][0]["caption"]


def test_a_language_model_that_does_not_fit(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, InputError), match="there is no folder"):
        build(load_recipe(RECIPE, [*settings, f"model.base_models.language={tmp_path / 'none'}"]))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors \(t5_proj.bias, t5_proj.weight\)"):
        build(load_recipe(RECIPE, [*settings, "model.base_models.language=t5-world"]))  # type: ignore[arg-type]
