"""Datasets on disk -> typed samples. `open_dataset` is the door to images with regions, `open_conversations` to
conversations about images; docs/datasets.md says which files go where."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.data.dataset import SampleDataset
    from foveate.data.llava import Conversations

# Name of a format -> module and class of its reader, imported when it is asked for.
FORMATS: dict[str, tuple[str, str]] = {
    "visual-genome": ("foveate.data.visual_genome", "VisualGenome"),
    "refcocog": ("foveate.data.refcocog", "RefCOCOg"),
    "coco": ("foveate.data.coco", "COCO"),
}
# Of conversations: `open_conversations` reads what `foveate world` writes.
CONVERSATIONS: dict[str, tuple[str, str]] = {"llava": ("foveate.data.llava", "Conversations")}
# Benchmarks of questions that `foveate world` writes, too; `foveate.data.benchmarks` has their readers and others'.
QUESTIONS: dict[str, tuple[str, str]] = {
    "textvqa": ("foveate.data.benchmarks", "QuestionLines"),
    "mmbench": ("foveate.data.benchmarks", "ChoiceTable"),
}
# Images with a class for each pixel.
PIXELS: dict[str, tuple[str, str]] = {"ade20k": ("foveate.data.ade20k", "ADE20K")}
# Formats that `foveate world` does not write: prepared training data, and benchmarks, which are for evaluation only.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "controlcap": ("foveate.data.region_file", "RegionFile"),
    "vg-captions": ("foveate.data.refcocog", "VisualGenomeCaptions"),
    "ovad": ("foveate.data.ovad", "OVAD"),
}


def check_format(format: str, formats: Mapping[str, object] = FORMATS) -> str:
    """`format` if it is one of `formats`.

    Raises:
        InputError: it is not; the message suggests the nearest name.
    """
    if isinstance(format, str) and format in formats:
        return format
    near = difflib.get_close_matches(str(format).lower().replace("_", "-"), formats, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(formats)}."
    raise InputError(f"there is no dataset format {format!r}; {hint}")


def open_dataset(format: str, root: Path | str, split: str, *, skip_bad: bool = False) -> SampleDataset:
    """Opens one split of a dataset, downloaded or exported by `foveate world scenes`.

    Args:
        format: "visual-genome", "refcocog" or "coco"; "controlcap"; or a benchmark's, "vg-captions" or "ovad".
        root: folder that holds the format's files, laid out as docs/datasets.md says.
        split: as the format calls it: "train", "val", "test", "val_captions", "val2017", ...
        skip_bad: leave broken records out, count them in the dataset's `skipped` and log one line, instead of raising.

    Returns:
        A sequence of `foveate.data.samples.ImageSample` with random access; no image is opened.

    Raises:
        InputError: unknown format or split; a file is missing or damaged; a record is broken and `skip_bad` is off.
            Names the file and the record.
    """
    if format in CONVERSATIONS:
        raise InputError(f"{format!r} holds conversations, not described regions; use foveate.data.open_conversations.")
    if format in QUESTIONS:
        reader_name = QUESTIONS[format][1]
        raise InputError(
            f"{format!r} holds questions, not described regions; use foveate.data.benchmarks.{reader_name}."
        )
    if format in PIXELS:
        module, reader_name = PIXELS[format]
        raise InputError(f"{format!r} holds classes of pixels, not described regions; use {module}.{reader_name}.")
    known = FORMATS | BENCHMARKS
    module, name = known[check_format(format, known)]
    reader: Callable[..., SampleDataset] = getattr(import_module(module), name)
    return reader(root, split, skip_bad=skip_bad)


def open_conversations(
    annotations: Path | str | Sequence[Path | str],
    images: Path | str,
    boxes: Path | str | Sequence[Path | str] = (),
    *,
    skip_bad: bool = False,
) -> Conversations:
    """Opens conversations in LLaVA's JSON form, downloaded or exported by `foveate world scenes --format llava`.

    Args, attributes and errors as `foveate.data.llava.Conversations`.
    """
    from foveate.data.llava import Conversations

    return Conversations(annotations, images, boxes, skip_bad=skip_bad)
