"""The published protocols: miniatures counted by hand, the plumbing around them, and a whole model on rendered data."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from pydantic import ValidationError

import foveate
from foveate import cli
from foveate.data.samples import BenchmarkQuestion
from foveate.errors import InputError, RecipeError
from foveate.methods.mg_llava.protocols import LETTER_REQUEST, ProtocolSettings, evaluate_protocol, prompt
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.vision.images import load_image
from foveate.world.export import export_scenes

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path for path in (ROOT / "recipes/mg_llava").glob("*.yaml") if "protocol:" in path.read_text())

Picture = Callable[..., Image.Image]


class Answerer:
    """A predictor of another kind: it has an `ask` without options, and says what it is told to."""

    def __init__(self, says: Callable[[str], str], stop_at: int | None = None) -> None:
        self.says, self.stop_at = says, stop_at
        self.calls: list[tuple[list[Any], list[str], Any]] = []

    @property
    def asked(self) -> list[str]:
        return [question for _, questions, _ in self.calls for question in questions]

    def ask(self, images: Any, questions: Any, *, boxes: Any = None, batch_size: int = 8) -> list[str]:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        for image in images:
            if not (isinstance(image, Path) and image.is_dir()):
                load_image(image)
        self.calls.append((list(images), list(questions), boxes))
        return [self.says(question) for question in questions]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What stands for the model's folder where the model is none of ours."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(answerer: Any, out: Path, checkpoint: Path, batch_size: int = 2, **settings: Any) -> dict[str, Any]:
    checked = ProtocolSettings.model_validate({"dataset": "miniature", **settings})
    return evaluate_protocol(checked, answerer, out, model=checkpoint, batch_size=batch_size)


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def coded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# -------------------------------------------------------------------- multiple choice

HEADING = "index\tquestion\thint\tA\tB\tC\tD\tE\tanswer\tcategory\timage\tl2-category\tsplit"


@pytest.fixture
def mmbench(tmp_path: Path, picture: Picture) -> dict[str, Any]:
    """Two questions with both turns, one with one row, and one whose answer is E."""
    rows = [
        f"1\tWhat?\tLook.\tcat\tdog\t\t\t\tA\tanimals\t{coded(picture(1))}\tliving\tdev",
        f"2\tIs it?\t\tyes\tno\t\t\t\tB\tlogic\t{coded(picture(2))}\tdead\tdev",
        "1000001\tWhat?\tLook.\tdog\tcat\t\t\t\tB\tanimals\t1\tliving\tdev",
        "1000002\tIs it?\t\tno\tyes\t\t\t\tA\tlogic\t2\tdead\tdev",
        "3\tAnd?\t\tyes\tno\t\t\t\tA\tlogic\t1\tdead\tdev",
        "4\t哪个?\t\ta\tb\tc\td\te\tE\tanimals\t1\tliving\tdev",
    ]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/dev.tsv").write_text("\n".join([HEADING, *rows]) + "\n")
    return {"name": "mmbench", "root": tmp_path / "bench", "file": "dev.tsv"}


def choose(question: str) -> str:
    """Right in both turns of the first; in one of the second; "Both" is B to the strict rule and nothing to the
    robust one; E is for the robust rule alone."""
    if "What?" in question:
        return "A" if "A. cat" in question else "The answer is B."
    if "Is it?" in question:
        return "B. no" if "B. no" in question else "Both"
    return "I choose A" if "And?" in question else "(E)"


def test_mmbench_by_hand(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    answerer = Answerer(choose)
    report = run(answerer, tmp_path / "out", checkpoint, split="dev", **mmbench)
    assert sorted(answerer.asked)[-3:] == [
        "Look.\nWhat?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
        "Look.\nWhat?\nA. dog\nB. cat\nAnswer with the option's letter from the given choices directly.",
        "哪个?\nA. a\nB. b\nC. c\nD. d\nE. e\n请直接回答选项字母。",
    ]
    # Right: 1, and 3; 2 is wrong in one turn; 4 for the robust rule.
    expected = {
        "questions": 4,
        "rows": 6,
        "pictures": 2,
        "box_source": "none",
        "generation": "the model's own decoding",
        "letters": "strict",
        "accuracy": 50.0,
        "accuracy_strict": 50.0,
        "accuracy_robust": 75.0,
        "without_letter": 1,
        "options_beyond_d": 1,
        "per_category": {"animals": 50.0, "logic": 50.0},
        "per_l2_category": {"dead": 50.0, "living": 50.0},
    }
    assert {key: report[key] for key in expected} == expected
    table = (tmp_path / "out/results.md").read_text().splitlines()
    assert table[0] == "| miniature | questions | strict | robust |"
    assert table[2:4] == ["| all | 4 | 50.0 | 75.0 |", "| category: animals | 2 | 50.0 | 100.0 |"]
    # Questions about one picture are asked behind each other.
    pictures = [image.tobytes() for images, _, _ in answerer.calls for image in images]
    assert sum(a != b for a, b in pairwise(pictures)) == 1
    robust = run(Answerer(choose), tmp_path / "robust", checkpoint, letters="robust", **mmbench)
    assert (robust["accuracy"], robust["letters"], robust["without_letter"]) == (75.0, "robust", 1)


def test_the_submission_has_every_row(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)
    with zipfile.ZipFile(tmp_path / "out/submission.xlsx") as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert rows[0] == ["index", "question", *"ABCDE", "prediction", "category", "l2-category", "split", "answer"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "1000001", "1000002", "3", "4"]
    assert rows[3] == [
        "1000001",
        "What?",
        "dog",
        "cat",
        "",
        "",
        "",
        "The answer is B.",
        "animals",
        "living",
        "dev",
        "B",
    ]
    assert [row[7] for row in rows[1:]] == ["A", "B. no", "The answer is B.", "Both", "I choose A", "(E)"]


def test_a_test_split_is_written_and_not_scored(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    path = mmbench["root"] / "dev.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("".join("\t".join([*line[:8], *line[9:]]) + "\n" for line in lines))
    report = run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)
    assert report["scored"].startswith("no")
    assert "accuracy" not in report
    assert (tmp_path / "out/submission.xlsx").exists()
    assert not (tmp_path / "out/results.md").exists()
    assert "scores" not in read_lines(tmp_path / "out")[0]
    with pytest.raises(InputError, match="does not say what is right, and no server does"):
        run(Answerer(choose), tmp_path / "out", checkpoint, **{**mmbench, "name": "ai2d"})


def test_a_quick_look_takes_whole_questions(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    report = run(Answerer(choose), tmp_path / "out", checkpoint, questions=2, **mmbench)
    assert (report["questions"], report["rows"], report["accuracy"]) == (2, 4, 50.0)
    path = mmbench["root"] / "dev.tsv"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if not line.startswith("2\t")))
    with pytest.raises(InputError, match=r"dev\.tsv: row 3 \(line 4\): \"image\" is the index of a row that has no"):
        run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)
    path.write_text(path.read_text().replace("\tlogic\t2\t", "\tlogic\t1\t"))
    with pytest.raises(InputError, match="the question 2 has turned rows, but none with an index below"):
        run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)


def test_a_question_with_a_broken_turn_does_not_count(
    mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = mmbench["root"] / "dev.tsv"
    text = path.read_text().replace("1000002\tIs it?", '1000002\t"Is it?')
    whole = "1000003\tAnd?\t\tno\tyes\t\t\t\tB\tlogic\t1\tdead\tdev\n"
    path.write_text("".join(f"{line}\n" for line in text.splitlines() if not line.startswith("4")) + whole)
    with pytest.raises(InputError, match=r"dev\.tsv: row 4 \(line 5\): a quote is opened and not closed.*skip_bad"):
        run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)
    report = run(Answerer(choose), tmp_path / "out", checkpoint, skip_bad=True, **mmbench)
    # 2 would be right in the turn that is left.
    assert (report["questions"], report["rows"], report["accuracy"]) == (2, 4, 50.0)
    assert report["left_out"] == {
        "dev.tsv: a quote is opened and not closed": 1,
        "circular question of which a row is left out": 1,
    }


# -------------------------------------------------------------------- other scores


@pytest.fixture
def textvqa(tmp_path: Path, picture: Picture) -> dict[str, Any]:
    root = tmp_path / "text"
    (root / "train_images").mkdir(parents=True)
    prompts, annotations = [], []
    answers = [["dakota"] * 10, ["1990"] * 2 + ["90"] * 8, ["no"] * 10]
    for number, (question, given) in enumerate(zip(("what brand?", "what year?", "what?"), answers, strict=True)):
        name = f"i{number % 2}"
        picture(number % 2).save(root / "train_images" / f"{name}.png")
        text = f"{question}\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
        prompts.append({"question_id": name, "image": f"{name}.png", "text": text, "category": "default"})
        annotations.append({"image_id": name, "question": question, "answers": given})
    (root / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    (root / "val.json").write_text(json.dumps({"data": annotations}))
    return {
        "name": "textvqa",
        "root": root,
        "file": "val.jsonl",
        "annotations": "val.json",
        "images": "train_images",
    }


def read(question: str) -> str:
    return {"what brand?": "Dakota.", "what year?": "1990", "what?": "yes"}[question.split("\n")[0]]


def test_textvqa_by_hand(textvqa: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    answerer = Answerer(read)
    report = run(answerer, tmp_path / "out", checkpoint, **textvqa)
    # 1; of the two who say so 1/3 each, of the eight others 2/3; 0.
    assert report["accuracy"] == pytest.approx(100 * (1 + (2 * 1 / 3 + 8 * 2 / 3) / 10 + 0) / 3)
    assert (
        answerer.asked[0]
        == "what brand?\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
    )
    line = next(line for line in read_lines(tmp_path / "out") if line["row"] == 2)
    assert line["said"] == "1990"
    assert line["answers"] == ["1990"] * 2 + ["90"] * 8
    assert line["scores"] == {"accuracy": 0.6}
    assert "per_category" not in report


def test_docvqa_by_hand(checkpoint: Path, tmp_path: Path, picture: Picture) -> None:
    rows = [f"""7\t{coded(picture(1))}\twho?\t"['Ann Lee', 'A. Lee']\"""", f"9\t{coded(picture(2))}\twhen?\t['1990']"]
    (tmp_path / "doc.tsv").write_text("\n".join(["index\timage\tquestion\tanswer", *rows]))
    answerer = Answerer(lambda question: "ann  lea" if "who" in question else "20")
    settings: dict[str, Any] = {"name": "docvqa", "root": tmp_path, "file": "doc.tsv"}
    report = run(answerer, tmp_path / "out", checkpoint, **settings)
    assert answerer.asked == [
        f"{word}\nAnswer the question using a single word or phrase." for word in ("who?", "when?")
    ]
    # One letter of the raw 8 characters of "ann  lea" is wrong; "20" is less than half of 1990.
    assert report["anls"] == pytest.approx(100 * (1 - 1 / 8) / 2)


