"""Round trip: rendered scenes -> files in the real layouts -> samples of the readers, with nothing lost."""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data import open_conversations, open_dataset
from foveate.data.ade20k import ADE20K
from foveate.data.benchmarks import ChoiceTable, QuestionLines
from foveate.data.boxes import clamp_visual_genome_box
from foveate.data.samples import ImageSample, RegionSample
from foveate.errors import InputError
from foveate.metrics.vqa import MAIN_ROWS
from foveate.vision.images import decode_rle
from foveate.world import export
from foveate.world.backgrounds import BACKGROUNDS
from foveate.world.export import export_scenes, size_name
from foveate.world.scenes import Instance, Scene, render_scene
from foveate.world.vocabulary import category_names

SEED, COUNT, SIZE, OBJECTS, VAL_FRACTION = 7, 8, (120, 96), (4, 7), 0.25
FORMATS = ("visual-genome", "refcocog", "coco")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(SEED + index, SIZE, OBJECTS) for index in range(COUNT)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for format in FORMATS:
        write(folder / format, format)
    return folder


def write(out: Path, format: str = "coco", **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "first_seed": SEED,
        "count": COUNT,
        "size": SIZE,
        "objects": OBJECTS,
        "val_fraction": VAL_FRACTION,
        "processes": 1,
    }
    return export_scenes(out, format, **arguments | changes)


def read(root: Path, format: str, splits: tuple[str, ...] = ("train", "val")) -> list[ImageSample]:
    samples: list[ImageSample] = []
    for split in splits:
        dataset = open_dataset(format, root / format, split)
        assert not dataset.skipped
        samples.extend(dataset)
    return samples


def check_image(sample: ImageSample, scene: Scene) -> None:
    assert (sample.height, sample.width) == scene.image.shape[:2]
    with Image.open(sample.path) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), scene.image)


def check_words(region: RegionSample, instance: Instance) -> None:
    assert region.category == instance.category
    assert region.attributes == instance.positive_attributes
    assert region.negative_attributes == instance.negative_attributes
    assert region.tags == instance.tags


def check_mask(region: RegionSample, instance: Instance) -> None:
    assert region.box == instance.box
    assert region.mask is not None
    np.testing.assert_array_equal(decode_rle(region.mask), instance.mask)


def test_visual_genome_round_trip(exported: Path, scenes: list[Scene]) -> None:
    samples = read(exported, "visual-genome")
    assert [sample.image_id for sample in samples] == list(range(1, COUNT + 1))
    relations = 0
    for sample, scene in zip(samples, scenes, strict=True):
        check_image(sample, scene)
        described = [index for index, instance in enumerate(scene.instances) if instance.describable]
        ids = {index: region.region_id for index, region in zip(described, sample.regions, strict=True)}
        for index, region in zip(described, sample.regions, strict=True):
            instance = scene.instances[index]
            height, width = scene.image.shape[:2]
            assert region.box == clamp_visual_genome_box(instance.box, width, height)
            assert region.captions == tuple(dict.fromkeys(instance.captions))
            check_words(region, instance)
            assert [
                (relation.predicate, relation.object_id, relation.object_name) for relation in region.relations
            ] == [
                (each.predicate, ids.get(each.object_index, -1), scene.instances[each.object_index].category)
                for each in instance.relations
            ]
            relations += len(region.relations)
        assert [(q.question, q.answer, q.kind) for q in sample.questions] == [
            (q.question, q.answer, q.kind) for q in scene.questions
        ]
    assert relations > 0


def test_ade20k_round_trip(tmp_path: Path, scenes: list[Scene]) -> None:
    root = write(tmp_path / "ade20k", "ade20k")
    splits = [ADE20K(root, split) for split in ("training", "validation")]
    assert [len(data) for data in splits] == [6, 2]
    classes = splits[0].classes
    assert classes == [*category_names(), *BACKGROUNDS]
    loaded = [data.load(index) for data in splits for index in range(len(data))]
    for (image, labels), scene in zip(loaded, scenes, strict=True):
        # The JPEG's error, that of a texture; another image would differ by far more.
        assert np.abs(np.asarray(image, float) - scene.image).mean() < 6
        expected = np.full(labels.shape, classes.index(scene.background))
        for instance in scene.instances:
            expected[instance.mask] = classes.index(instance.category)
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("last", ["val", "val_captions"])
def test_refcocog_round_trip(exported: Path, scenes: list[Scene], last: str) -> None:
    samples = {sample.image_id: sample for sample in read(exported, "refcocog", ("train", last))}
    for image_id, scene in enumerate(scenes, 1):
        described = [instance for instance in scene.instances if instance.describable]
        if not described:
            assert image_id not in samples
            continue
        sample = samples[image_id]
        check_image(sample, scene)
        for region, instance in zip(sample.regions, described, strict=True):
            assert region.captions == tuple(dict.fromkeys(instance.captions))
            check_words(region, instance)
            check_mask(region, instance)


