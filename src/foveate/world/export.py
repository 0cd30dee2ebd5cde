"""Rendered scenes as datasets on disk, in the layouts of Visual Genome, RefCOCOg, COCO, LLaVA, TextVQA, MMBench
and ADE20K.

The files have the key names of the real releases, so that the readers in `foveate.data` (and other people's) read both
with no special case. What the real formats have no place for stands in optional extra keys: `object_id` and `tags` of a
region description, `attributes`, `negative_attributes` and `tags` of annotations. docs/datasets.md shows the layouts.
"""

from __future__ import annotations

import base64
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.data import CONVERSATIONS, FORMATS, PIXELS, QUESTIONS, check_format
from foveate.data.ade20k import NAMES
from foveate.data.boxes import xyxy_to_xywh
from foveate.data.tables import LONGEST_REFERENCE
from foveate.data.visual_genome import MAX_PHRASE_WORDS
from foveate.errors import InputError
from foveate.files import atomic_folder
from foveate.metrics.vqa import MAIN_ROWS
from foveate.vision.images import decode_rle, encode_rle
from foveate.world.backgrounds import BACKGROUNDS
from foveate.world.scenes import Scene, render_scene
from foveate.world.vocabulary import category_names, colour_names, raw_vocabulary

MANIFEST = "dataset.json"
MANIFEST_VERSION = 1
OPTIONS = ("A", "B", "C", "D")

Size = int | tuple[int, int]


@dataclass(frozen=True)
class _Described:
    """What the files need of an instance, small enough to cross a process border."""

    category: str
    box: tuple[float, float, float, float]
    rle: dict[str, Any]
    area: int
    attributes: list[str]
    negative_attributes: list[str]
    tags: list[str]
    captions: list[str]
    relations: list[tuple[str, int]]


@dataclass(frozen=True)
class _Exported:
    """A scene whose image is on the disk. `image_id` counts from 1 in the order of the seeds."""

    image_id: int
    file: str
    width: int
    height: int
    background: str
    instances: list[_Described]
    captions: list[str]
    questions: list[tuple[str, str, str]]
    conversation: list[tuple[str, str, str, str]]  # every question in a random order: text, answer, kind, size