def test_vqav2_writes_what_the_server_takes(textvqa: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    root = textvqa["root"]
    asked = [{"question_id": 10 + k, "image": "i0.png", "text": f"{k}?"} for k in range(3)]
    (root / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked[:2]))
    (root / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(asked)))
    settings = {"name": "vqav2", "root": root, "file": "dev.jsonl", "images": "train_images"}
    says = Answerer({"0?": "The Two dogs.", "1?": "yes"}.__getitem__)
    report = run(says, tmp_path / "out", checkpoint, upload_questions="test.jsonl", **settings)
    assert report["scored"].startswith("no")
    upload = json.loads((tmp_path / "out/upload.json").read_text())
    assert upload == [
        {"question_id": 12, "answer": ""},
        {"question_id": 11, "answer": "yes"},
        {"question_id": 10, "answer": "2 dogs"},
    ]
    content = [{"question_id": 10 + k, "answers": [{"answer": ("2 dogs", "no")[k]}] * 10} for k in range(2)]
    (root / "annotations.json").write_text(json.dumps({"annotations": content}))
    report = run(says, tmp_path / "out", checkpoint, annotations="annotations.json", **settings)
    assert report["accuracy"] == 50.0
    (root / "test.jsonl").write_text(json.dumps(asked[2]))
    with pytest.raises(InputError, match=r"test\.jsonl lacks the question 1[01]; give the file of all"):
        run(says, tmp_path / "out", checkpoint, upload_questions="test.jsonl", **settings)


