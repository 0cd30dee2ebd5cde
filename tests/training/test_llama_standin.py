"""llama-world: a tokenizer of words and letters, scenes in words whose questions have the answers that are learnt."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foveate import checkpoints
from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.language.lm import load_language_model
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.training.sampling import SampleKey
from foveate.training.standins.llama.recipe import (
    BRIEFLY,
    LlamaPretraining,
    LlamaSizes,
    SceneData,
    SceneWords,
    WorldTalk,
    _answers,
    _collate,
    _perplexity,
    build_tokenizer,
    conversation_ids,
    embed_bags,
    exchange_words,
    random_exchange,
    read_scenes,
    world_words,
)
from foveate.world.grammar import SceneQuestion
from foveate.world.scenes import render_scene
from foveate.world.vocabulary import colour_names

RECIPE = "recipes/standins/llama_world.yaml"
TOKENIZER: Any = build_tokenizer()


@pytest.fixture(scope="module")
def scenes() -> list[SceneWords]:
    return read_scenes(SceneData(first_seed=40, count=12, processes=1))


def sizes(**changes: object) -> LlamaSizes:
    return LlamaSizes.model_validate(changes)


def test_every_word_of_the_world_is_one_token() -> None:
    for word in world_words():
        assert TOKENIZER.tokenize(word) == [f"▁{word}"]
    for scene in (render_scene(seed, size=128) for seed in range(4)):
        for item in scene.instances:
            for caption in item.captions:
                assert TOKENIZER.tokenize(caption) == [f"▁{word}" for word in caption.split()]
    assert TOKENIZER.tokenize("USER: red car? ASSISTANT:") == ["▁user", ":", "▁red", "▁car", "?", "▁assistant", ":"]
    assert TOKENIZER.tokenize("says qxz") == ["▁says", "▁", "q", "x", "z"]
    assert TOKENIZER.unk_token_id in TOKENIZER("日本")["input_ids"]
    assert TOKENIZER("red")["input_ids"][0] == TOKENIZER.bos_token_id


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=7), min_size=1, max_size=6))
def test_any_word_can_be_spelt(words: list[str]) -> None:
    text = " ".join(words)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_the_tokenizer_survives_being_saved(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: a street: a purple sign that says xqz\nwhat does it say? ASSISTANT:"
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")
    assert again.decode(again("\nred car?", add_special_tokens=False)["input_ids"]) == "\nred car?"


def test_conversations_are_vicunas() -> None:
    pairs = [("what colour is the car?", "red"), ("how many car objects are there?", "1")]
    ids, labels = conversation_ids("a street: a red car", pairs, TOKENIZER, "vicuna", 100)
    pieces = TOKENIZER.convert_ids_to_tokens(ids)
    first = ["<s>", "▁user", ":", "▁a", "▁street", ":", "▁a", "▁red", "▁car", "\n"]
    first += ["what", "▁colour", "▁is", "▁the", "▁car", "?", "▁assistant", ":", "▁red", "</s>", "▁\n"]
    second = ["<s>", "▁user", ":", "▁how", "▁many", "▁car", "▁objects", "▁are", "▁there", "?", "▁assistant", ":"]
    second += ["▁1", "</s>", "▁\n"]
    assert pieces == [*first, *second]
    learnt = [piece for piece, label in zip(pieces, labels, strict=True) if label != -100]
    assert learnt == ["▁red", "</s>", "▁1", "</s>"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    # The second turn does not fit any more; the first one stays whatever its length.
    for length in (len(first) + len(second) - 1, 3):
        short, _ = conversation_ids("a street: a red car", pairs, TOKENIZER, "vicuna", length)
        assert short == ids[: len(first)]


def test_words_change_places() -> None:
    change = exchange_words(
        {"red": "orange", "orange": "red", "car": "bus", "bus": "car"}, {"bus": "qx", "stop": "bus"}
    )
    assert change("a red car above an orange bus") == "an orange bus above a red car"
    assert change("a sign that says bus above a red bus") == "a sign that says qx above an orange car"
    assert change("what colour is the bus?") == "what colour is the car?"
    scene = SceneWords(
        "a street",
        ("a red sign that says stop",),
        ("a red sign",),
        (True,),
        (SceneQuestion("what does the red sign say?", "stop", "text"),),
        (),
    ).exchanged(change)
    assert scene.objects == ("an orange sign that says bus",)
    assert scene.asked[0] == SceneQuestion("what does the orange sign say?", "bus", "text")


def answer_from_words(context: str, question: str) -> str | None:
    """The answer as a reader of the context finds it, or None for questions that this reader does not know."""
    objects = context.partition(": ")[2].split("; ")
    relation = r"(?P<where> (?:to the (?:left|right) of|above|below|in front of|behind) an? \w+ \w+)?"
    parts = [re.fullmatch(rf"an? (?P<own>.+?){relation}", phrase) for phrase in objects]
    own = [part["own"].partition(" that says ")[0].split() for part in parts if part]
    said = [part["own"].partition(" that says ")[2] for part in parts if part]
    assert len(own) == len(objects)
    if found := re.fullmatch(r"what colour is the (\w+)\?", question):
        named = [words for words in own if found[1] in words]
        return " ".join(word for word in named[0] if word in colour_names()) if len(named) == 1 else None
    if found := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return str(sum(found[1] in words for words in own))
    if found := re.fullmatch(r"where is the (\w+) (\w+)\?", question):
        named = [part for part, words in zip(parts, own, strict=True) if {found[1], found[2]} <= set(words)]
        return named[0]["where"].strip() if len(named) == 1 and named[0] else None
    if found := re.fullmatch(r"what does the (\w+) sign say\?", question):
        signs = [word for word, words in zip(said, own, strict=True) if {found[1], "sign"} <= set(words)]
        return signs[0] if len(signs) == 1 else None
    return None


def test_answers_are_in_the_words_of_the_scene(scenes: list[SceneWords]) -> None:
    draw = np.random.default_rng(0)
    checked = dict.fromkeys(("colour", "count", "where", "text"), 0)
    for scene in scenes:
        for changed in (scene, *(scene.exchanged(random_exchange(draw)) for _ in range(4))):
            assert len(changed.questions) == len(scene.questions) >= len(scene.asked)
            for asked in changed.questions:
                if asked.kind in checked:
                    found = answer_from_words(changed.context(), asked.question)
                    assert found == asked.answer, (changed.context(), asked)
                    checked[asked.kind] += 1
    assert all(count > 4 for count in checked.values()), checked


def test_samples_are_filled_with_questions_and_are_repeatable(scenes: list[SceneWords]) -> None:
    talk = WorldTalk(scenes, TOKENIZER, sizes(length=160, text_share=0.2))
    kinds = {"text": 0, "talk": 0}
    for epoch in range(5):
        for index in range(len(talk)):
            sample = talk[SampleKey(0, epoch, index)]
            assert sample == talk[SampleKey(0, epoch, index)]
            ids, labels = sample["ids"], sample["labels"]
            assert len(ids) == len(labels)
            assert TOKENIZER.unk_token_id not in ids
            assert ids[0] == TOKENIZER.bos_token_id
            if labels == ids:
                kinds["text"] += 1
                assert ids[-1] == TOKENIZER.eos_token_id
                continue
            kinds["talk"] += 1
            text = TOKENIZER.decode(ids)
            assert text.count("assistant:") == text.count("user:") == text.count("</s>") >= 1
            assert len(ids) <= 160 or text.count("assistant:") == 1
            if BRIEFLY in text:
                summary = text.partition(f"{BRIEFLY} assistant: ")[2].partition("</s>")[0]
                assert summary.startswith(text.partition("user: ")[2].partition(":")[0])
    assert kinds["text"] > 3
    assert kinds["talk"] > 30


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def test_the_losses_are_means_over_their_tokens(scenes: list[SceneWords]) -> None:
    llama = tiny_llama()
    talk = WorldTalk(scenes, TOKENIZER, sizes(text_share=0.0, bags=0.0))
    batch = _collate(TOKENIZER.pad_token_id)([talk[k] for k in range(3)])
    assert batch["input_ids"].shape == batch["labels"].shape
    output = LlamaPretraining(llama, 0.25)(**batch)
    wanted = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert float(output["losses"]["answers"]) == pytest.approx(float(wanted), rel=1e-4)
    rest = batch["input_ids"].masked_fill((batch["labels"] != -100) | (batch["attention_mask"] == 0), -100)
    others = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=rest).loss
    assert float(output["losses"]["prompts"]) == pytest.approx(0.25 * float(others), rel=1e-4)
    assert float(output["loss"]) == pytest.approx(float(wanted) + 0.25 * float(others), rel=1e-4)


def test_an_object_in_one_token_is_the_sum_of_its_words(scenes: list[SceneWords]) -> None:
    """Its place is where the context has a mark, padding behind the text is none, and marks are not learnt."""
    talk = WorldTalk(scenes, TOKENIZER, sizes(text_share=0.0, bags=1.0, focus=0.0))
    samples = [talk[k] for k in range(3)]
    batch = _collate(TOKENIZER.pad_token_id)(samples)
    llama = tiny_llama()
    embed = llama.get_input_embeddings()
    embeds = embed_bags(embed, batch["input_ids"], batch["attention_mask"], batch["bags"], TOKENIZER.pad_token_id)
    for row, (sample, scene) in enumerate(zip(samples, scenes, strict=False)):
        marks = [place for place, token in enumerate(sample["ids"]) if token == TOKENIZER.pad_token_id]
        assert len(marks) == len(sample["bags"]) == len(scene.objects)
        for place, bag in zip(marks, sample["bags"], strict=True):
            torch.testing.assert_close(embeds[row, place], embed(torch.tensor(bag)).sum(dim=0))
            assert sample["labels"][place] == -100
        others = [place for place in range(len(sample["ids"])) if place not in marks]
        torch.testing.assert_close(embeds[row, others], embed(batch["input_ids"][row, others]))
    said = LlamaPretraining(llama, 0.25)(**batch)["losses"]
    logits = llama(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[:, :-1].transpose(1, 2)
    answers = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=-100)
    assert float(said["answers"]) == pytest.approx(float(answers), rel=1e-4)
    read = (batch["attention_mask"] == 1) & (batch["labels"] == -100) & (batch["input_ids"] != TOKENIZER.pad_token_id)
    targets = batch["input_ids"].masked_fill(~read, -100)[:, 1:]
    prompts = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    assert float(said["prompts"]) == pytest.approx(0.25 * float(prompts), rel=1e-4)


def test_a_few_objects_answer_their_own_questions(scenes: list[SceneWords]) -> None:
    draw = np.random.default_rng(3)
    asked = 0
    for scene in scenes:
        kept = sorted(draw.choice(len(scene.objects), 2, replace=False).tolist()) if len(scene.objects) > 1 else [0]
        small = scene.focused(kept)
        assert small.things == tuple(scene.things[k] for k in kept)
        for question in small.questions:
            assert question.kind != "count"
            original = scene.questions[[each.question for each in scene.questions].index(question.question)]
            assert kept[question.about] == original.about
            found = answer_from_words(small.context(), question.question)
            assert found in (None, question.answer)
            asked += found is not None
    assert asked > 10


def test_questions_in_a_batch_get_the_answers_that_they_get_alone() -> None:
    llama = tiny_llama()
    asked = [("a street: a red car", "what colour is the car?"), ("the sea: a fish; a red boat; a cup", BRIEFLY)]
    together = _answers(llama, TOKENIZER, asked, "vicuna")
    assert together == [_answers(llama, TOKENIZER, [one], "vicuna")[0] for one in asked]
    assert any(together)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    llama = tiny_llama()
    torch.nn.init.zeros_(llama.lm_head.weight)
    found = _perplexity(llama, TOKENIZER, ["a red car", "a sign that says qx above a tree"])
    assert found == pytest.approx(len(TOKENIZER), rel=1e-3)


SMALL = ["model={width: 16, layers: 1, heads: 2, feed_forward: 16, length: 96}"]
FEW = ["evaluation={first_seed: 7, count: 6, processes: 1}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["data={first_seed: 3, count: 8, processes: 1}", "training.max_steps=2", "training.batch_size=4"]
    settings += ["training.save_every=0", "training.progress=false"]
    return train(RECIPE, [*SMALL, *settings], out=tmp_path_factory.mktemp("llama")).checkpoint


def test_a_trained_model_is_a_plain_llama_that_is_found_and_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    shutil.copytree(trained, tmp_path / "llama-world")
    folder = checkpoints.find_checkpoint("llama-world")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.vocab_size == len(TOKENIZER)
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id
    _, tokenizer = load_language_model(folder)
    assert tokenizer("a red car")["input_ids"] == TOKENIZER("a red car")["input_ids"]
    metrics = evaluate(RECIPE, folder, [*SMALL, *FEW], out=tmp_path / "out").metrics
    assert metrics["questions"] >= 18
    assert 0 <= metrics["answer_accuracy"] < 0.5
    assert 1 < metrics["perplexity"] < 2 * len(TOKENIZER)


def test_damaged_models_and_others_are_not_measured(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a 't5' model, but a 'llama' model is needed"):
        evaluate(RECIPE, Path("src/foveate/weights/t5-world"), [*SMALL, *FEW], out=tmp_path / "out")
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        evaluate(RECIPE, folder, [*SMALL, *FEW], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.width=130", "width 130 does not split into 4 heads of an even width"),
        ("model.template=vicunya", "template is 'vicunya'; use one of vicuna"),
        ("model.layers=0", "model.layers should be greater than 0"),
        ("model.text_share=1", "model.text_share should be less than 1"),
    ],
)
def test_sizes_are_checked(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(RECIPE, [override])
