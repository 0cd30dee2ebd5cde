from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mg_llava_parts import LLAMA, make_model, make_tokenizer  # pyright: ignore[reportMissingImports] (conftest.py)
from PIL import Image

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.language.chat import Reply, reply_in_steps
from foveate.language.templates import TEMPLATES, encode_turns
from foveate.methods.mg_llava.predictor import Answer, MGLlavaPredictor
from foveate.methods.mg_llava.processing import MGLlavaProcessor
from foveate.ops.boxes import box_iou
from foveate.vision.video import Video
from foveate.world.scenes import render_scene

Picture = Callable[..., Image.Image]


def make_predictor(**changes: Any) -> MGLlavaPredictor:
    model = make_model(**changes)
    return MGLlavaPredictor(model, MGLlavaProcessor(make_tokenizer(), model.config))


@pytest.fixture(scope="module")
def predictor() -> MGLlavaPredictor:
    return make_predictor()


def by_generate(predictor: MGLlavaPredictor, image: Any, question: str, boxes: Any, tokens: int = 8) -> list[int]:
    """The ids that transformers' own generate gives for a first question."""
    picture = predictor.processor.picture(image, boxes)
    template = predictor.processor.template
    ids, _ = encode_turns([template.render(f"<image>\n{question}")], predictor.processor.tokenizer)
    return predictor.model.generate(
        torch.tensor([ids]),
        pixel_values=picture.pixel_values[None],
        pixel_values_aux=picture.pixel_values_aux[None],
        boxes=[picture.boxes],
        max_new_tokens=tokens,
        do_sample=False,
    )[0].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_is_what_generate_says(template: str, picture: Picture) -> None:
    predictor = make_predictor(template=template)
    image, boxes = picture(), [[3, 4, 30, 20], [10, 10, 60, 40]]
    answer = predictor.ask(image, "What is it?", boxes=boxes)
    said = by_generate(predictor, image, "What is it?", boxes)
    text = predictor.processor.tokenizer.decode(said, skip_special_tokens=True)
    assert answer.text == text.strip()
    assert answer.boxes == (((3, 4, 30, 20), (10, 10, 60, 40)),)
    assert len(answer.gate) == 1
    assert -1 < answer.gate[0] < 1
    assert set(answer.milliseconds) == {"boxes", "pictures", "towers", "answer"}
    assert str(answer) == answer.text


def test_batches_say_what_each_question_says_alone(predictor: MGLlavaPredictor, picture: Picture) -> None:
    images = [picture(1), picture(2, 33, 71), None, picture(1)]
    questions = ["What?", "How many are there of them?", "Say ok", "Why?"]
    boxes = [[[0, 0, 9, 9]], [], None, [[5, 5, 30, 30], [0, 0, 60, 40]]]
    seen: list[tuple[int, int]] = []
    together = predictor.ask(images, questions, boxes=boxes, batch_size=3, progress=lambda *done: seen.append(done))
    assert seen == [(3, 4), (4, 4)]
    for image, question, own, answer in zip(images, questions, boxes, together, strict=True):
        assert predictor.ask(image, question, boxes=own) == answer
    assert len({answer.text for answer in together}) > 1