def test_videos_are_written_for_the_judge(checkpoint: Path, tmp_path: Path, picture: Picture) -> None:
    for name in ("clip", "other"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in range(2):
            picture(number).save(tmp_path / "videos" / name / f"{number}.png")
    told = {"a": ("clip", "who runs?", "a dog"), "b": ("clip", "how many?", "two"), "c": ("other", "what?", "Cat")}
    asked = [{"question_id": key, "video_name": video, "question": text} for key, (video, text, _) in told.items()]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    (tmp_path / "a.json").write_text(json.dumps([{"question_id": key, "answer": row[2]} for key, row in told.items()]))
    settings = {"name": "msvd", "root": tmp_path, "file": "q.json", "annotations": "a.json", "images": "videos"}
    answerer = Answerer({"who runs?": "Dog", "how many?": "2", "what?": "cat."}.__getitem__)
    report = run(answerer, tmp_path / "out", checkpoint, **settings)
    assert (round(report["exact"], 4), report["normalised"]) == (33.3333, 100.0)
    assert "not comparable" in report["judge"]
    expected = [
        {"id": "a", "question": "who runs?", "answer": "a dog", "pred": "Dog"},
        {"id": "b", "question": "how many?", "answer": "two", "pred": "2"},
        {"id": "c", "question": "what?", "answer": "Cat", "pred": "cat."},
    ]
    assert json.loads((tmp_path / "out/pred.json").read_text()) == expected
    assert [json.loads(line) for line in (tmp_path / "out/pred.jsonl").read_text().splitlines()] == expected
    assert answerer.calls[0][0] == [tmp_path / "videos/clip"] * 2
    (tmp_path / "videos/other").rename(tmp_path / "videos/moved")
    with pytest.raises(
        InputError, match=r"1 of 2 pictures are missing, the first is .*other \(.*q\.json: question 'c'"
    ):
        run(answerer, tmp_path / "out", checkpoint, **settings)


# -------------------------------------------------------------------- plumbing


def test_an_interrupted_evaluation_goes_on(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    whole = run(Answerer(choose), tmp_path / "whole", checkpoint, **mmbench)
    with pytest.raises(KeyboardInterrupt):
        run(Answerer(choose, stop_at=2), tmp_path / "out", checkpoint, **mmbench)
    assert not (tmp_path / "out/predictions.jsonl").exists()
    second = Answerer(choose)
    report = run(second, tmp_path / "out", checkpoint, **mmbench)
    assert len(second.asked) == 2
    paths = {key for key, value in whole.items() if isinstance(value, str) and str(tmp_path / "whole") in value}
    assert {key: report[key] for key in report if key not in paths} == {
        key: whole[key] for key in whole if key not in paths
    }
    for name in ("predictions.jsonl", "results.md", "submission.xlsx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Another model, or another table, is asked everything.
    path = mmbench["root"] / "dev.tsv"
    for changed, content in ((checkpoint / "weights", "0"), (path, path.read_text().replace("\tdog", "\tdogs"))):
        with pytest.raises(KeyboardInterrupt):
            run(Answerer(choose, stop_at=2), tmp_path / "out", checkpoint, **mmbench)
        changed.write_text(content)
        third = Answerer(choose)
        run(third, tmp_path / "out", checkpoint, **mmbench)
        assert len(third.asked) == 6


def test_what_cannot_be_asked_is_named(textvqa: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    images = textvqa["root"] / "train_images"
    (images / "i1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"val\.jsonl: line 2: .*i1\.png.*Or set skip_bad"):
        run(Answerer(read), tmp_path / "out", checkpoint, **textvqa)
    report = run(Answerer(read), tmp_path / "out", checkpoint, skip_bad=True, **textvqa)
    assert (report["questions"], report["accuracy"]) == (2, 50.0)
    assert report["left_out"] == {"question that could not be asked": 1}
    assert "i1.png" in next(line["error"] for line in read_lines(tmp_path / "out") if line["row"] == 2)
    (images / "i1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 pictures are missing, the first is .*i1\.png .*line 2\).*skip_bad"):
        run(Answerer(read), tmp_path / "out", checkpoint, **textvqa)
    report = run(Answerer(read), tmp_path / "out", checkpoint, skip_bad=True, **textvqa)
    assert report["left_out"] == {"picture missing": 1}


def test_a_picture_that_does_not_decode_is_named_by_its_row(
    mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = mmbench["root"] / "dev.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    rows[2][10] = base64.b64encode(b"no picture" * 10).decode()
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"dev\.tsv: row 2 \(line 3\): .*Or set skip_bad"):
        run(Answerer(choose), tmp_path / "out", checkpoint, **mmbench)
    report = run(Answerer(choose), tmp_path / "out", checkpoint, skip_bad=True, **mmbench)
    assert (report["questions"], report["left_out"]) == (3, {"question that could not be asked": 2})


def test_no_question_for_what_answers_none(mmbench: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers no questions"):
        run(object(), tmp_path / "out", checkpoint, **mmbench)


def test_prompts() -> None:
    question = BenchmarkQuestion(1, "row 1", 1, "Q?", "p", options=(("A", "x"), ("C", "z")))
    assert prompt("seedbench", question) == f"Q?\nA. x\nC. z\n{LETTER_REQUEST}"
    assert prompt("vqav2", question) == prompt("msrvtt", question) == "Q?"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "mme"}, "name"),
        ({"split": "dev"}, "split is not for textvqa"),
        ({"letters": "robust"}, "letters is not for textvqa"),
        ({"annotations": None}, "textvqa needs annotations"),
        ({"upload_questions": "x"}, "upload_questions is not for textvqa"),
        ({"boxes": "proposer"}, "give proposer, its name"),
        ({"proposer": "proposer-world"}, "give proposer, its name"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    base = {"name": "textvqa", "dataset": "d", "root": Path("r"), "file": "f", "annotations": "a"}
    with pytest.raises(ValidationError, match=sentence):
        ProtocolSettings.model_validate(base | settings)


def test_ten_recipes_that_only_evaluate(tmp_path: Path, folder: Path) -> None:
    assert " ".join(path.stem for path in RECIPES) == (
        "ai2d docvqa mmbench mmstar msrvtt msvd scienceqa seedbench textvqa vqav2"
    )
    unlimited = set()
    for path in RECIPES:
        recipe: Any = load_recipe(path)
        settings = recipe.evaluation
        assert settings.protocol.name == path.stem
        unlimited |= {path.stem} if settings.protocol.box_limit is None else set()
        with pytest.raises(RecipeError, match="evaluates by a published protocol and has nothing to train"):
            train(path, out=tmp_path / "out")
    assert unlimited == {"vqav2", "msvd", "msrvtt"}  # spec 5.1
    with pytest.raises(InputError, match="does not exist"):
        evaluate(RECIPES[0], folder, [f"evaluation.protocol.root={tmp_path / 'none'}"], out=tmp_path / "out")
    for override, sentence in (
        ("evaluation.protocol=null", "give either data or protocol"),
        ("evaluation.boxes=none", "boxes is for data; set protocol.boxes"),
        ("training.max_steps=3", "the key 'stage' is missing; add it"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(RECIPES[0], [override])


# -------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for layout in ("textvqa", "mmbench"):
        export_scenes(root / layout, layout, first_seed=9_500_000, count=2, size=96, objects=(3, 4), val_fraction=0.5)
    return root


def by_command(name: str, folder: Path, out: Path, *settings: str) -> tuple[int, dict[str, Any]]:
    arguments = ["evaluate", str(ROOT / f"recipes/mg_llava/{name}.yaml"), "--model", str(folder), "--out", str(out)]
    arguments += ["evaluation.max_new_tokens=4", *(f"evaluation.protocol.{setting}" for setting in settings)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    path = out / "evaluation.json"
    return ended.value.code or 0, json.loads(path.read_text())["metrics"] if path.exists() else {}  # type: ignore[return-value]


def test_textvqa_of_the_rendered_world(
    world: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = world / "textvqa"
    settings = [f"root={root}", "file=llava_textvqa_val_v051_ocr.jsonl", "annotations=TextVQA_0.5.1_val.json"]
    settings += ["dataset=rendered", f"boxes={root / 'val_only_box.json'}"]
    code, metrics = by_command("textvqa", folder, tmp_path / "out", *settings)
    assert code == 0
    prompts = [json.loads(line) for line in (root / settings[1].removeprefix("file=")).read_text().splitlines()]
    assert (metrics["questions"], metrics["pictures"]) == (len(prompts), 1)
    assert (metrics["box_source"], metrics["box_limit"]) == ("val_only_box.json", 100)
    assert metrics["generation"] == "greedy, at most 4 new tokens"
    table = capsys.readouterr().out
    for words in ("textvqa", "rendered", "accuracy", "results.md"):
        assert words in table
    # Each line is what the model itself says, with the boxes of the file.
    (record,) = json.loads((root / "val_only_box.json").read_text())
    predictor = foveate.load(folder, device="cpu")
    line = read_lines(tmp_path / "out")[0]
    image = root / "train_images" / record["image"]
    answer = predictor.ask(image, line["question"], boxes=record, temperature=0.0, max_new_tokens=4)
    assert (line["said"], line["finish"]) == (answer.text, answer.finish)
    assert len(answer.boxes[0]) == len(record["boxes"])


def test_mmbench_of_the_rendered_world(
    world: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = world / "mmbench"
    settings = [f"root={root}", "file=mmbench_val.tsv", "split=val", "dataset=rendered"]
    settings += ["boxes=proposer", "proposer=proposer-world", "questions=2"]
    code, metrics = by_command("mmbench", folder, tmp_path / "out", *settings)
    assert code == 0
    assert (metrics["questions"], metrics["rows"], metrics["pictures"]) == (2, 8, 1)
    assert metrics["box_source"] == "proposer proposer-world"
    assert set(metrics) >= {"accuracy_strict", "accuracy_robust", "submission"}
    code, _ = by_command("mmbench", folder, tmp_path / "wrong", f"root={root}", "file=mmbench_val.tsv", "split=test")
    assert code == 2
    assert "has no row of the split 'test'; its splits are val." in " ".join(capsys.readouterr().err.split())


def test_the_limit_of_boxes_is_the_protocols(mmbench: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    # 120 boxes beside each other with one label: the rule leaves the 20 best of a label, if there are more than 100.
    boxes = [[x, y, x + 3, y + 3] for x in range(0, 60, 4) for y in range(0, 32, 4)]
    record = {"boxes": boxes, "scores": [0.5] * 120, "labels": ["dot"] * 120}
    records = [record | {"id": index} for index in (1, 2, 3, 4)]
    (tmp_path / "boxes.json").write_text(json.dumps(records))
    predictor = foveate.load(folder, device="cpu")
    seen: list[int] = []
    prepare = predictor.processor.picture

    def count(*arguments: Any, **options: Any) -> Any:
        picture = prepare(*arguments, **options)
        seen.append(len(picture.boxes))
        return picture

    predictor.processor.picture = count
    for limit in (100, None):
        run(predictor, tmp_path / "out", folder, boxes=tmp_path / "boxes.json", box_limit=limit, questions=1, **mmbench)
    assert seen == [20, 120]
    assert predictor.model.config.box_limit == 100
