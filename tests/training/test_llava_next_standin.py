"""llava-next-world: what is learnt is what transformers' processor writes, and what is saved is a LLaVA-NeXT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaNextForConditionalGeneration

from foveate import drop_visual_tokens, load
from foveate.errors import InputError, RecipeError
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.training.sampling import SampleKey
from foveate.training.standins.llama.recipe import build_tokenizer
from foveate.training.standins.llava_next.recipe import (
    IGNORED,
    PictureConversations,
    answers,
    build,
    build_model,
    collate,
    conversation,
    see,
)
from foveate.training.trainer import TrainingTask
from foveate.world.export import export_scenes

RECIPE = Path("recipes/standins/llava_next_world.yaml")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: a tiny Llama with the world's tokenizer, a few scenes, and a grid of two."""
    folder = tmp_path_factory.mktemp("llava_next")
    tokenizer: Any = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    export_scenes(folder / "world", "llava", first_seed=4, count=4, size=96, val_fraction=0.0, processes=1)
    world = {"first_seed": 4, "count": 4, "size": 96}
    data = {"root": str(folder / "world"), "annotations": ["train.json"], "world": world}
    return [
        f"data={json.dumps(data)}",
        f"evaluation.data={json.dumps(data | {'samples': 2})}",
        f"model.language={folder / 'llama'}",
        "model.grids=[[1, 2]]",
        "model.remember_pictures=false",
    ]


@pytest.fixture(scope="module")
def task(settings: list[str]) -> TrainingTask:
    recipe: Any = load_recipe(RECIPE, settings)
    return build(recipe)


def parts_of(task: TrainingTask) -> tuple[Any, Any, PictureConversations]:
    assert isinstance(task.train_dataset, PictureConversations)
    model: Any = task.model
    return model.llava, task.train_dataset.processor, task.train_dataset


def test_what_is_learnt_is_what_the_processor_writes(task: TrainingTask) -> None:
    _, processor, dataset = parts_of(task)
    picture = Image.new("RGB", (96, 64), (200, 30, 30))
    seen = see(picture, processor)
    # Of two sub-images side by side on 120 x 60 the picture fills 90 x 60. That leaves 3 of 12 columns empty, of which
    # 1 is cut off on either side; a newline ends each row.
    assert seen["pixel_values"].shape == (3, 3, 60, 60)
    assert seen["count"] == 36 + 6 * 10 + 6
    pairs = [("what colour is the car?", "red"), ("where is the red car?", "above a dog")]
    ids, labels = conversation(pairs, seen, processor, dataset.settings)
    messages = []
    for number, (asked, answer) in enumerate(pairs):
        shown = [] if number else [{"type": "image"}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    # The whole prompt, to where the first answer begins.
    text = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert text == "USER: <image>\nwhat colour is the car? ASSISTANT:"
    prompt = processor(images=[picture], text=text, return_tensors="pt")["input_ids"][0].tolist()
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    assert ids[:first] == prompt
    assert prompt.count(processor.image_token_id) == seen["count"]
    said = [label for label in labels if label != IGNORED]
    assert processor.tokenizer.decode(said) == "red</s> above a dog</s>"
    # A conversation goes on as the template writes it, but for the spaces of pieces that are encoded by themselves.
    written = processor.apply_chat_template(messages).replace("<image>", "").split()
    again = processor.tokenizer.decode([token for token in ids if token != processor.image_token_id])
    assert "".join(again.split()) == "<s>" + "".join(written).lower()
    short = dataset.settings.model_copy(update={"length": first + 3})
    assert conversation(pairs, seen, processor, short)[0] == ids[: first + 3]
    with pytest.raises(RecipeError, match=r"model.length is 20, and a picture with a question has \d+ tokens"):
        conversation(pairs, seen, processor, dataset.settings.model_copy(update={"length": 20}))


def test_only_answers_teach_and_the_tower_stays(task: TrainingTask) -> None:
    model, processor, dataset = parts_of(task)
    assert dataset[SampleKey(0, 0, 1)]["input_ids"] == dataset[SampleKey(0, 0, 1)]["input_ids"]
    batch = collate(processor.tokenizer.pad_token_id)([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 3, 60, 60)
    output = task.model(**batch)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    learnt = batch["labels"][:, 1:] != IGNORED
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1][learnt], batch["labels"][:, 1:][learnt])
    assert output["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)
    output["loss"].backward()
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())
    for name in ("model.image_newline", "model.multi_modal_projector.linear_1.weight", "lm_head.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0
    model.zero_grad()


def test_pictures_that_are_remembered_teach_the_same(settings: list[str], task: TrainingTask) -> None:
    model, processor, dataset = parts_of(task)
    join = collate(processor.tokenizer.pad_token_id)
    training: Any = task.model
    remembering = PictureConversations(dataset.samples, dataset.index, processor, dataset.settings, training.look)
    plain, kept = (join([own[0], own[1], own[0]]) for own in (dataset, remembering))
    assert "pixel_values" not in kept
    assert kept["tiles"].tolist() == [3, 3, 3]
    assert kept["input_ids"].equal(plain["input_ids"])
    losses = [task.model(**batch)["loss"] for batch in (plain, kept)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    losses[1].backward()
    assert model.model.image_newline.grad.abs().sum() > 0
    model.zero_grad()
    with pytest.raises(RecipeError, match="remember_pictures keeps what a frozen tower sees"):
        load_recipe(RECIPE, [*settings, "model.train_vision=true", "model.remember_pictures=true"])


def test_a_trained_model_is_a_llava_next_whose_tokens_can_be_dropped(settings: list[str], tmp_path: Path) -> None:
    steps = ["training.max_steps=2", "training.batch_size=2", "training.save_every=0", "training.progress=false"]
    folder = train(RECIPE, [*settings, *steps], out=tmp_path / "run").checkpoint
    metrics = evaluate(RECIPE, folder, [*settings, "evaluation.max_new_tokens=3"], out=tmp_path / "out").metrics
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert metrics["questions"] == len(rows) > 4
    assert metrics["accuracy"] == pytest.approx(sum(row["right"] for row in rows) / len(rows))
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.image_grid_pinpoints == [[60, 120]]
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.tokenizer.padding_side == "left"
    asked = [(Path(settings[0].partition('"root": "')[2].partition('"')[0]) / "images" / rows[0]["image"], "what?")]
    said = answers(model, processor, asked, batch_size=4, max_new_tokens=3)
    with drop_visual_tokens(model, 0.2):
        assert answers(model, processor, asked, batch_size=4, max_new_tokens=3)
    predictor = load(folder, device="cpu")
    assert [predictor.ask(*asked[0], max_new_tokens=3, stops=["nothing like this"]).text] == said
    with pytest.raises(InputError, match="is a 'llama' model, but a 'llava_next' model is needed"):
        evaluate(RECIPE, settings[2].partition("=")[2], settings, out=tmp_path / "other")


def test_parts_that_do_not_fit_are_refused(settings: list[str]) -> None:
    with pytest.raises(RecipeError, match="template is 'vicunya'; use one of vicuna"):
        load_recipe(RECIPE, [*settings, "model.template=vicunya"])
    recipe: Any = load_recipe(RECIPE, [*settings, "model.vision_layer=-9"])
    with pytest.raises(RecipeError, match="vision_layer is -9; give one of -1 to -7"):
        build_model(recipe.model)
    with pytest.raises(RecipeError, match="there is no folder"):
        build(cast(Any, load_recipe(RECIPE, [*settings, "data={root: /nowhere}"])))