def test_a_picture_is_encoded_once(monkeypatch: pytest.MonkeyPatch, picture: Picture) -> None:
    predictor = make_predictor()
    encoded: list[int] = []
    inner = predictor.model.encode
    monkeypatch.setattr(predictor.model, "encode", lambda *inputs: (encoded.append(len(inputs[0])), inner(*inputs))[1])
    image, other = picture(1), picture(2)
    predictor.ask(image, ["a?", "b?", "c?", "d?"], batch_size=2)
    assert encoded == [1]
    predictor.ask([image, other, image, other], ["a?", "b?", "c?", "d?"], batch_size=2)
    assert encoded == [1, 2]
    talk = predictor.conversation(image)
    talk.ask("a?")
    talk.ask("b?")
    assert encoded == [1, 2, 1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_reads_what_training_writes(template: str, picture: Picture) -> None:
    """The cached second turn says what the whole conversation says, read anew with the tokens of training."""
    predictor = make_predictor(template=template, generation={"max_new_tokens": 5})
    model, tokenizer = predictor.model, predictor.processor.tokenizer
    image = picture()
    talk = predictor.conversation(image, boxes=[[3, 4, 30, 20]])
    questions = ["What is it?", "And its colour?", "Sure?"]
    # The answers' own ids: a byte that is half a character would not survive being text.
    ids: list[int] = []
    shape = TEMPLATES[template]
    for number, question in enumerate(questions):
        answer = talk.ask(question)
        text = f"<image>\n{question}" if number == 0 else question
        prompt, _ = encode_turns([shape.render(text)], tokenizer, first=number == 0)
        ids += prompt
        prepared = predictor.processor.picture(image, [[3, 4, 30, 20]])
        said = model.generate(
            torch.tensor([ids]),
            pixel_values=prepared.pixel_values[None],
            pixel_values_aux=prepared.pixel_values_aux[None],
            boxes=[prepared.boxes],
            max_new_tokens=5,
            do_sample=False,
        )[0].tolist()
        said = said[: said.index(257)] if 257 in said else said
        assert answer.text == tokenizer.decode(said, skip_special_tokens=True).strip()
        ids += said + tokenizer.encode(shape.suffix, add_special_tokens=False) + [257] * shape.adds_eos
        ids += tokenizer.encode(shape.separator, add_special_tokens=False)
    assert [question for question, _ in talk.turns] == questions


@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_of_before_are_read_as_training_writes_them(template: str) -> None:
    predictor = make_predictor(template=template)
    shape, tokenizer = TEMPLATES[template], predictor.processor.tokenizer
    turns = [("What is it?", "A dog."), ("And its colour?", "brown")]
    told = [
        shape.render("<image>\nWhat is it?", "A dog."),
        shape.render("And its colour?", "brown"),
        shape.render("Sure?"),
    ]
    assert predictor.prompt_ids("Sure?", "<image>", turns) == encode_turns(told, tokenizer)[0]
    with pytest.raises(InputError, match="first question only"):
        predictor.prompt_ids("Is <image> it?", "<image>", turns)


def test_an_answer_in_steps_is_the_answer(predictor: MGLlavaPredictor, picture: Picture) -> None:
    pictures = [picture(0), picture(1), None]
    questions = ["What is it?", "Where?", "Why is that so?"]
    expected = predictor.ask(pictures, questions, max_new_tokens=7)
    seen = predictor.see_all(pictures, [None] * 3)
    prompts = [predictor.prompt_ids(text, predictor.kind(own)) for text, own in zip(questions, pictures, strict=True)]
    shown = ["", "", ""]

    def show(row: int, text: str) -> None:
        shown[row] += text

    def run(alive: Callable[[int], bool]) -> tuple[int, list[Reply]]:
        steps = reply_in_steps(predictor, prompts, seen, {"max_new_tokens": 7}, show, alive)
        count = 0
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return count, end.value
            count += 1

    count, replies = run(lambda _: True)
    assert [reply.answer for reply in replies] == expected
    assert [text.strip() for text in shown] == [answer.text for answer in expected]
    assert max(answer.tokens for answer in expected) - 1 <= count <= 7
    visual = [0 if own is None else len(own.tokens.sequence(0, 1)) for own in seen]
    texts = [len(prompt) - (own is not None) for prompt, own in zip(prompts, pictures, strict=True)]
    assert [reply.prompt_tokens for reply in replies] == [a + b for a, b in zip(texts, visual, strict=True)]
    # Who is not waited for says nothing more, and what others say does not change.
    assert max(answer.tokens for answer in expected[1:]) > 1
    _, replies = run(lambda row: row == 0)
    assert replies[0].answer == expected[0]
    assert [reply.answer.tokens for reply in replies[1:]] == [0, 0]
    assert run(lambda _: False)[0] == 0


def test_a_stream_is_the_answer_in_pieces(predictor: MGLlavaPredictor, picture: Picture) -> None:
    talk, other = predictor.conversation(picture()), predictor.conversation(picture())
    pieces = list(talk.stream("What?", max_new_tokens=12))
    whole = other.ask("What?", max_new_tokens=12)
    assert "".join(pieces).strip() == whole.text
    assert len(pieces) > 1
    assert talk.turns == [("What?", whole)]


def test_a_stream_that_is_given_up_leaves_the_conversation_usable(
    predictor: MGLlavaPredictor, picture: Picture
) -> None:
    talk = predictor.conversation(picture())
    stream = talk.stream("What?", max_new_tokens=50)
    next(stream)
    with pytest.raises(InputError, match="still being streamed"):
        talk.ask("Why?")
    stream.close()
    assert len(talk.turns) == 1
    assert talk.turns[0][1].tokens < 50
    read = talk._cache.get_seq_length()
    talk.ask("Why?")
    assert talk._cache.get_seq_length() > read


def test_a_failed_turn_leaves_no_trace(predictor: MGLlavaPredictor, picture: Picture, monkeypatch: Any) -> None:
    talk, other = predictor.conversation(picture()), predictor.conversation(picture())
    assert talk.ask("What?") == other.ask("What?")
    layer = predictor.model.language_model.model.layers[1]
    with monkeypatch.context() as broken:
        broken.setattr(layer, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.ask("Broken?")
    assert len(talk.turns) == 1
    assert talk.ask("Why?") == other.ask("Why?")


def test_stop_strings_end_an_answer(predictor: MGLlavaPredictor, picture: Picture) -> None:
    whole = predictor.ask(picture(), "What?", max_new_tokens=30)
    stop = whole.text[4:6]
    cut = predictor.ask(picture(), "What?", max_new_tokens=30, stops=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish == "stop"
    assert whole.finish == "length"
    assert cut.tokens < whole.tokens
    streamed = "".join(predictor.conversation(picture()).stream("What?", max_new_tokens=30, stops=[stop]))
    assert streamed.strip() == cut.text


def test_sampling_is_repeatable(predictor: MGLlavaPredictor, picture: Picture) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12}
    one = predictor.ask(picture(), "What?", seed=1, **options)
    assert predictor.ask(picture(), "What?", seed=1, **options) == one
    assert len({predictor.ask(picture(), "What?", seed=seed, **options).text for seed in range(4)}) > 1
    greedy = predictor.ask(picture(), "What?", max_new_tokens=12)
    assert predictor.ask(picture(), "What?", top_k=1, **options).text == greedy.text
    assert predictor.ask(picture(), "What?", top_p=0.0, **options).text == greedy.text


def test_threads_get_their_own_answers(predictor: MGLlavaPredictor, picture: Picture) -> None:
    images = [picture(seed) for seed in range(4)]
    expected = [predictor.ask(image, "What?") for image in images]
    found: dict[int, Answer] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = predictor.ask(images[number], "What?")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == expected


def test_videos(predictor: MGLlavaPredictor, picture: Picture, tmp_path: Path) -> None:
    frames = [picture(seed) for seed in range(6)]
    boxes = [[[20, 5, 40, 30]], None, [[5, 5, 30, 30]]]
    answer = predictor.ask(Video(tuple(frames)), "What happens?", boxes=boxes)
    assert answer.boxes == (((20, 5, 40, 30),), (), ((5, 5, 30, 30),))
    assert len(answer.gate) == 3
    # Three frames of six: the whole parts of 0, 2.5 and 5.
    chosen = Video((frames[0], frames[2], frames[5]))
    assert predictor.ask(chosen, "What happens?", boxes=boxes) == answer
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03}.png")
    assert predictor.ask(folder, "What happens?", boxes=boxes) == answer
    with pytest.raises(InputError, match="boxes for each of the 3 frames"):
        predictor.ask(folder, "What happens?", boxes=[[0, 0, 9, 9]])


def test_a_proposer_gives_the_boxes(picture: Picture) -> None:
    model = make_model()
    record = {
        "boxes": [[1, 2, 20, 22], [2, 2, 20, 22], [30, 5, 58, 39]],
        "labels": ["cup"] * 3,
        "scores": [0.5, 0.9, 0.3],
    }
    asked: list[Any] = []
    predictor = MGLlavaPredictor(
        model,
        MGLlavaProcessor(make_tokenizer(), model.config),
        proposer=lambda image: (asked.append(image.size), record)[1],
    )
    answer = predictor.ask(picture(), "What?")
    assert asked == [(60, 40)]
    # Of two cups that overlap the better one; by score.
    assert answer.boxes == (((2, 2, 20, 22), (30, 5, 58, 39)),)
    assert predictor.ask(picture(), "What?", boxes=[]).boxes == ((),)
    assert len(asked) == 1


def test_a_shipped_proposer_finds_the_objects_of_a_rendered_scene(folder: Path, tmp_path: Path) -> None:
    scene = render_scene(9_900_001, 128)
    predictor = foveate.load(folder, device="cpu", proposer="proposer-world")
    (found,) = predictor.ask(scene.image, "What?").boxes
    assert 1 <= len(found) <= 100
    drawn = torch.tensor([thing.box for thing in scene.instances], dtype=torch.float32)
    assert box_iou(drawn, torch.tensor(found)).amax(dim=1).median() > 0.5
    (tmp_path / "boxes.json").write_text("[]")
    with pytest.raises(InputError, match="give each picture's with `boxes`"):
        foveate.load(folder, device="cpu", proposer=tmp_path / "boxes.json")


def test_a_folder_is_loaded_by_name_and_read_back(folder: Path, picture: Picture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = foveate.load(folder, device="cpu")
    assert isinstance(loaded, MGLlavaPredictor)
    assert loaded.ask(picture(), "What?") == make_predictor().ask(picture(), "What?")


def test_a_long_context_is_warned_of(picture: Picture) -> None:
    predictor = make_predictor(language_config={**LLAMA, "max_position_embeddings": 32})
    with pytest.warns(UserWarning, match="more than the 32 that the language model was made for"):
        predictor.ask(picture(), "What is it, and what is behind it?")


@pytest.mark.parametrize(
    ("question", "options", "sentence"),
    [
        ("", {}, "a question must be a text"),
        (7, {}, "a question must be a text"),
        ("word " * 10_000, {}, r"tokens long with its template, and at most 400 are read"),
        ("<image> and <image>", {}, r"may hold <image> once, and has <image>, <image>"),
        ("<video> what?", {}, r"may hold <image> once, and has <video>"),
        ("\udcff what?", {}, "must be Unicode"),
        ("What?", {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ("What?", {"temprature": 0.5}, "'temprature' is not a generation setting"),
        ("What?", {"stops": "x"}, "stops must be a list"),
        ("What?", {"batch_size": 0}, "batch_size must be"),
        ("What?", {"boxes": [[0, 0, 1, 1]] * 101}, "101 boxes are given and at most 100"),
        ("What?", {"boxes": [[0, 0, 70, 20]]}, "70"),
        ("What?", {"boxes": {"boxes": [[90, 90, 99, 99]]}}, "the record is of another image"),
        ("What?", {"boxes": {"boxes": [[0, 0, 9, 9]], "labels": []}}, "1 boxes, 0 labels and 1 scores"),
        ("What?", {"boxes": {"boxes": [[0, 0, 9, float("nan")]]}}, "finite numbers"),
        ("What?", {"boxes": {"box": []}}, 'needs "boxes"'),
    ],
)
def test_bad_input_gets_a_sentence(
    predictor: MGLlavaPredictor, picture: Picture, question: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        predictor.ask(picture(), question, **options)


def test_more_bad_input(predictor: MGLlavaPredictor, picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 pictures, 3 questions"):
        predictor.ask([picture(), picture()], ["a?", "b?", "c?"])
    with pytest.raises(InputError, match="no picture that it could stand for"):
        predictor.ask(None, "<image> what?")
    with pytest.raises(InputError, match="boxes are given without a picture"):
        predictor.ask(None, "what?", boxes=[[0, 0, 1, 1]])
    talk = predictor.conversation(picture())
    talk.ask("What?")
    with pytest.raises(InputError, match="<image> may stand in the first question only"):
        talk.ask("<image> what?")
    broken = tmp_path / "clip.gif"
    broken.write_bytes(b"GIF89a" + bytes(20))
    with pytest.raises(InputError):
        predictor.ask(broken, "What happens?")


def test_non_finite_numbers_are_an_error_and_never_an_answer(picture: Picture) -> None:
    predictor = make_predictor()
    with torch.no_grad():
        predictor.model.language_model.lm_head.weight[5] = float("nan")
    with pytest.raises(CheckpointError, match="non-finite logits"):
        predictor.ask(picture(), "What?")
    with pytest.raises(CheckpointError, match="non-finite logits"):
        predictor.conversation(picture()).ask("What?")


def test_arrays_and_files_are_pictures(predictor: MGLlavaPredictor, picture: Picture, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    expected = predictor.ask(image, "What?")
    assert predictor.ask(np.asarray(image), "What?") == expected
    assert predictor.ask(tmp_path / "a.png", "What?") == expected
    assert predictor.ask(str(tmp_path / "a.png"), ["What?"]) == [expected]
