"""`foveate.load` of a LLaVA of transformers: answers, conversations, and which tokens were kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hired_parts as parts  # pyright: ignore[reportMissingImports] (conftest.py)
import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.methods.hired.predictor import LlavaPredictor
from foveate.vision.kept_tokens import plot_kept_tokens

SHORT: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, next_model: Any, llava_model: Any) -> dict[str, Path]:
    """Saved models; do not write into them."""
    root = tmp_path_factory.mktemp("llavas")
    for name, model, processor in (
        ("next", next_model, parts.make_next_processor()),
        ("llava", llava_model, parts.make_processor()),
    ):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in ("next", "llava")}


@pytest.fixture(scope="session", params=["next", "llava"])
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """Remove what you attach."""
    return foveate.load(folders[request.param], device="cpu")


def test_answers_are_those_of_transformers(folders: dict[str, Path], next_model: Any, next_processor: Any) -> None:
    predictor = foveate.load(folders["next"], device="cpu")
    assert isinstance(predictor, LlavaPredictor)
    picture = parts.make_picture(44, 60)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = next_processor.apply_chat_template(messages, add_generation_prompt=True)
    given = next_processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    for budget in (1.0, 0.3):
        with foveate.drop_visual_tokens(next_model, budget), foveate.drop_visual_tokens(predictor, budget):
            wanted = next_model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
            answer = predictor.ask(picture, "what is it?", **SHORT)
        assert answer.text == predictor.tokenizer.decode(wanted, skip_special_tokens=True).strip()
        full = int((given["input_ids"] == parts.IMAGE_ID).sum())
        assert answer.visual_tokens == (full if budget == 1 else int(180 * budget))
        assert bool(answer.kept) == (budget < 1)
        assert answer.to_dict()["visual_tokens"] == answer.visual_tokens


def test_batches_and_conversations_say_the_same(loaded: Any) -> None:
    pictures = [parts.make_picture(60, 60), parts.make_picture(90, 30, seed=3), None]
    questions = ["what is it?", "is <image> wide or high?", "hello there"]
    with foveate.drop_visual_tokens(loaded, budget=0.25):
        together = loaded.ask(pictures, questions, **SHORT)
        alone = [loaded.ask(one, text, **SHORT) for one, text in zip(pictures, questions, strict=True)]
        assert alone == together
        talk = loaded.conversation(pictures[0], **SHORT)
        assert "".join(talk.stream("what is it?")).strip() == together[0].text
        read = talk._cache.get_seq_length()
        second = talk.ask("and now?")
        # From the cache as from the start: the whole conversation in one prompt.
        first = loaded._prompt("what is it?", "<image>")
        ids = [*first, *talk_ids(loaded, together[0]), *loaded._prompt("and now?", None, talk.turns[:1])]
        again = loaded._answer([ids], [loaded.see(pictures[0])], *loaded._sampling(SHORT))[0]
        assert again.text == second.text
        assert talk._cache.get_seq_length() > read
    assert [answer.visual_tokens for answer in together] == [together[0].visual_tokens, together[1].visual_tokens, 0]
    assert "</s>USER: and now? ASSISTANT:" in loaded.tokenizer.decode(loaded._prompt("and now?", None, talk.turns[:1]))


def test_turns_of_before_are_read_as_the_template_writes_them(loaded: Any) -> None:
    turns = [("what is it?", "a dog"), ("which colour?", "brown")]
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    for role, text in (("assistant", "a dog"), ("user", "which colour?"), ("assistant", "brown"), ("user", "sure?")):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    text = loaded.tokenizer.apply_chat_template(
        messages, chat_template=loaded.chat_template, tokenize=False, add_generation_prompt=True
    )
    read = loaded.tokenizer.decode(loaded.prompt_ids("sure?", "<image>", turns))
    assert read.removeprefix("<s>").split() == text.removeprefix("<s>").split()


def talk_ids(loaded: Any, answer: Any) -> list[int]:
    """Ids that the model gave; a byte is a token, so the text has them, but for those that are no text."""
    seen = loaded.see(parts.make_picture(60, 60))
    said: list[int] = []
    from foveate.language.decoding import TokenStream

    sampling, _ = loaded._sampling(SHORT)
    embeds, mask = loaded._embed([loaded._prompt("what is it?", "<image>")], [seen])
    for token in TokenStream(loaded.model, sampling).run(embeds, mask):
        if int(token) == loaded.tokenizer.eos_token_id:
            break
        said.append(int(token))
    assert len(said) == answer.tokens
    return said


def test_kept_tokens_are_shown_where_they_lie(folders: dict[str, Path]) -> None:
    predictor = foveate.load(folders["next"], device="cpu", keep_tokens=0.3)
    image = Image.new("RGB", (80, 40), (200, 200, 200))
    answer = predictor.ask(image, "what?", **SHORT)
    kept = answer.kept[0]
    assert kept.count == answer.visual_tokens == int(kept.keep.sum())
    assert kept.regions[0].tolist() == [0, 0, 80, 40]
    # 2 : 1 as wide as high: one row of two tiles, without padding.
    assert kept.regions[1:].tolist() == [[0, 0, 40, 40], [40, 0, 80, 40]]
    drawn = np.asarray(plot_kept_tokens(image, kept).convert("L"))
    assert drawn.shape == (160, 2 * 320 + 12)
    bright = drawn[:, :320] > 150
    rows, columns = np.nonzero(kept.keep[0].reshape(6, 6))
    assert bright.mean() == pytest.approx(kept.keep[0].mean(), abs=0.03)
    for row, column in zip(rows, columns, strict=True):
        assert bright[int((row + 0.5) * 160 / 6), int((column + 0.5) * 320 / 6)]
    second = drawn[:, 332:] > 150
    rows, columns = np.nonzero(np.concatenate([own.reshape(6, 6) for own in kept.keep[1:]], axis=1))
    assert len(rows)
    for row, column in zip(rows, columns, strict=True):
        assert second[int((row + 0.5) * 160 / 6), int((column + 0.5) * 320 / 12)]
    whole = kept.to_dict()
    assert whole["kept"] == kept.count
    assert [len(part["tokens"]) for part in whole["partitions"]] == kept.keep.sum(axis=1).tolist()
    assert {part["grid"] for part in whole["partitions"]} == {6}
    assert json.dumps(whole)


def test_a_crop_is_shown_as_a_crop(folders: dict[str, Path]) -> None:
    predictor = foveate.load(folders["llava"], device="cpu", keep_tokens=0.5)
    kept = predictor.ask(Image.new("RGB", (90, 30)), "what?", **SHORT).kept[0]
    assert kept.regions.tolist() == [[30, 0, 60, 30]]
    assert (kept.total, kept.count) == (36, 18)


def test_bad_input_gets_a_sentence(folders: dict[str, Path], loaded: Any, tmp_path: Path) -> None:
    picture = parts.make_picture(30, 30)
    for call, sentence in (
        (lambda: loaded.ask(picture, ""), "a question must be a text"),
        (lambda: loaded.ask(picture, "<image> or <image>?"), "may hold <image> once"),
        (lambda: loaded.ask(None, "see <image>"), "there is no picture"),
        (lambda: loaded.ask(picture, "x", boxes=[[1, 1, 5, 5]]), "no tokens of objects"),
        (lambda: loaded.ask("film.mp4", "x"), "not videos"),
        (lambda: loaded.ask(picture, "x", tempreature=1), "not a generation setting"),
        (lambda: foveate.load(folders["next"], proposer="proposer-world"), "takes no proposer"),
        (lambda: foveate.load(folders["next"], keep_tokens=2), "not 2"),
        (lambda: foveate.load("clip-world", keep_tokens=0.2), "a part that methods build on"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
    broken = tmp_path / "broken"
    shutil.copytree(folders["llava"], broken)
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        foveate.load(broken)
    (broken / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        foveate.load(broken)


def test_older_layouts_of_the_files_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """Settings in preprocessor_config.json and the template in chat_template.json, as released folders have them."""
    old = tmp_path / "old"
    shutil.copytree(folders["llava"], old)
    settings = json.loads((old / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    (old / "preprocessor_config.json").write_text(json.dumps(settings))
    (old / "chat_template.json").write_text(json.dumps({"chat_template": (old / "chat_template.jinja").read_text()}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (old / name).unlink()
    picture = parts.make_picture(30, 44)
    wanted = foveate.load(folders["llava"], device="cpu").ask(picture, "what?", **SHORT)
    assert foveate.load(old, device="cpu").ask(picture, "what?", **SHORT) == wanted


def test_missing_weights_are_listed(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folders["llava"], broken)
    weights = load_file(broken / "model.safetensors")
    lost = next(key for key in weights if key.endswith("linear_1.weight"))
    del weights[lost]
    save_file({**weights, "foreign": torch.zeros(1)}, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(.*linear_1\.weight\); 1 unexpected \(foreign\)"):
        foveate.load(broken)
