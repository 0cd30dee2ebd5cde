"""Two-stage training from recipes: towers and language models made here, everything else real."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, ConvNextConfig, ConvNextModel, LlamaConfig

import foveate
from foveate.errors import CheckpointError, FoveateError, InputError, RecipeError
from foveate.language.templates import IGNORED, IMAGE_ID
from foveate.methods.mg_llava.adapters import LoraSettings
from foveate.methods.mg_llava.modeling import MGLlavaModel
from foveate.methods.mg_llava.recipe import (
    ConversationDataset,
    MGLlavaRecipe,
    TrainingData,
    boxes_of,
    build,
    open_questions,
    open_samples,
)
from foveate.training.conversations import accuracies, accuracy_table
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.training.sampling import SampleKey

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """CLIP, ConvNeXt and Llama as saved by transformers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            text_config={**tower, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            projection_dim=16,
        )
    )
    for parameter in clip.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    clip.save_pretrained(folder / "clip")
    trunk = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1]))
    for name, parameter in trunk.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1 / parameter[0].numel() ** 0.5)
        elif "layer_scale" in name:
            torch.nn.init.constant_(parameter, 0.5)
    trunk.save_pretrained(folder / "trunk")
    language = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=300,
            max_position_embeddings=512,
            bos_token_id=256,
            eos_token_id=257,
        )
    )
    language.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return {"vision": str(folder / "clip"), "high_res": str(folder / "trunk"), "language": str(folder / "llama")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four squares of four colours, a question about each, and two conversations about nothing to look at."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    samples: list[dict[str, Any]] = []
    boxes = []
    for number, (name, rgb) in enumerate(COLOURS.items()):
        pixels = np.full((40, 60, 3), 90, np.uint8)
        x, y = 6 + 9 * number, 4 + 5 * number
        pixels[y : y + 14, x : x + 14] = rgb
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nhue?", "kind": "colour", "size": ("small", "large")[number % 2]}
        answer = {"from": "gpt", "value": name}
        samples.append({"id": number, "image": f"{number}.png", "conversations": [asked, answer]})
        boxes.append({"id": number, "boxes": [[x, y, x + 14, y + 14]], "scores": [0.9], "labels": ["square"]})
    for number, (asked, answer) in enumerate((("two and two?", "four"), ("and one?", "five"))):
        samples.append(
            {
                "id": f"text {number}",
                "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}],
            }
        )
    (root / "train.json").write_text(json.dumps(samples))
    (root / "boxes.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, base: dict[str, str], data: Path) -> Path:
    """A recipe of stage sft; tests override what they need."""
    files = {"root": str(data), "annotations": ["train.json"], "boxes": ["boxes.json"]}
    content = {
        "method": "mg_llava",
        "stage": "sft",
        "seed": 1,
        "data": files,
        "model": {"base_models": base, "object_bins": 7, "max_text_length": 200},
        "evaluation": {"data": files, "max_new_tokens": 8},
        "training": {
            "max_steps": 1,
            "batch_size": 6,
            "learning_rate": 1.0e-2,
            "weight_decay": 0.0,
            "precision": "fp32",
            "save_every": 0,
            "progress": False,
        },
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(json.dumps(content))  # which is YAML, too
    return path


def task(recipe: Path, *overrides: str) -> Any:
    torch.manual_seed(1)
    loaded: Any = load_recipe(recipe, overrides)
    return build(loaded)


# -------------------------------------------------------------------- data


def dataset(recipe: Path, *overrides: str) -> ConversationDataset:
    return task(recipe, *overrides).train_dataset


def write_data(folder: Path, data: Path, *conversations: list[str], **more: Any) -> str:
    """Samples of the first picture under another root; gives the override of the recipe."""
    folder.mkdir(exist_ok=True)
    samples = [
        {
            "id": 0,
            "image": "0.png",
            **more,
            "conversations": [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)],
        }
        for texts in conversations
    ]
    (folder / "train.json").write_text(json.dumps(samples))
    (folder / "boxes.json").write_text((data / "boxes.json").read_text())
    if not (folder / "images").exists():
        (folder / "images").symlink_to(data / "images")
    return f"data.root={folder}"


def test_only_answers_and_their_end_are_learnt(recipe: Path, data: Path, tmp_path: Path, tokenizer: Any) -> None:
    override = write_data(tmp_path / "d", data, ["<image>\nHi?", "Yes", "So?", "No."])
    sample = dataset(recipe, override)[0]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    bos, eos = 256, 257
    # Vicuna: USER: {question} ASSISTANT:{answer}</s>\n, a start token before each turn (spec 3.3).
    row: list[tuple[list[int], bool]] = [
        ([bos], False),
        (ids("USER: "), False),
        ([IMAGE_ID], False),
        (ids("\nHi? ASSISTANT:"), False),
        (ids("Yes"), True),
        ([eos], True),
        (ids("\n"), False),
        ([bos], False),
        (ids("USER: So? ASSISTANT:"), False),
        (ids("No."), True),
        ([eos], True),
        (ids("\n"), False),
    ]
    assert sample["input_ids"] == [token for piece, _ in row for token in piece]
    assert sample["labels"] == [token if learnt else IGNORED for piece, learnt in row for token in piece]
    assert sum(label != IGNORED for label in sample["labels"]) == 3 + 1 + 3 + 1


def test_labels_lie_behind_the_visual_tokens(recipe: Path, data: Path, tmp_path: Path) -> None:
    """2 x 2 image tokens and one of the object stand where the placeholder stood, none of them learnt."""
    built = task(recipe, write_data(tmp_path / "d", data, ["<image>\nHi?", "Yes"]))
    sample = built.train_dataset[0]
    batch = built.collate([sample])
    model: MGLlavaModel = built.model
    visual = model.encode(batch["pixel_values"], batch["pixel_values_aux"], [batch["boxes"][0]])
    inputs = model.assemble(batch["input_ids"], batch["attention_mask"], [visual.sequence(0)], batch["labels"])
    assert inputs.labels is not None
    place = sample["input_ids"].index(IMAGE_ID)
    expected = [*sample["labels"][:place], *[IGNORED] * 5, *sample["labels"][place + 1 :]]
    assert inputs.labels[0].tolist() == expected


def test_boxes_reach_the_canvas(recipe: Path) -> None:
    """60 x 40 on a square of 60, then on 64: a box (6, 4, 20, 18) is (6, 14, 20, 28) * 64 / 60."""
    (picture,) = dataset(recipe)[0]["pictures"][0]
    assert picture.boxes.tolist() == [[6, 15, 21, 30]]
    (blind,) = dataset(recipe, "data.boxes=[]")[0]["pictures"][0]
    assert blind.boxes.tolist() == [[0, 0, 0, 0]]


def test_turns_are_shuffled_by_seed_and_epoch_alone(recipe: Path, data: Path, tmp_path: Path) -> None:
    talk = ["<image>\nq0", "a0", "q1", "a1", "q2", "a2", "q3", "a3"]
    built = dataset(recipe, write_data(tmp_path / "d", data, talk), "data.shuffle_turns=true")
    seen = set()
    for epoch in range(8):
        ids = [token for token in built[SampleKey(0, epoch, 0)]["input_ids"] if token >= 0]
        assert built[SampleKey(0, epoch, 0)]["input_ids"].count(IMAGE_ID) == 1
        text = built.processor.tokenizer.decode(ids)
        assert text.startswith("<s>USER: \nq")
        order = [text.index(f"q{k} ASSISTANT:a{k}</s>") for k in range(4)]  # each answer with its question
        seen.add(tuple(np.argsort(order).tolist()))
    assert len(seen) > 3
    straight = dataset(recipe, write_data(tmp_path / "d", data, talk))
    assert straight[SampleKey(0, 5, 0)]["input_ids"] == straight[0]["input_ids"]


def test_questions_of_some_kinds_and_so_many(recipe: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "d"
    override = write_data(root, data, ["<image>\nq0", "a0", "q1", "a1", "q2", "a2"], ["<image>\nq3", "a3"])
    samples = json.loads((root / "train.json").read_text())
    for k, kind in enumerate(("where", "colour", "colour")):
        samples[0]["conversations"][2 * k]["kind"] = kind
    (root / "train.json").write_text(json.dumps(samples))

    def said(built: ConversationDataset, epoch: int = 0) -> str:
        ids = [token for token in built[SampleKey(0, epoch, 0)]["input_ids"] if token >= 0]
        return built.processor.tokenizer.decode(ids)

    colours = dataset(recipe, override, "data.kinds=[colour]")
    assert len(colours) == 1, "the second conversation has none"
    assert "q0" not in said(colours)
    assert said(colours).startswith("<s>USER: \nq1 ASSISTANT:a1</s>")
    one = dataset(recipe, override, "data.kinds=[colour]", "data.most_turns=1", "data.shuffle_turns=true")
    texts = {said(one, epoch) for epoch in range(8)}
    assert len(texts) == 2
    assert all(text.count("ASSISTANT") == 1 for text in texts)
    with pytest.raises(RecipeError, match="no conversation of data has a question of the kinds count"):
        dataset(recipe, override, "data.kinds=[count]")


def test_what_cannot_be_learnt_is_replaced(
    recipe: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = ["<image>\n" + 300 * "a", "late"], ["<image>\nq", "a"]
    built = dataset(recipe, write_data(tmp_path / "d", data, long, short))
    with caplog.at_level(logging.WARNING):
        assert built[0]["input_ids"] == built[1]["input_ids"]
    assert built.replaced == {"no answer left": 1}
    assert "no answer among its first 200 tokens" in caplog.text
    with pytest.raises(InputError, match="100 samples in a row cannot be learnt from"):
        dataset(recipe, write_data(tmp_path / "d", data, long))[0]


def test_pictures_that_are_missing_or_broken(recipe: Path, data: Path, tmp_path: Path) -> None:
    talk = ["<image>\nq", "a"]
    root = tmp_path / "d"
    with pytest.raises(InputError, match=r"1 pictures of the training data are missing, the first is .*gone.png"):
        dataset(recipe, write_data(root, data, talk, image="gone.png"))
    samples = json.loads((root / "train.json").read_text())
    (root / "train.json").write_text(json.dumps([*samples, samples[0] | {"image": "0.png"}]))
    assert len(dataset(recipe, f"data.root={root}", "data.skip_bad=true")) == 1
    (data / "images" / "broken.png").write_bytes(b"no picture")
    override = write_data(root, data, talk, image="broken.png")
    with pytest.raises(InputError, match=r"the sample 0: .*broken.png.* Or set data.skip_bad"):
        dataset(recipe, override)[0]
    with pytest.raises(InputError, match="100 samples in a row"):
        dataset(recipe, override, "data.skip_bad=true")[0]


def test_a_video_is_its_frames(recipe: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "d"
    override = write_data(root, data, ["<video>\nwhat?", "it"], image=None, video="clip")
    (root / "images").unlink()
    (root / "images" / "clip").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(np.full((40, 60, 3), 40 * number, np.uint8)).save(root / "images" / "clip" / f"{number}.png")
    frame = {"boxes": [[10, 0, 50, 40]], "scores": [1.0], "labels": ["a"]}
    (root / "boxes.json").write_text(json.dumps([{"id": 0, "frames": [frame] * 3}]))
    built = task(recipe, override, "model.num_frames=3")
    (frames,) = built.train_dataset[0]["pictures"]
    assert [round(float(frame.pixel_values.mean()), 2) for frame in frames] == sorted(
        round(float(frame.pixel_values.mean()), 2) for frame in frames
    )
    assert [frame.boxes.tolist() for frame in frames] == 3 * [[[0, 0, 64, 64]]]  # the short side fills the canvas
    batch = built.collate([built.train_dataset[0]])
    assert batch["visual_counts"].tolist() == [3]
    assert torch.isfinite(built.model(**batch).loss)
    (root / "boxes.json").write_text(json.dumps([{"id": 0, "frames": [frame]}]))
    with pytest.raises(InputError, match="1 entries of boxes are given for the 3 frames"):
        dataset(recipe, override, "model.num_frames=3")[0]


def test_lengths_group_by_what_is_seen(recipe: Path) -> None:
    lengths = task(recipe, "data.group_by_length=true").lengths
    assert lengths.kinds == [1, 1, 1, 1, 0, 0]
    assert lengths.lengths == [3, 3, 3, 3, 4, 3]  # words
    assert task(recipe).lengths is None


# -------------------------------------------------------------------- model


def test_base_models_arrive_unchanged_and_the_fusion_is_fresh(recipe: Path, base: dict[str, str]) -> None:
    model = task(recipe).model
    language = load_file(Path(base["language"]) / "model.safetensors")
    ours = model.language_model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in language.items())
    trunk = load_file(Path(base["high_res"]) / "model.safetensors")
    tower = model.high_res_tower.model.state_dict()
    assert tower.keys() == {key for key in trunk if not key.startswith("layernorm.")}
    assert all(torch.equal(tower[key], trunk[key]) for key in tower)
    clip = load_file(Path(base["vision"]) / "model.safetensors")
    key = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(model.vision_tower.model.state_dict()[key], clip[f"vision_model.{key}"])
    assert model.fusion.slow_proj.weight.abs().max() == 0
    assert model.config.high_res_size == 64  # 2 patches a side, 32 pixels each


def test_frozen_parts_in_bfloat16(recipe: Path) -> None:
    model = task(recipe, "stage=pretrain", "model.frozen_dtype=bfloat16").model
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in model.named_parameters()}
    frozen = {"vision_tower", "high_res_tower", "language_model"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == frozen
    whole = task(recipe, "model.frozen_dtype=bfloat16").model
    assert next(whole.language_model.parameters()).dtype == torch.float32  # it learns


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["stage=pretrain"], ("fusion", "image_projector", "box_projector")),
        ([], ("fusion", "image_projector", "box_projector", "language_model")),
        (["model.lora={rank: 4}"], ("fusion", "image_projector", "box_projector", "language_model")),
    ],
)
def test_a_step_changes_what_the_stage_trains_and_nothing_else(
    recipe: Path, tmp_path: Path, overrides: list[str], trained: tuple[str, ...]
) -> None:
    from foveate.training.trainer import run

    built = task(recipe, *overrides)
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    prefixes = {name.split(".")[0] for name, p in built.model.named_parameters() if p.requires_grad}
    assert prefixes == set(trained)
    loaded: Any = load_recipe(recipe, overrides)
    save, built.save = built.save, lambda folder: None  # adapters stay apart
    run(built, loaded.training, tmp_path / "run", 1)
    changed = {name for name, p in built.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == set(trained)
    if overrides == ["model.lora={rank: 4}"]:
        assert {name for name in changed if name.startswith("language_model.")} == {
            name
            for name in before
            if "lora_B" in name  # A has no gradient while B is zero
        }
    assert save is not None
    assert built.model.fusion.slow_proj.weight.abs().max() > 0  # the high resolution begins to count


def test_gradient_checkpointing_and_mixed_batches_have_the_same_loss(recipe: Path) -> None:
    plain, saving = task(recipe), task(recipe, "model.gradient_checkpointing=true")
    samples = [plain.train_dataset[k] for k in range(6)]
    losses = []
    for built in (plain, saving):
        built.model.train()
        loss = built.model(**built.collate(samples)).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    first, second = (built.model.language_model.lm_head.weight.grad for built in (plain, saving))
    torch.testing.assert_close(first, second)
    # The mean over the answers' tokens, whichever row they are in: pictures and texts together as apart.
    with torch.no_grad():
        tokens = [sum(label != IGNORED for label in sample["labels"]) for sample in samples]
        alone = [plain.model(**plain.collate([sample])).loss.item() for sample in samples]
    assert losses[0] == pytest.approx(float(np.average(alone, weights=tokens)), rel=1e-5)


def test_kept_features_give_the_same_loss(recipe: Path, tmp_path: Path) -> None:
    """In float16, so nearly; of pictures and texts in one batch, and of texts alone."""
    plain, kept = task(recipe), task(recipe, f"data.cache_features={tmp_path / 'features'}")
    for chosen in (range(6), range(4, 6)):
        batches = [built.collate([built.train_dataset[k] for k in chosen]) for built in (plain, kept)]
        assert "pixel_values" not in batches[1]
        losses = [built.model(**batch).loss.item() for built, batch in zip((plain, kept), batches, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_batch_of_texts_only_reaches_every_parameter(recipe: Path) -> None:
    """Else other processes would wait for the gradients of the projectors."""
    built = task(recipe)
    built.model.train()
    built.model(**built.collate([built.train_dataset[4], built.train_dataset[5]])).loss.backward()
    for parameter in built.model.bridge_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


# -------------------------------------------------------------------- runs


def test_a_resumed_run_has_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=6", "training.batch_size=2", "training.log_every=1", "training.save_every=3"]
    settings += ["data.group_by_length=true", "model.lora={rank: 4, dropout: 0.2}"]
    whole = train(recipe, settings, out=tmp_path / "whole")
    (tmp_path / "whole" / "training.json").unlink()
    resumed = train(recipe, settings, resume=tmp_path / "whole/checkpoints/checkpoint-3", out=tmp_path / "whole")
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in whole.history]
    saved = load_file(tmp_path / "whole/checkpoints/checkpoint-3/model.safetensors")
    assert not any(name.startswith(("vision_tower.", "high_res_tower.")) for name in saved)
    assert all("lora_" in name for name in saved if name.startswith("language_model."))


def test_adapters_are_saved_and_merged(recipe: Path, base: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel

    settings = ["model.lora={rank: 4, alpha: 8, dropout: 0.0}", "training.max_steps=4"]
    checkpoint = train(recipe, settings, out=tmp_path / "run").checkpoint
    answerer: Any = foveate.load(str(checkpoint))
    merged = answerer.model.language_model
    assert not any("lora" in name for name, _ in merged.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(base["language"])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        untouched = plain(ids).logits
        adapted: Any = PeftModel.from_pretrained(plain, str(checkpoint / "adapter"))
        expected = adapted(ids).logits
        found = merged(ids).logits
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    config = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in (checkpoint / "config.json").read_text()


def test_the_second_stage_goes_on_from_the_first(recipe: Path, tmp_path: Path) -> None:
    first = train(recipe, ["stage=pretrain", "training.max_steps=3"], out=tmp_path / "first").checkpoint
    go_on = [f"model={{init_from: {first}, max_text_length: 150}}"]
    still = train(recipe, [*go_on, "training.learning_rate=0"], out=tmp_path / "second").checkpoint
    before, after = (load_file(folder / "model.safetensors") for folder in (first, still))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert foveate.load(str(still)).model.config.max_text_length == 150
    with pytest.raises(RecipeError, match=r"model.fusion is 'none', but the checkpoint .* has 'conv_gate'"):
        train(recipe, [f"model={{init_from: {first}, fusion: none}}"], out=tmp_path / "third")
    with pytest.raises(RecipeError, match=r"template must be one of"):
        train(recipe, [f"model={{init_from: {first}, template: vicunia}}"], out=tmp_path / "third")


def test_towers_that_were_never_trained_may_be_named_in_place_of_saved(
    recipe: Path, base: dict[str, str], tmp_path: Path
) -> None:
    short = ["training.max_steps=2"]
    whole = train(recipe, short, out=tmp_path / "whole").checkpoint
    named = train(recipe, [*short, "model.keep_towers=false"], out=tmp_path / "named").checkpoint
    towers = ("vision_tower.", "high_res_tower.")
    kept = set(load_file(named / "model.safetensors"))
    assert kept == {key for key in load_file(whole / "model.safetensors") if not key.startswith(towers)}
    expected = MGLlavaModel.from_pretrained(whole).state_dict()
    loaded = MGLlavaModel.from_pretrained(named).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)

    goes_on = task(recipe, f"model={{init_from: {named}}}").model
    assert goes_on.config.base_models == {"vision": base["vision"], "high_res": base["high_res"]}
    goes_on.save_pretrained(tmp_path / "second")
    assert set(load_file(tmp_path / "second" / "model.safetensors")) == kept
    stands_alone = task(recipe, f"model={{init_from: {named}, keep_towers: true}}").model
    assert stands_alone.config.base_models == {}
    with pytest.raises(RecipeError, match="does not say where its towers are from"):
        task(recipe, f"model={{init_from: {whole}, keep_towers: false}}")

    config = json.loads((named / "config.json").read_text())
    config["base_models"]["vision"] = str(tmp_path / "gone")
    (named / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoveateError, match=r"there is no folder .*gone"):
        MGLlavaModel.from_pretrained(named)


def test_a_few_samples_are_learnt_to_the_letter(recipe: Path, tmp_path: Path) -> None:
    """Colours that only the picture tells, and answers without a picture, in both stages of the method."""
    first = train(recipe, ["stage=pretrain", "training.max_steps=5"], out=tmp_path / "first").checkpoint
    settings = [f"model={{init_from: {first}}}", "training.max_steps=80", "training.learning_rate=8e-3"]
    run = train(recipe, [*settings, "training.max_grad_norm=1.0"], out=tmp_path / "run")
    assert run.history[-1]["loss"] < 0.05
    result = evaluate(recipe, run.checkpoint, out=tmp_path / "evaluation")
    lines = [json.loads(line) for line in (tmp_path / "evaluation/answers.jsonl").read_text().splitlines()]
    assert [line["said"] for line in lines] == ["red", "green", "blue", "white", "four", "five"]
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["by_kind"] == {"any": 1.0, "colour": 1.0}
    assert result.metrics["by_kind_and_size"] == {"colour large": 1.0, "colour small": 1.0}
    assert 0 < abs(result.metrics["gate"]) < 1
    table = (tmp_path / "evaluation/accuracy.md").read_text()
    assert "| colour | 100.0 % (2) | - | 100.0 % (2) | 100.0 % (4) |" in table


def test_boxes_of_the_controls(data: Path) -> None:
    questions = open_questions(TrainingData.model_validate({"root": data, "boxes": ("boxes.json",)}))
    given, none, shuffled = (boxes_of(questions, how) for how in ("given", "none", "shuffled"))
    assert [record and record["boxes"] for record in given] == [
        *([[6 + 9 * k, 4 + 5 * k, 20 + 9 * k, 18 + 5 * k]] for k in range(4)),
        None,
        None,
    ]
    assert none == [None] * 6
    assert shuffled == [*given[1:4], given[0], None, None]
    again = boxes_of([questions[0], questions[0]], "given")
    assert again[0] is again[1]  # by which the predictor knows that the picture is the same


def test_the_rendered_world_needs_no_other_data(recipe: Path, tmp_path: Path) -> None:
    """A whole run on scenes that the recipe renders, and an evaluation on others."""
    world = tmp_path / "world"
    scenes = "world: {first_seed: %d, count: 2, size: 96, processes: 1}"
    files = f"annotations: [train.json], boxes: [train_only_box.json], {scenes}"
    settings = [
        f"data={{root: {world / 'train'}, {files % 3}, shuffle_turns: true}}",
        f"evaluation.data={{root: {world / 'held_out'}, {files % 900}}}",
        "training.batch_size=2",
        "model.max_text_length=1472",
    ]
    checkpoint = train(recipe, settings, out=tmp_path / "run").checkpoint
    metrics = evaluate(recipe, checkpoint, settings, out=tmp_path / "run").metrics
    loaded: Any = load_recipe(recipe, settings)
    questions = open_questions(loaded.evaluation.data)
    assert metrics["questions"] == len(questions) > 5
    assert (
        set(metrics["by_kind"])
        == {question.kind for question in questions}
        <= {*("what", "colour", "count", "where", "text")}
    )
    assert {question.size for question in questions} <= {"small", "medium", "large"}
    with pytest.raises(RecipeError, match="was rendered with first_seed 3, but the recipe asks for 4"):
        train(recipe, [*settings, "data.world.first_seed=4"], out=tmp_path / "other")


# -------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=finetune", "stage Input should be|stage should be"),
        ("model.base_models={vision: clip-world}", "base_models must name high_res, language too"),
        ("model.init_from=out/x", "init_from brings all parts"),
        ("model.fusion=gate", "fusion must be one of"),
        ("model.fuson=none", "did you mean 'model.fusion'"),
        ("model.generation={temperatur: 1}", "'temperatur' is not a generation setting"),
        ("model.high_res_size=96", "the low-resolution tower sees 2 patches a side and the high-resolution trunk 3"),
        ("model.lora={rank: 4, quantise: nf4}", r"QLoRA\), for which .*CUDA GPU.* is missing here"),
        ("data.root=nowhere", "data.root: there is no folder nowhere"),
        ("evaluation.data.root=nowhere", "evaluation.data.root: there is no folder nowhere"),
    ],
)
def test_mistakes_of_a_recipe_are_said_in_a_sentence(
    recipe: Path, tmp_path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=message):
        train(recipe, [override], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_are_for_the_second_stage(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.lora adapts the language model"):
        load_recipe(recipe, ["stage=pretrain", "model.lora={}"])


def test_towers_and_language_models_of_the_wrong_kind(recipe: Path, base: dict[str, str], tmp_path: Path) -> None:
    for part, wrong, message in (
        ("vision", "high_res", "a tower needs CLIP"),
        ("high_res", "vision", r"are not MG-LLaVA's|no ConvNeXt"),
        ("language", "high_res", "cannot be loaded"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(recipe, [f"model.base_models.{part}={base[wrong]}"], out=tmp_path / "run")


def test_accuracies_by_hand() -> None:
    rows = [
        {"kind": "colour", "size": "small", "right": True},
        {"kind": "colour", "size": "small", "right": False},
        {"kind": "colour", "size": "large", "right": True},
        {"kind": "text", "size": None, "right": False},
    ]
    assert accuracies(rows) == {
        "questions": 4,
        "accuracy": 0.5,
        "by_kind": {"colour": pytest.approx(2 / 3), "text": 0.0},
        "by_size": {"small": 0.5, "large": 1.0},
        "by_kind_and_size": {"colour small": 0.5, "colour large": 1.0},
    }
    assert accuracy_table(rows).splitlines() == [
        "| question about | small | medium | large | all |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| colour | 50.0 % (2) | - | 100.0 % (1) | 66.7 % (3) |",
        "| text | - | - | - | 0.0 % (1) |",
        "| all | 50.0 % (2) | - | 100.0 % (1) | 50.0 % (4) |",
    ]


def test_sample_limits_are_drawn_and_repeat(data: Path) -> None:
    limited = TrainingData.model_validate({"root": data, "samples": 3})
    assert open_samples(limited, 1)[1] == open_samples(limited, 1)[1]
    assert len({tuple(open_samples(limited, seed)[1]) for seed in range(5)}) > 1


def test_lora_defaults_are_those_of_the_video_variant() -> None:
    assert LoraSettings.model_validate({}).model_dump() == {
        "rank": 512,
        "alpha": 256.0,
        "dropout": 0.05,
        "quantise": None,
    }


def test_what_trains_says_its_stage(recipe: Path, tmp_path: Path) -> None:
    content = json.loads(recipe.read_text())
    del content["stage"]
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="the key 'stage' is missing; add it"):
        load_recipe(tmp_path / "r.yaml")


def test_the_published_recipes_have_the_published_settings() -> None:
    """Spec 3.2; Vicuna-7B."""
    settings = {}
    for name in ("pretrain", "sft"):
        loaded: Any = load_recipe(f"recipes/mg_llava/{name}.yaml")
        assert loaded.stage == name
        assert loaded.seed == 2024
        steps = {"pretrain": 4947, "sft": 10805}[name]
        assert loaded.training.warmup_steps == round(0.03 * steps)
        assert loaded.training.betas == (0.9, 0.999)
        assert (loaded.training.weight_decay, loaded.training.max_grad_norm, loaded.training.epochs) == (0, 1, 1)
        settings[name] = (8 * loaded.training.batch_size, loaded.training.learning_rate, loaded.data.group_by_length)
    assert settings == {"pretrain": (256, 1e-3, False), "sft": (128, 2e-5, True)}
    first: Any = load_recipe("recipes/mg_llava/pretrain.yaml")
    assert (first.model.max_text_length, first.model.high_res_size) == (2048 - 576, 768)


def test_the_two_stages_of_the_world_belong_together() -> None:
    first, second = (load_recipe(f"recipes/mg_llava/{name}.yaml") for name in ("world_pretrain", "world"))
    assert isinstance(first, MGLlavaRecipe)
    assert isinstance(second, MGLlavaRecipe)
    assert (first.stage, second.stage) == ("pretrain", "sft")
    assert second.model.init_from == str(first.output / "checkpoint")
    assert second.data.world == first.data.world
    assert second.evaluation == first.evaluation
    assert first.data.world is not None
    assert second.evaluation.data.world is not None
    trained = range(first.data.world.first_seed, first.data.world.first_seed + first.data.world.count)
    held_out = second.evaluation.data.world
    assert not set(trained) & set(range(held_out.first_seed, held_out.first_seed + held_out.count))


# -------------------------------------------------------------------- processes


def in_processes(recipe: Path, output: Path, *how: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = str(Path(__file__).with_name("train_split.py"))
    started = [
        subprocess.Popen(
            [sys.executable, script, str(recipe), str(output), *how],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:]


@pytest.mark.slow
def test_what_is_trained_can_be_split_between_processes(recipe: Path, tmp_path: Path) -> None:
    """Batches of one, so that one process has a text and the other a picture: losses, weights and a resume as of whole
    models."""
    own: Any = load_recipe(recipe, ["training.max_steps=4", "training.batch_size=1", "training.save_every=2"])
    own = own.model_copy(update={"training": own.training.model_copy(update={"log_every": 1, "learning_rate": 1e-3})})
    path = own.save(tmp_path)
    whole, split = tmp_path / "whole", tmp_path / "split"
    in_processes(path, whole, "whole")
    in_processes(path, split, "split")

    def losses(folder: Path) -> list[float]:
        return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["history"]]

    assert (split / "checkpoints/checkpoint-2/optimizer_0").is_dir()  # each process saved its part
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    expected = load_file(whole / "checkpoint/model.safetensors")

    def check() -> None:
        found = load_file(split / "checkpoint/model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
        assert foveate.load(str(split / "checkpoint")).model.config.fusion == "conv_gate"

    check()
    before = losses(split)
    (split / "training.json").unlink()
    shutil.rmtree(split / "checkpoints/checkpoint-4")
    in_processes(path, split, "split", "resume")
    assert losses(split) == before
    check()


def test_split_runs_refuse_what_has_to_be_whole(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            with pytest.raises(RecipeError, match=rf"was set up with {name}; launch with recipes/accelerate/gpus"):
                train(recipe, ["model.lora={rank: 4}"], out=tmp_path / "run")
            with pytest.raises(RecipeError, match=rf"{name}, which splits all of the model and its AdamW"):
                train(recipe, ["training.optimizer=muon"], out=tmp_path / "run")