def export_scenes(
    out: Path,
    format: str,
    *,
    first_seed: int = 0,
    count: int = 100,
    size: Size = 256,
    objects: tuple[int, int] = (4, 8),
    val_fraction: float = 0.1,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Renders scenes and writes them as a dataset that `foveate.data.open_dataset(format, out, split)` reads.

    The folder appears whole or not at all. The splits are "train" and "val" (the last scenes); RefCOCOg has
    "val_captions", too, and Visual Genome an empty "test". The same arguments write the same files. Of "llava",
    `foveate.data.open_conversations` reads SPLIT.json (questions) and SPLIT_captions.json, with SPLIT_only_box.json.
    "textvqa" and "mmbench" are what the protocols of these names read, with SPLIT_only_box.json, too. "ade20k" is what
    `foveate.data.ade20k.ADE20K` reads, with the splits "training" and "validation": the classes of pixels are the
    categories and, around the objects, the kinds of background.

    Args:
        out: folder to write; must not exist or be empty.
        format: "visual-genome", "refcocog", "coco", "llava", "textvqa", "mmbench" or "ade20k".
        first_seed: seed of the first scene; the others follow by one.
        count: number of scenes, at least 1.
        size: image side, or (width, height), in pixels.
        objects: least and most objects in a scene.
        val_fraction: share of the scenes for "val", in [0, 1), rounded to whole scenes.
        processes: renderers at work at the same time.
        progress: called with (scenes done, count) after each scene.

    Returns:
        `out`.

    Raises:
        InputError: an argument is out of range, `out` is a file or a non-empty folder, the disk has no room for so many
            scenes, or `out` cannot be written (disk full, no permission). Nothing is left behind.
    """
    check_format(format, FORMATS | CONVERSATIONS | QUESTIONS | PIXELS)
    _check_whole("count", count, 1)
    _check_whole("processes", processes, 1)
    _check_whole("first_seed", first_seed, 0)
    if not isinstance(val_fraction, (int, float)) or not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction!r}; it must be a number in [0, 1).")
    out = Path(out)
    val_count = round(count * val_fraction)
    made = [folder for folder in Path(os.path.realpath(out)).parents if not folder.exists()]
    try:
        with atomic_folder(out) as folder:
            render = partial(
                _render, folder=folder / _IMAGES[format][0], name=_IMAGES[format][1], size=size, objects=objects
            )
            (folder / _IMAGES[format][0]).mkdir(parents=True)
            scenes: list[_Exported] = []
            # Closed before the folder is removed on a failure: no renderer may still write into it then.
            with closing(_run(render, first_seed, count, processes)) as rendered:
                for scene in rendered:
                    if not scenes:
                        _check_room(folder, (folder / _IMAGES[format][0] / scene.file).stat().st_size, count, out)
                    scenes.append(scene)
                    if progress is not None:
                        progress(len(scenes), count)
            extra = _WRITERS[format](folder, scenes[: count - val_count], scenes[count - val_count :])
            manifest = {
                "version": MANIFEST_VERSION,
                "format": format,
                "source": "foveate.world.scenes",
                "first_seed": first_seed,
                "count": count,
                "size": size,
                "objects": objects,
                "val_fraction": val_fraction,
                "splits": {"train": count - val_count, "val": val_count},
            }
            _write_json(folder / MANIFEST, manifest | extra, indent=2)
    except BaseException as error:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"{out} cannot be written: {error.strerror or error}; free space or choose another folder."
            ) from error
        raise
    return out


def _check_whole(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} on.")


def _check_room(folder: Path, size: int, count: int, out: Path) -> None:
    """Refuses what the disk cannot hold: that is known after the first image, not after hours."""
    free = shutil.disk_usage(folder).free
    # Images differ in size, but hardly any two of them by more than half.
    if count * size / 2 > free:
        raise InputError(
            f"{count} scenes need about {count * size / 2**30:.0f} GiB (count times the first image), but {out} has "
            f"{free / 2**30:.1f} GiB free; ask for fewer, or choose another folder."
        )


def _run(
    render: Callable[[int, int], _Exported], first_seed: int, count: int, processes: int
) -> Generator[_Exported, None, None]:
    # Made one by one: a list of a billion would fill the memory before the first scene.
    tasks = ((first_seed + index, index + 1) for index in range(count))
    processes = min(processes, count)
    if processes == 1:
        yield from starmap(render, tasks)
        return
    # Not by fork: the caller may run threads (torch), whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_follow_the_parent) as pool:
        try:
            # As many at a time as keep the processes busy while the first of them is waited for.
            with _without_interruption():
                ahead = deque(pool.submit(render, *task) for task in islice(tasks, 4 * processes))
            while ahead:
                yield ahead.popleft().result()
                with _without_interruption():
                    ahead.extend(pool.submit(render, *task) for task in islice(tasks, 1))
        except BrokenProcessPool as error:
            raise InputError(
                "a render process ended early: it was killed (out of memory?), or the calling script lacks "
                f'`if __name__ == "__main__":`; ask for 1 process instead of {processes}.'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interruption() -> Generator[None, None, None]:
    """Ctrl-C waits, and for processes that start here forever: it is this one's to answer, even while they import."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_the_parent() -> None:
    """In a render process: ends with the one that started it, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _render(seed: int, image_id: int, *, folder: Path, name: str, size: Size, objects: tuple[int, int]) -> _Exported:
    scene = render_scene(seed, size, objects)
    file = name.format(image_id)
    # The lowest zlib effort: it halves the time of an export, and textures hardly compress any further. `quality` is of
    # ADE20K's JPEG files.
    Image.fromarray(scene.image).save(folder / file, compress_level=1, quality=95)
    return _describe(scene, image_id, file)


def _describe(scene: Scene, image_id: int, file: str) -> _Exported:
    height, width = scene.image.shape[:2]
    instances = [
        _Described(
            category=instance.category,
            box=_plain_box(instance.box),
            rle=encode_rle(instance.mask),
            area=int(instance.mask.sum()),
            attributes=list(instance.positive_attributes),
            negative_attributes=list(instance.negative_attributes),
            tags=list(instance.tags),
            captions=list(instance.captions) if instance.describable else [],
            relations=[(relation.predicate, relation.object_index) for relation in instance.relations],
        )
        for instance in scene.instances
    ]
    questions = [(question.question, question.answer, question.kind) for question in scene.questions]
    conversation = [
        (asked.question, asked.answer, asked.kind, size_name(instances[asked.about].box, width, height))
        for asked in scene.all_questions
    ]
    random.Random(scene.seed).shuffle(conversation)  # else the place in a conversation would tell the kind
    return _Exported(
        image_id, file, width, height, scene.background, instances, list(scene.captions), questions, conversation
    )


def size_name(box: Iterable[float], width: int, height: int) -> str:
    """ "small", "medium" or "large": the longer side of what is seen of an object / the shorter side of the image, with
    the limits in the middle of the gaps between the world's classes of sizes (0.18 and 0.34)."""
    x1, y1, x2, y2 = box
    share = max(x2 - x1, y2 - y1) / min(width, height)
    return "small" if share < 0.18 else "medium" if share < 0.34 else "large"


def _plain_box(box: Iterable[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(side) for side in box)
    return (x1, y1, x2, y2)


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def _write_visual_genome(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    image_data, regions, objects, attributes, relationships, questions = ([] for _ in range(6))
    region_id = relationship_id = question_id = 0
    first_object = 1
    longest = 0
    for scene in (*train, *val):
        key = {"image_id": scene.image_id}
        image_data.append(
            key
            | {
                "width": scene.width,
                "height": scene.height,
                "coco_id": None,
                "flickr_id": None,
                "url": f"VG_100K/{scene.file}",
            }
        )
        described = [_visual_genome_object(first_object + i, each) for i, each in enumerate(scene.instances)]
        objects.append(key | {"objects": described})
        attributes.append(
            key
            | {
                "attributes": [
                    one | {"attributes": each.attributes, "negative_attributes": each.negative_attributes}
                    for one, each in zip(described, scene.instances, strict=True)
                ]
            }
        )
        phrases, related = [], []
        for one, instance in zip(described, scene.instances, strict=True):
            for caption in instance.captions:
                region_id += 1
                longest = max(longest, len(caption.split()))
                phrases.append(
                    {
                        "region_id": region_id,
                        **key,
                        **{"x": one["x"], "y": one["y"], "width": one["w"], "height": one["h"]},
                        "phrase": caption,
                        "object_id": one["object_id"],
                        "tags": instance.tags,
                    }
                )
            for predicate, index in instance.relations:
                relationship_id += 1
                related.append(
                    {
                        "relationship_id": relationship_id,
                        "predicate": predicate,
                        "synsets": [],
                        "subject": _with_name(one),
                        "object": _with_name(described[index]),
                    }
                )
        regions.append({"id": scene.image_id, "regions": phrases})
        relationships.append(key | {"relationships": related})
        asked = []
        for question, answer, kind in scene.questions:
            question_id += 1
            asked.append({"qa_id": question_id, **key, "question": question, "answer": answer, "kind": kind})
        questions.append({"id": scene.image_id, "qas": asked})
        first_object += len(scene.instances)
    for name, content in (
        ("image_data", image_data),
        ("region_descriptions", regions),
        ("objects", objects),
        ("attributes", attributes),
        ("relationships", relationships),
        ("question_answers", questions),
    ):
        _write_json(folder / f"{name}.json", content)
    splits = {"train": [scene.image_id for scene in train], "val": [scene.image_id for scene in val], "test": []}
    _write_json(folder / "densecap_splits.json", splits)
    # The reader's limit comes from people's phrases; a rendered caption may name every attribute and a relation.
    return {"max_phrase_words": max(MAX_PHRASE_WORDS, longest)}


def _visual_genome_object(object_id: int, instance: _Described) -> dict[str, Any]:
    # Visual Genome's boxes are whole pixels: the smallest such box around the instance.
    x1, y1 = math.floor(instance.box[0]), math.floor(instance.box[1])
    x2, y2 = math.ceil(instance.box[2]), math.ceil(instance.box[3])
    sides = {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}
    return {"object_id": object_id, **sides, "names": [instance.category], "synsets": []}


def _with_name(visual_genome_object: dict[str, Any]) -> dict[str, Any]:
    other = {key: value for key, value in visual_genome_object.items() if key != "names"}
    return other | {"name": visual_genome_object["names"][0]}


def _write_refcocog(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    categories = _categories()
    first_object = 1
    for split, scenes in (("train", train), ("val", val)):
        if scenes:
            single, first = _refcocog_entries(scenes, categories, first_object, one_caption=True)
            _write_json(folder / f"finetune_refcocog_{split}.json", single)
            if split == "val":
                grouped, _ = _refcocog_entries(scenes, categories, first_object, one_caption=False)
                _write_json(folder / "finetune_refcocog_val_captions.json", grouped)
            first_object = first
    return {}


def _refcocog_entries(
    scenes: list[_Exported], categories: dict[str, int], first_object: int, *, one_caption: bool
) -> tuple[dict[str, Any], int]:
    """MDETR's form, an entry an expression (`one_caption`), or GLaMM's, an entry a region; and the next object id."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for instance in scene.instances:
            for group in [[caption] for caption in instance.captions] if one_caption else [instance.captions]:
                if not group:
                    continue
                entry = len(images)
                images.append(
                    {
                        "file_name": scene.file,
                        "height": scene.height,
                        "width": scene.width,
                        "id": entry,
                        "original_id": scene.image_id,
                        "caption": group[0],
                        "dataset_name": "refcocog",
                    }
                )
                for caption in group:
                    annotation = _annotation(instance, categories, len(annotations), entry)
                    annotation["original_id"] = first_object
                    annotation["tokens_positive"] = [[0, len(caption)]]
                    annotations.append(annotation if one_caption else annotation | {"caption": caption})
            first_object += 1
    content = {
        "info": [],
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": _category_list(categories),
    }
    return content, first_object


def _write_coco(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    categories = _categories()
    annotation_id = caption_id = 0
    for split, scenes in (("train", train), ("val", val)):
        if not scenes:
            continue
        images, annotations, captions = [], [], []
        (folder / split).mkdir()
        for scene in scenes:
            os.rename(folder / _IMAGES["coco"][0] / scene.file, folder / split / scene.file)  # noqa: PTH104
            images.append(
                {
                    "id": scene.image_id,
                    "file_name": scene.file,
                    "width": scene.width,
                    "height": scene.height,
                    "license": 0,
                }
            )
            for instance in scene.instances:
                annotation_id += 1
                annotations.append(_annotation(instance, categories, annotation_id, scene.image_id))
            for caption in scene.captions:
                caption_id += 1
                captions.append({"image_id": scene.image_id, "id": caption_id, "caption": caption})
        common = {"info": {"description": "rendered by foveate.world"}, "licenses": [], "images": images}
        instances = common | {"annotations": annotations, "categories": _category_list(categories)}
        _write_json(folder / "annotations" / f"instances_{split}.json", instances)
        _write_json(folder / "annotations" / f"captions_{split}.json", common | {"annotations": captions})
    (folder / _IMAGES["coco"][0]).rmdir()
    return {}


def _write_llava(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    """Questions, captions to learn to see by, and the objects' boxes in the layout of MG-LLaVA's box files."""
    for split, scenes in (("train", train), ("val", val)):
        asked, described, boxes = [], [], []
        for scene in scenes:
            key = {"id": f"{scene.image_id:012d}", "image": scene.file}
            if scene.conversation:
                asked.append(key | {"conversations": _turns(scene.conversation)})
            objects = [instance.captions[0] for instance in scene.instances if instance.captions]
            captions = [
                (request, answer, None, None)
                for request, answer in (
                    ("describe the picture briefly.", next(iter(scene.captions), "")),
                    ("describe the objects in the picture.", "; ".join(objects)),
                )
                if answer
            ]
            if captions:
                described.append(key | {"conversations": _turns(captions)})
            boxes.append(key | _found(scene))
        if scenes:
            for name, content in (("", asked), ("_captions", described), ("_only_box", boxes)):
                _write_json(folder / f"{split}{name}.json", content)
    return {}


def _found(scene: _Exported) -> dict[str, Any]:
    """The objects in the layout of MG-LLaVA's box files, in whole pixels of the smallest such boxes around them."""
    corners = [instance.box for instance in scene.instances]
    return {
        "boxes": [[math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)] for x1, y1, x2, y2 in corners],
        "scores": [1.0] * len(corners),
        "labels": [instance.category for instance in scene.instances],
    }


def _turns(pairs: Iterable[tuple[str, str, str | None, str | None]]) -> list[dict[str, Any]]:
    """Questions and answers as LLaVA's messages; `kind` and `size` of a question are extra keys."""
    messages = []
    for question, answer, kind, size in pairs:
        extra = {"kind": kind, "size": size} if kind is not None else {}
        messages.append({"from": "human", "value": question, **extra})
        messages.append({"from": "gpt", "value": answer})
    messages[0]["value"] = f"<image>\n{messages[0]['value']}"
    return messages


def _write_textvqa(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    """LLaVA's prompts, TextVQA's annotations and the objects' boxes. A prompt is the bare question: what a sign says is
    to be read, not taken from OCR tokens. Ten people all give the one right answer."""
    for split, scenes in (("train", train), ("val", val)):
        prompts, annotations, boxes = [], [], []
        for scene in scenes:
            name = Path(scene.file).stem
            boxes.append({"id": name, "image": scene.file, **_found(scene)})
            for question, answer, kind, size in scene.conversation:
                prompts.append({"question_id": name, "image": scene.file, "text": question, "category": kind})
                annotations.append(
                    {
                        "question": question,
                        "image_id": name,
                        "image_width": scene.width,
                        "image_height": scene.height,
                        "answers": [answer] * 10,
                        "question_id": len(annotations),
                        "set_name": split,
                        "kind": kind,
                        "size": size,
                    }
                )
        if scenes:
            _write_lines(folder / f"llava_textvqa_{split}_v051_ocr.jsonl", map(json.dumps, prompts))
            _write_json(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": annotations})
            _write_json(folder / f"{split}_only_box.json", boxes)
    return {}


def _write_mmbench(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    """A circular table: each question once for every turn of its options. A picture stands in the first row that asks
    about it, in base64, and the other rows name that row; category is the kind of question, l2-category the size of
    what it is about."""
    pools = _answer_pools((*train, *val))
    images = folder / _IMAGES["mmbench"][0]
    columns = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "source", "l2-category", "comment")
    index = 0
    for split, scenes in (("train", train), ("val", val)):
        boxes: list[dict[str, Any]] = []
        rows: list[str] = ["\t".join((*columns, "split"))]
        turned: list[str] = []
        for scene in scenes:
            picture = base64.b64encode((images / scene.file).read_bytes()).decode("ascii")
            for question, answer, kind, size in scene.conversation:
                options = _options(scene, answer, pools[kind], random.Random(f"{scene.image_id} {question}"))
                if len(options) < 2:
                    continue
                for turn in range(len(options)):
                    own = dict(zip(OPTIONS, options[turn:] + options[:turn], strict=False))
                    letter = next(name for name, text in own.items() if text == answer)
                    cells = [str(index + turn * MAIN_ROWS), question, "", *(own.get(name, "") for name in OPTIONS)]
                    cells += [letter, kind, picture, "foveate.world", size, "", split]
                    (turned if turn else rows).append("\t".join(cells))
                    picture = picture if len(picture) <= LONGEST_REFERENCE else str(index)
                boxes.append({"id": index, **_found(scene)})
                index += 1
        if index > MAIN_ROWS:
            raise InputError(f"MMBench's layout holds {MAIN_ROWS} questions and the scenes have more; ask for fewer.")
        if scenes:
            _write_lines(folder / f"mmbench_{split}.tsv", (*rows, *turned))
            _write_json(folder / f"{split}_only_box.json", boxes)
    shutil.rmtree(images)
    return {}


def pixel_classes() -> list[str]:
    """Names of the classes of pixels: categories, then kinds of background."""
    return [*category_names(), *BACKGROUNDS]


def _write_ade20k(folder: Path, train: list[_Exported], val: list[_Exported]) -> dict[str, Any]:
    """A PNG of classes for each image, from 1 on: that of the object whose pixel it is, else that of the background."""
    numbers = {name: number for number, name in enumerate(pixel_classes(), 1)}
    unsorted = folder / _IMAGES["ade20k"][0]
    for split, short, scenes in (("training", "train", train), ("validation", "val", val)):
        images, annotations = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for scene in scenes:
            name = f"ADE_{short}_{scene.image_id:08d}"
            (unsorted / scene.file).rename(images / f"{name}.jpg")
            classes = np.full((scene.height, scene.width), numbers[scene.background], np.uint8)
            for instance in scene.instances:
                classes[decode_rle(instance.rle)] = numbers[instance.category]
            Image.fromarray(classes).save(annotations / f"{name}.png")
    unsorted.rmdir()
    seen = Counter(instance.category for scene in train for instance in scene.instances)
    seen.update(scene.background for scene in train)
    heading = "Idx\tTrain\tStuff\tName"
    rows = [f"{number}\t{seen[name]}\t{int(name in BACKGROUNDS)}\t{name}" for name, number in numbers.items()]
    _write_lines(folder / NAMES, (heading, *rows))
    return {}


def _answer_pools(scenes: Iterable[_Exported]) -> dict[str, list[str]]:
    """What may be offered beside the right answer, by the kind of question."""
    pools: dict[str, set[str]] = {
        "colour": set(colour_names()),
        "count": {str(number) for number in range(1, 7)},
        "text": {word.lower() for word in raw_vocabulary()["sign_words"]},
    }
    for scene in scenes:
        for _, answer, kind, _ in scene.conversation:
            pools.setdefault(kind, set()).add(answer)
    return {kind: sorted(pool) for kind, pool in pools.items()}


def _options(scene: _Exported, answer: str, pool: Sequence[str], draw: random.Random) -> list[str]:
    """The right answer among up to three wrong ones, in any order. What names an object of the scene may hold of it as
    well, so that it is offered only where it is the answer."""
    things = {f"{colour} {each.category}" for each in scene.instances for colour in each.attributes[:1]}
    wrong = [other for other in pool if other != answer and not any(other.endswith(thing) for thing in things)]
    options = [answer, *draw.sample(wrong, min(len(OPTIONS) - 1, len(wrong)))]
    draw.shuffle(options)
    return options


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _annotation(instance: _Described, categories: dict[str, int], annotation_id: int, image_id: int) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": categories[instance.category],
        "iscrowd": 0,
        "area": instance.area,
        "bbox": list(xyxy_to_xywh(instance.box)),
        "segmentation": instance.rle,
        "attributes": instance.attributes,
        "negative_attributes": instance.negative_attributes,
        "tags": instance.tags,
    }


def _categories() -> dict[str, int]:
    """Category -> id, the same in every export."""
    return {name: index for index, name in enumerate(category_names(), 1)}


def _category_list(categories: dict[str, int]) -> list[dict[str, Any]]:
    return [{"supercategory": name, "id": number, "name": name} for name, number in categories.items()]


# Folder and file name of the images. COCO and ADE20K sort them into their splits' folders when all are rendered.
_IMAGES = {
    "visual-genome": ("VG_100K", "{}.png"),
    "refcocog": ("train2014", "COCO_train2014_{:012d}.png"),
    "coco": ("unsorted", "{:012d}.png"),
    "llava": ("images", "{:012d}.png"),
    "textvqa": ("train_images", "{:012d}.png"),
    "mmbench": ("images", "{:012d}.png"),
    "ade20k": ("unsorted", "{:08d}.jpg"),
}
_WRITERS = {
    "visual-genome": _write_visual_genome,
    "refcocog": _write_refcocog,
    "coco": _write_coco,
    "llava": _write_llava,
    "textvqa": _write_textvqa,
    "mmbench": _write_mmbench,
    "ade20k": _write_ade20k,
}
