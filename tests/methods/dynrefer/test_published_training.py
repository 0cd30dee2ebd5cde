"""The recipes at the paper's settings, run on tiny checkpoints in the layouts of the released ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

import foveate
from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.language.lm import load_language_model
from foveate.methods.dynrefer.conversion import convert_text_encoder
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.recipe import build
from foveate.training.recipes import load_recipe
from foveate.training.runner import train
from foveate.training.schedules import learning_rate_factor
from foveate.training.trainer import parameter_groups

VG, REFCOCOG = "recipes/dynrefer/vg12.yaml", "recipes/dynrefer/refcocog_finetune.yaml"


@dataclass
class Bench:
    """Files of the authors and of data sets, small, and the overrides that point the recipes at them."""

    folder: Path
    blip2: Any
    text_encoder: Any

    @property
    def vg(self) -> list[str]:
        base = self.folder / "blip2"
        return [
            f"data.root={self.folder / 'vg'}",
            f"data.tags={self.folder / 'ram_tag_list.txt'}",
            f"data.attributes={self.folder / 'ovad2000.json'}",
            f"model.base_models={{vision: {base}, text: {self.folder / 'text'}, language: {base}}}",
            f"model.qformer_from={base}",
            "model.image_size=56",
            "model.num_query_tokens=5",
            "model.align_groups=2",
            "model.head_size=16",
            *self.small,
        ]

    @property
    def small(self) -> list[str]:
        return ["training.batch_size=4", "training.epochs=1", "training.workers=0", "training.precision=fp32"]


def write_visual_genome(root: Path) -> None:
    """Eight regions of two images in the real layout: boxes and phrases, no tags."""
    (root / "VG_100K").mkdir(parents=True)
    phrases = [
        "A red car.",
        "striped dogs",
        "a tree",
        "the red hat",
        "a car",
        "a dog is red",
        "hats",
        "person in a hat",
    ]
    draw = np.random.default_rng(0)
    images, described = [], []
    for number in (1, 2):
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), np.uint8)).save(root / f"VG_100K/{number}.jpg")
        images.append({"image_id": number, "width": 90, "height": 70, "coco_id": None})
        regions = [
            {"region_id": 10 * number + k, "x": 5 * k + 2, "y": 4, "width": 40, "height": 50, "phrase": phrase}
            for k, phrase in enumerate(phrases[4 * number - 4 : 4 * number])
        ]
        described.append({"id": number, "regions": regions})
    (root / "image_data.json").write_text(json.dumps(images))
    (root / "region_descriptions.json").write_text(json.dumps(described))
    (root / "densecap_splits.json").write_text(json.dumps({"train": [1, 2], "val": [], "test": []}))


def write_refcocog(root: Path) -> None:
    """Four expressions of two boxes in MDETR's layout."""
    (root / "train2014").mkdir(parents=True)
    name = "COCO_train2014_000000000009.jpg"
    Image.fromarray(np.full((70, 90, 3), 120, np.uint8)).save(root / "train2014" / name)
    images, annotations = [], []
    for number, caption in enumerate(["the red car", "a car is red", "the dog", "a striped dog"]):
        images.append({"id": number, "file_name": name, "width": 90, "height": 70, "caption": caption})
        box = [5, 5, 40, 30] if number < 2 else [30, 20, 50, 45]
        annotations.append({"id": 50 + number, "image_id": number, "bbox": box, "category_id": 1, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (root / "finetune_refcocog_train.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def bench(official_files: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("authors")
    files = official_files.write_official_files(folder)
    convert_text_encoder(files.paths["text"], folder / "text", text_tokenizer=files.paths["text_tokenizer"])
    write_visual_genome(folder / "vg")
    write_refcocog(folder / "refcocog")
    return Bench(folder, files.blip2, files.text_encoder)


@pytest.fixture(scope="module")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(VG, [*bench.vg, "training.save_every=1"], out=tmp_path_factory.mktemp("run") / "vg").output


def test_settings_of_the_paper() -> None:
    for file, epochs, rates in ((VG, 5, [1, 0.905, 0.655, 0.345, 0.095]), (REFCOCOG, 3, [1, 0.75, 0.25])):
        recipe: Any = load_recipe(file)
        settings, model = recipe.training, recipe.model
        assert (settings.epochs, settings.batch_size, settings.optimizer) == (epochs, 64, "adamw")
        assert (settings.learning_rate, settings.weight_decay, settings.betas) == (1e-4, 0.05, (0.9, 0.999))
        assert (settings.max_grad_norm, recipe.seed, recipe.data.control_dropout) == (0, 42, 0.5)
        weights = (model.caption_loss_weight, model.tag_loss_weight, model.contrast_loss_weight)
        assert (weights, model.prompt_loss_weight) == ((1, 0.01, 0.5), 0)
        assert recipe.data.views == "random"
        assert recipe.data.each_caption
        factor = learning_rate_factor(settings, 10 * epochs, 10)
        assert [factor(10 * epoch + 7) for epoch in range(epochs)] == pytest.approx(rates, abs=5e-4)


def test_a_fresh_model_starts_from_blip2(bench: Bench) -> None:
    model: Any = build(load_recipe(VG, bench.vg)).model  # pyright: ignore[reportArgumentType]
    blip2 = bench.blip2.state_dict()
    ours = model.state_dict()
    assert torch.equal(ours["query_tokens"], blip2["query_tokens"])
    assert torch.equal(ours["t5_proj.weight"], blip2["language_projection.weight"])
    queries = [key for key in blip2 if key.startswith("qformer.")]
    assert len(queries) > 40
    assert all(torch.equal(ours[key], blip2[key]) for key in queries)
    for key in ("shared.weight", "lm_head.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"):
        assert torch.equal(ours[f"language_model.{key}"], blip2[f"language_model.{key}"].bfloat16()), key
    # What is trained keeps its precision, what is frozen is halved.
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision_tower.", "text_encoder.", "language_model."))
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert parameter.requires_grad == (not frozen and name != "query_tokens"), name


def test_frozen_parts_cost_no_gradient_and_no_optimiser_memory(bench: Bench, trained: Path) -> None:
    task = build(load_recipe(VG, bench.vg))  # pyright: ignore[reportArgumentType]
    model: Any = task.model
    assert task.collate is not None
    batch = task.collate([task.train_dataset[k] for k in range(4)])
    assert "prompt_labels" not in batch  # of no use at these settings
    model.train()
    model(**batch).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
    state = torch.load(trained / "checkpoints/checkpoint-2/optimizer.pt", weights_only=True)
    moments = [entry["exp_avg"] for entry in state["state"].values()]
    assert len(moments) == len(learning)
    assert sum(moment.numel() for moment in moments) == sum(p.numel() for p in learning.values())
    saved = load_file(trained / "checkpoints/checkpoint-2/model.safetensors")
    assert saved.keys() == learning.keys()


def test_no_decay_of_biases_and_norms(bench: Bench) -> None:
    """The authors leave out what has fewer than two dimensions, or bias, ln or bn in its name: the same parameters."""
    model: Any = build(load_recipe(VG, bench.vg)).model  # pyright: ignore[reportArgumentType]
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.05)[0]["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            none = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            assert (id(parameter) in decayed) == (not none), name


def test_tags_are_those_of_the_captions(bench: Bench) -> None:
    dataset: Any = build(load_recipe(VG, bench.vg)).train_dataset  # pyright: ignore[reportArgumentType]
    assert len(dataset) == 8
    named = {
        s["caption"]: {dataset.tags[k] for k in s["tags"].nonzero()[:, 0]} for s in map(dataset.__getitem__, range(8))
    }
    # Of car, red, Hat, "striped dog".
    assert named["a red car"] == {"red", "car"}
    assert named["striped dogs"] == {"striped dog"}
    assert named["hats"] == {"Hat"}
    assert named["a tree"] == set()


def test_a_trained_model_describes_and_is_fine_tuned(bench: Bench, trained: Path, tmp_path: Path) -> None:
    describer: Any = foveate.load(str(trained / "checkpoint"))
    vocabulary = describer.processor.vocabulary
    assert vocabulary.tags == ("car", "red", "Hat", "striped dog")
    assert [attribute.name for attribute in vocabulary.attributes] == ["color:red/crimson", "clothes pattern:plain"]
    assert vocabulary.attributes[1].prompts == ("the plain clothes pattern", "the  has plain clothes pattern")
    assert len(vocabulary.classes) == 80
    region = describer(np.full((60, 60, 3), 90, np.uint8), boxes=[[5, 5, 30, 40]], tasks=("tags", "category"))[0]
    assert region.category in vocabulary.classes

    settings = [f"data.root={bench.folder / 'refcocog'}", f"model.init_from={trained / 'checkpoint'}", *bench.small]
    recipe: Any = load_recipe(REFCOCOG, settings)
    assert len(build(recipe).train_dataset) == 4  # pyright: ignore[reportArgumentType] - an expression is a sample
    tuned: Any = foveate.load(str(train(REFCOCOG, settings, out=tmp_path / "tuned").checkpoint))
    assert tuned.model.config.tag_threshold == 0.76
    assert not torch.equal(tuned.model.tag_fc.weight, describer.model.tag_fc.weight)
    assert torch.equal(tuned.model.query_tokens, describer.model.query_tokens)


def test_thresholds_of_tags_are_chosen_on_held_out_regions(bench: Bench, tmp_path: Path) -> None:
    calibration = f"calibration={{root: {bench.folder / 'vg'}, split: train, tag_thresholds: true, min_positives: 3}}"
    settings = [*bench.vg, calibration, "training.max_steps=1", "model.tag_threshold={'*': 0.6, Hat: 0.5}"]
    describer: Any = foveate.load(str(train(VG, settings, out=tmp_path / "run").checkpoint))
    thresholds = describer.model.config.tag_threshold
    # red is in three captions and Hat in three, car in two and the striped dog in one.
    assert thresholds.keys() == {"*", "red", "Hat"}
    assert thresholds["*"] == 0.6
    assert thresholds["Hat"] != 0.5
    with pytest.raises(RecipeError, match=r"model\.tag_threshold names 'zebra', which is no tag"):
        build(load_recipe(VG, [*bench.vg, "model.tag_threshold={zebra: 0.5}"]))  # pyright: ignore[reportArgumentType]


def test_text_encoder_of_eva_clip_as_a_checkpoint(bench: Bench, official_files: ModuleType, tmp_path: Path) -> None:
    loaded = CLIPTextModelWithProjection.from_pretrained(bench.folder / "text")
    ids = torch.tensor([[14, 4, 7, 15]])
    wanted = bench.text_encoder(input_ids=ids).text_embeds
    torch.testing.assert_close(loaded(input_ids=ids).text_embeds, wanted)
    state = torch.load(bench.folder / "eva_clip_psz14.pt", weights_only=True)
    del state["text.ln_final.weight"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \(text\.ln_final\.weight\)"):
        convert_text_encoder(tmp_path / "broken.pt", tmp_path / "out", text_tokenizer=bench.folder / "clip")
    assert not (tmp_path / "out").exists()


def test_language_model_of_a_blip2(bench: Bench) -> None:
    model, tokenizer = load_language_model(bench.folder / "blip2", feed_forward_activation="gelu")
    state = bench.blip2.language_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not torch.equal(model.get_parameter("lm_head.weight"), model.get_parameter("shared.weight"))
    assert model.config.dense_act_fn == "gelu"  # pyright: ignore[reportAttributeAccessIssue]
    assert len(tokenizer) == 16


def test_what_is_missing_or_contradicts_is_said(bench: Bench, tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises((RecipeError, InputError, CheckpointError)) as caught:
            build(load_recipe(VG, [*bench.vg, *overrides]))  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give either it or qformer_from" in refused("model.init_from=dynrefer-world")
    assert "qformer_from brings the sizes of the Q-Former; remove qformer_width" in refused("model.qformer_width=32")
    assert "does not fit this configuration" in refused("model.num_query_tokens=7")
    assert "the base must be a BLIP-2 checkpoint" in refused("model.qformer_from=t5-world")
    assert "tags.txt does not exist" in refused(f"data.tags={tmp_path / 'tags.txt'}")
    assert "gives no tags to learn; name a tag list under data.tags" in refused("data.tags=null")
    missing = Path(shutil.copytree(bench.folder / "vg", tmp_path / "vg"))
    (missing / "VG_100K/2.jpg").unlink()
    assert "1 of 2 training images are missing, the first is" in refused(f"data.root={missing}", "data.skip_bad=false")
    left: Any = build(load_recipe(VG, [*bench.vg, f"data.root={missing}"]))  # pyright: ignore[reportArgumentType]
    assert len(left.train_dataset) == 4
    (missing / "VG_100K/1.jpg").unlink()
    assert "2 of 2 training images are missing" in refused(f"data.root={missing}")


def test_tags_that_the_list_does_not_have(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a.png")
    record = {"id": 3, "image_id": 1, "caption": "a hat", "bbox": [1, 1, 30, 30]}
    record["extra_info"] = {"parser_result": {"tag_set1": [2], "tag_set2": [3, 4]}}
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}]
    (tmp_path / "train.json").write_text(json.dumps({"images": images, "annotations": [record]}))
    settings = [*bench.vg, "data.format=controlcap", f"data.root={tmp_path}"]
    with pytest.raises(InputError, match=r"region 3 of .* has the tag number 4, but the tag list has 4 entries"):
        build(load_recipe(VG, settings))  # pyright: ignore[reportArgumentType]


def test_the_accelerate_file_parses_and_its_fsdp_is_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = load_config_from_file("recipes/accelerate/gpus.yaml")
    assert (str(config.distributed_type.value), config.num_processes, config.use_cpu) == ("MULTI_GPU", 8, False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"accelerate was set up with FSDP; launch with .*training\.shard_frozen"):
        train(VG, bench.vg, out=tmp_path / "run")


def test_only_a_language_model_that_is_not_saved_is_split(bench: Bench, trained: Path, tmp_path: Path) -> None:
    task = build(load_recipe(VG, bench.vg))  # pyright: ignore[reportArgumentType]
    assert isinstance(task.model, DynReferModel)
    assert len(task.shard) == 2  # a layer of the encoder and one of the decoder
    whole = Path(shutil.copytree(trained / "checkpoint", tmp_path / "whole"))
    model: Any = DynReferModel.from_pretrained(whole)
    model.config.base_models = {}
    model.save_pretrained(whole)
    for part, source in (("text", "text"), ("language", "blip2")):
        shutil.copytree(bench.folder / source, whole / f"{part}_tokenizer")
    settings = [f"data.root={bench.folder / 'refcocog'}", f"model.init_from={whole}", *bench.small]
    with pytest.raises(RecipeError, match=r"no frozen part that can be split; set training\.shard_frozen to false"):
        train(REFCOCOG, [*settings, "training.shard_frozen=true"], out=tmp_path / "run")