def test_coco_round_trip(exported: Path, scenes: list[Scene]) -> None:
    samples = read(exported, "coco")
    for sample, scene in zip(samples, scenes, strict=True):
        check_image(sample, scene)
        assert sample.captions == scene.captions
        for region, instance in zip(sample.regions, scene.instances, strict=True):
            check_words(region, instance)
            check_mask(region, instance)


def test_real_key_names(exported: Path) -> None:
    def load(name: str) -> Any:
        return json.loads((exported / name).read_text(encoding="utf-8"))

    assert set(load("visual-genome/image_data.json")[0]) == {
        "image_id",
        "url",
        "width",
        "height",
        "coco_id",
        "flickr_id",
    }
    region = load("visual-genome/region_descriptions.json")[0]["regions"][0]
    assert set(region) == {"region_id", "image_id", "x", "y", "width", "height", "phrase", "object_id", "tags"}
    assert all(type(region[side]) is int for side in ("x", "y", "width", "height"))
    thing = load("visual-genome/attributes.json")[0]["attributes"][0]
    assert {"object_id", "names", "x", "y", "w", "h", "synsets", "attributes", "negative_attributes"} == set(thing)
    related = [one for image in load("visual-genome/relationships.json") for one in image["relationships"]]
    assert {"predicate", "subject", "object", "relationship_id", "synsets"} == set(related[0])
    assert load("visual-genome/densecap_splits.json") == {"train": [1, 2, 3, 4, 5, 6], "val": [7, 8], "test": []}
    entry = load("refcocog/finetune_refcocog_train.json")
    assert {"file_name", "height", "width", "id", "original_id", "caption", "dataset_name"} == set(entry["images"][0])
    assert len(entry["images"]) == len(entry["annotations"])
    annotation = load("coco/annotations/instances_val.json")["annotations"][0]
    assert {"id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"} < set(annotation)
    assert sorted(path.name for path in (exported / "coco").iterdir()) == [
        "annotations",
        "dataset.json",
        "train",
        "val",
    ]


def test_pycocotools_reads_the_export(exported: Path, scenes: list[Scene], capsys: pytest.CaptureFixture) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(exported / "coco/annotations/instances_train.json"))
    capsys.readouterr()
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    for annotation, instance in zip(annotations, scenes[0].instances, strict=True):
        np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), instance.mask)
        assert annotation["area"] == instance.mask.sum()
        assert coco.loadCats(annotation["category_id"])[0]["name"] == instance.category


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_processes_do_not_change_the_files(exported: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = write(tmp_path / "coco", processes=2, progress=lambda done, total: calls.append((done, total)))
    assert files_of(out) == files_of(exported / "coco")
    assert calls == [(done, COUNT) for done in range(1, COUNT + 1)]


def test_manifest(exported: Path) -> None:
    manifest = json.loads((exported / "visual-genome/dataset.json").read_text())
    assert manifest["version"] == 1
    assert (manifest["format"], manifest["first_seed"], manifest["count"]) == ("visual-genome", SEED, COUNT)
    assert (manifest["size"], manifest["objects"], manifest["splits"]) == ([120, 96], [4, 7], {"train": 6, "val": 2})
    assert manifest["max_phrase_words"] >= 15


@pytest.mark.parametrize("format", FORMATS)
def test_without_validation_scenes(tmp_path: Path, format: str) -> None:
    out = write(tmp_path / "new/deep", format, count=1, val_fraction=0.0)
    assert len(open_dataset(format, out, "train")) == 1
    with pytest.raises(InputError):
        open_dataset(format, out, "val")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "voc"}, "'voc'"),
        ({"format": "Visual_Genome"}, "did you mean 'visual-genome'"),
        ({"count": 0}, "count is 0"),
        ({"count": 2.0}, "count is 2.0"),
        ({"processes": 0}, "processes is 0"),
        ({"first_seed": -1}, "first_seed is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"val_fraction": "0.1"}, "val_fraction is '0.1'"),
        ({"size": 1}, ""),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as raised:
        write(tmp_path / "made/out", **changes)
    assert named in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=name):
            write(tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file/below")
    assert files_of(tmp_path) == {"full/mine": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    assert len(open_dataset("coco", write(tmp_path / "empty", count=1), "train")) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_write_leaves_nothing(tmp_path: Path, processes: int) -> None:
    """The system refuses files of more than 64 bytes: every image fails as on a full disk. Children inherit that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(InputError, match=r"out cannot be written: .*free space or choose another folder"):
            write(tmp_path / "made/out", processes=processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_interruption_leaves_nothing(tmp_path: Path, processes: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", progress=interrupt, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_the_annotations_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.json, "dump", full)
    with pytest.raises(InputError, match="No space left on device"):
        write(tmp_path / "out", count=1)
    assert list(tmp_path.iterdir()) == []


def test_a_billion_scenes_are_refused_after_the_first(tmp_path: Path) -> None:
    done: list[int] = []
    tracemalloc.start()
    with pytest.raises(InputError, match=r"1000000000 scenes need about \d+ GiB .*; ask for fewer"):
        write(tmp_path / "made/out", count=10**9, progress=lambda number, _: done.append(number))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == []
    assert peak < 50 * 2**20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["", "."])
def test_the_current_folder_is_refused_before_rendering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "render_scene", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(InputError, match="is the current folder"):
        write(Path(out))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes under /proc")
def test_render_processes_end_with_their_parent(tmp_path: Path) -> None:
    """However it ends: nothing of it runs after SIGKILL."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\nfrom pathlib import Path\nfrom foveate.world.export import export_scenes\n"
        "def kill(done, total):\n"
        "    Path('workers').write_text(' '.join(str(each.pid) for each in multiprocessing.active_children()))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    import multiprocessing\n"
        "    export_scenes(Path('out'), 'coco', count=100000, size=32, processes=2, progress=kill)\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    workers = [int(number) for number in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    for _ in range(300):
        running = [worker for worker in workers if is_running(worker)]
        if not running:
            return
        time.sleep(0.1)
    pytest.fail(f"{running} still run")


def is_running(process: int) -> bool:
    """Whether a process computes: one that nobody has waited for is no more than a number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_llava_round_trip(tmp_path: Path, scenes: list[Scene]) -> None:
    root = write(tmp_path / "llava", "llava")
    for split, own in (("train", scenes[:6]), ("val", scenes[6:])):
        data = open_conversations(root / f"{split}.json", root / "images", root / f"{split}_only_box.json")
        assert not data.skipped
        assert not data.dropped
        assert len(data) == len(own)
        for sample, scene in zip(data, own, strict=True):
            assert sample.image is not None
            with Image.open(sample.image) as image:
                np.testing.assert_array_equal(np.asarray(image.convert("RGB")), scene.image)
            asked, answers = sample.messages[::2], sample.messages[1::2]
            assert asked[0].text.startswith("<image>\n")
            said = [(m.text.removeprefix("<image>\n"), m.kind, a.text) for m, a in zip(asked, answers, strict=True)]
            assert sorted(said) == sorted((q.question, q.kind, q.answer) for q in scene.all_questions)
            assert said != sorted(said) or len(said) < 4  # the place does not tell the kind
            assert {q.question for q in scene.questions} <= {text for text, _, _ in said}
            sizes = {
                q.question: size_name(scene.instances[q.about].box, *reversed(scene.image.shape[:2]))
                for q in scene.all_questions
            }
            assert {m.text.removeprefix("<image>\n"): m.size for m in asked} == sizes
            (boxes,) = sample.boxes
            assert boxes.labels == tuple(instance.category for instance in scene.instances)
            for box, instance in zip(boxes.boxes, scene.instances, strict=True):
                outer, inner = np.array(box), np.array(instance.box)
                assert (np.abs(outer - inner) < 1).all()
                assert (outer[:2] <= inner[:2]).all()
                assert (outer[2:] >= inner[2:]).all()
        captions = open_conversations(root / f"{split}_captions.json", root / "images", root / f"{split}_only_box.json")
        for sample, scene in zip(captions, (s for s in own if s.captions), strict=True):
            texts = [message.text for message in sample.messages]
            assert texts[1] == scene.captions[0]
            assert texts[3].split("; ") == [item.captions[0] for item in scene.instances if item.captions]


def test_textvqa_round_trip(tmp_path: Path, scenes: list[Scene]) -> None:
    root = write(tmp_path / "textvqa", "textvqa")
    for split, own in (("train", scenes[:6]), ("val", scenes[6:])):
        data = QuestionLines(
            root / f"llava_textvqa_{split}_v051_ocr.jsonl",
            root / "train_images",
            annotations=root / f"TextVQA_0.5.1_{split}.json",
            boxes=[root / f"{split}_only_box.json"],
        )
        assert not data.skipped
        asked = [(number, question) for number, scene in enumerate(own) for question in scene.all_questions]
        first = own[0] is scenes[0]
        names = [f"{number + (1 if first else 7):012d}" for number, _ in asked]
        assert sorted((one.question_id, one.question, one.answers, one.category) for one in data) == sorted(
            (name, each.question, (each.answer,) * 10, each.kind) for name, (_, each) in zip(names, asked, strict=True)
        )
        for question in data:
            scene = own[int(question.question_id) - (1 if first else 7)]
            assert question.boxes[0].labels == tuple(instance.category for instance in scene.instances)
            assert question.image is not None
            assert question.image.is_file()


def test_mmbench_round_trip(tmp_path: Path, scenes: list[Scene]) -> None:
    root = write(tmp_path / "mmbench", "mmbench")
    assert not (root / "images").exists()
    by_image = {scene.image.tobytes(): scene for scene in scenes}
    seen: set[int] = set()
    for split in ("train", "val"):
        boxes = root / f"{split}_only_box.json"
        data = ChoiceTable(root / f"mmbench_{split}.tsv", split=split, boxes=[boxes])
        assert not data.skipped
        turns: dict[int, list[Any]] = {}
        for place, question in enumerate(data):
            scene = by_image[np.asarray(Image.open(io.BytesIO(data.source(place))).convert("RGB")).tobytes()]
            asked = next(each for each in scene.all_questions if each.question == question.question)
            options = dict(question.options)
            assert [letter for letter, text in options.items() if text == asked.answer] == list(question.answers)
            assert len(set(options.values())) == len(options) >= 2
            # No wrong option names something of the scene, of which it could be true.
            things = {f"{each.attributes['colour']} {each.category}" for each in scene.instances}
            wrong = [text for text in options.values() if text != asked.answer]
            assert not [text for text in wrong if any(text.endswith(thing) for thing in things)]
            assert (question.category, question.split) == (asked.kind, split)
            assert question.l2_category == size_name(scene.instances[asked.about].box, *reversed(scene.image.shape[:2]))
            assert question.boxes[0].labels == tuple(instance.category for instance in scene.instances)
            turns.setdefault(int(question.question_id) % MAIN_ROWS, []).append((question.question_id, question))
        for index, rows in turns.items():
            # Each option stands once at each letter.
            count = len(rows[0][1].options)
            assert [number for number, _ in rows] == [index + turn * MAIN_ROWS for turn in range(count)]
            assert len({row.answers for _, row in rows}) == count
            assert len({tuple(text for _, text in row.options) for _, row in rows}) == count
        seen |= set(turns)
    assert seen == set(range(len(seen)))
    assert len(seen) > 0.9 * sum(len(scene.all_questions) for scene in scenes)


def test_what_a_question_is_about(scenes: list[Scene]) -> None:
    kinds = set()
    for scene in scenes:
        for asked in scene.all_questions:
            kinds.add(asked.kind)
            item = scene.instances[asked.about]
            if asked.kind == "what":
                assert asked.answer.endswith(f"{item.attributes['colour']} {item.category}")
            elif asked.kind == "text":
                assert item.text is not None
                assert item.text.lower() == asked.answer
            else:
                assert item.category in asked.question
            if asked.kind == "count":
                others = [other for other in scene.instances if other.category == item.category]
                assert asked.answer == str(len(others))
                assert min(max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for o in others) == max(
                    item.box[2] - item.box[0], item.box[3] - item.box[1]
                )
    assert {"what", "colour", "count", "where"} <= kinds


def test_size_names_at_their_limits() -> None:
    assert size_name((0, 0, 17.9, 4), 200, 100) == "small"
    assert size_name((0, 0, 4, 18), 200, 100) == "medium"
    assert size_name((10, 10, 44, 12), 100, 200) == "large"
