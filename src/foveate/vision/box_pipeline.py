"""Tagger, then detector: the boxes of pictures that come without (MG-LLaVA spec 2.8, 4), each picture looked at once.

Boxes rest on disk under the content of their picture and the settings of the pipeline, so that a run that was killed
goes on where it was, and the same picture under another name, in another data set or in a conversation costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from foveate.checkpoints import WEIGHTS, find_checkpoint, suggestion
from foveate.data.samples import BoxSet
from foveate.errors import InputError
from foveate.files import atomic_write
from foveate.methods import find_device
from foveate.vision.detectors import THRESHOLD, Detector, load_detector
from foveate.vision.images import ImageSource, load_image
from foveate.vision.taggers import Tagger, load_tagger
from foveate.vision.video import is_video, load_video

VIDEO_FRAMES = 8
"""Frames of a video that MG-LLaVA sees (spec 3.4)."""

_VERSION = 1


@dataclass(frozen=True)
class PictureBoxes:
    """What was found in a picture, or in one frame of a video.

    Attributes:
        boxes: xyxy in whole pixels; they may overhang the picture.
        tags: what was looked for, with the tagger's scores; empty for boxes that were imported.
        source: "found" just now, "cache", or "import".
        milliseconds: its share of the time of "tagger" and "detector"; empty where neither ran.
    """

    boxes: BoxSet
    tags: Mapping[str, float] = field(default_factory=dict)
    source: str = "found"
    milliseconds: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class FoundBoxes:
    """The boxes of an image, or of the frames of a video.

    Attributes:
        frames: one, or one for each frame that was looked at.
        video: whether the source is a video.
    """

    frames: tuple[PictureBoxes, ...]
    video: bool = False

    def record(self) -> dict[str, Any]:
        """`boxes`, `scores` and `labels` as lists, or `frames` of these, as MG-LLaVA's box files have them."""
        frames = [box_lists(frame.boxes) for frame in self.frames]
        for frame in frames:
            frame["scores"] = [round(score, 6) for score in frame["scores"]]
        return {"frames": frames} if self.video else frames[0]


class BoxCache:
    """Boxes by the content of their picture, a small file each, written whole or not at all.

    Args:
        folder: is made when something is put into it.
        settings: what the boxes depend on besides the picture; boxes of other settings are other entries.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self._suffix = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, image: Image.Image) -> Path:
        """The file of a picture (upright RGB): pixels count, not file formats or names."""
        digest = hashlib.sha256(f"{image.width}x{image.height}\n".encode())
        digest.update(image.tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}-{self._suffix}.json"

    def get(self, image: Image.Image) -> PictureBoxes | None:
        """What was found in a picture with these settings, if it was looked at."""
        path = self.path(image)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != self.settings:
                return None
            boxes = BoxSet(
                tuple(tuple(box) for box in content["boxes"]), tuple(content["scores"]), tuple(content["labels"])
            )
            return PictureBoxes(boxes, dict(content["tags"]), "cache")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"{path} cannot be used ({error}), so its boxes are found anew", stacklevel=2)
            return None

    def put(self, image: Image.Image, found: PictureBoxes) -> None:
        """Keep what was found in a picture."""
        content = {
            "settings": self.settings,
            "source": found.source,
            "tags": dict(found.tags),
            **box_lists(found.boxes),
        }
        with atomic_write(self.path(image)) as file:
            json.dump(content, file, ensure_ascii=False)


class BoxPipeline:
    """Finds the boxes of pictures. As a function of one it is what the predictors take as `proposer`.

    Args:
        detector: finds what tags name.
        tagger: names the tags of a picture; None for what the detector looks for by itself.
        cache: folder of boxes found before; None to find them anew each time.

    Raises:
        InputError: there is no tagger, and the detector has to be told what to look for.
    """

    def __init__(
        self, detector: Detector, tagger: Tagger | None = None, *, cache: str | os.PathLike[str] | None = None
    ) -> None:
        if tagger is None and detector.names is None:
            raise InputError(
                "this detector finds what it is told to look for; give a tagger, or a vocabulary such as person, car, "
                "sign, or coco."
            )
        self.detector, self.tagger = detector, tagger
        self.cache = None if cache is None else BoxCache(cache, self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the boxes depend on besides the pictures, as JSON has it."""
        names = self.detector.names
        tagger = {"tagger": None, "words": list(names or ())} if self.tagger is None else dict(self.tagger.settings)
        return {"version": _VERSION, "tagger": tagger, "detector": dict(self.detector.settings)}

    def __call__(self, image: ImageSource) -> dict[str, Any]:
        """The record of one image: `boxes`, `scores` and `labels`.

        Raises:
            InputError: the image is none.
            CheckpointError: a model gives non-finite numbers.
        """
        return box_lists(self._find([load_image(image)])[0].boxes)

    def find(
        self,
        sources: Sequence[Any],
        *,
        known: Sequence[Sequence[BoxSet] | None] | None = None,
        batch_size: int = 8,
        frames: int = VIDEO_FRAMES,
        skip_bad: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[FoundBoxes | InputError]:
        """The boxes of each source, in order and as they are found.

        Args:
            sources: images (whatever `load_image` takes) and videos (files, folders of frames, `Video`).
            known: for each source boxes that are taken as they are and kept, one set a frame, or None to find them.
            batch_size: pictures that run through the models together.
            frames: of a video that are looked at, at even distances.
            skip_bad: give the error of a source that cannot be read in the place of its boxes, and go on.
            progress: called with (sources done, sources in all).

        Raises:
            InputError: a source cannot be read, or known boxes are not one set a frame.
            CheckpointError: a model gives non-finite numbers.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise InputError(f"frames must be a whole number of at least 1, not {frames!r}.")
        jobs = zip(sources, [None] * len(sources) if known is None else known, strict=True)
        done = 0
        while part := list(islice(jobs, batch_size)):
            opened = [self._open(source, own, frames, skip_bad) for source, own in part]
            good = [pictures for pictures in opened if not isinstance(pictures, InputError)]
            given = [
                own for (_, own), pictures in zip(part, opened, strict=True) if not isinstance(pictures, InputError)
            ]
            found = iter(self._find_all(good, given, batch_size))
            for (source, _), pictures in zip(part, opened, strict=True):
                yield pictures if isinstance(pictures, InputError) else FoundBoxes(next(found), is_video(source))
            done += len(part)
            if progress is not None:
                progress(done, len(sources))

    def _open(
        self, source: Any, known: Sequence[BoxSet] | None, frames: int, skip_bad: bool
    ) -> list[Image.Image] | InputError:
        try:
            listed = load_video(source, frames).frames if is_video(source) else (source,)
            if known is not None and len(known) != len(listed):
                raise InputError(f"{source} has boxes of {len(known)} pictures, but is {len(listed)}.")
            return [load_image(frame) for frame in listed]
        except InputError as error:
            if not skip_bad:
                raise
            return error

    def _find_all(
        self, sources: Sequence[list[Image.Image]], known: Sequence[Sequence[BoxSet] | None], batch_size: int
    ) -> list[tuple[PictureBoxes, ...]]:
        """The frames of all sources run together, but for those whose boxes are known."""
        found: list[PictureBoxes] = []
        pictures = [picture for own, boxes in zip(sources, known, strict=True) if boxes is None for picture in own]
        for start in range(0, len(pictures), batch_size):
            found += self._find(pictures[start : start + batch_size])
        left = iter(found)
        results = []
        for own, boxes in zip(sources, known, strict=True):
            if boxes is None:
                results.append(tuple(islice(left, len(own))))
                continue
            results.append(tuple(PictureBoxes(one, source="import") for one in boxes))
            for picture, one in zip(own, results[-1], strict=True):
                self._keep(picture, one)
        return results

    def _find(self, images: Sequence[Image.Image]) -> list[PictureBoxes]:
        found = [None if self.cache is None else self.cache.get(image) for image in images]
        new = [k for k, own in enumerate(found) if own is None]
        if new:
            pictures = [images[k] for k in new]
            started = time.perf_counter()
            if self.tagger is None:
                tags = [dict.fromkeys(self.detector.names or (), 1.0) for _ in pictures]
            else:
                tags = self.tagger(pictures)
            tagged = time.perf_counter()
            boxes = self.detector(pictures, [list(own) for own in tags])
            ended = time.perf_counter()
            share = 1000 / len(pictures)
            times = {"tagger": share * (tagged - started), "detector": share * (ended - tagged)}
            for k, named, own in zip(new, tags, boxes, strict=True):
                one = PictureBoxes(own, named if self.tagger is not None else {}, milliseconds=times)
                found[k] = one
                self._keep(images[k], one)
        return [own for own in found if own is not None]

    def _keep(self, image: Image.Image, found: PictureBoxes) -> None:
        if self.cache is not None:
            self.cache.put(image, found)


def box_lists(boxes: BoxSet) -> dict[str, Any]:
    """Plain values of a box file."""
    return {
        "boxes": [list(box) for box in boxes.boxes],
        "scores": list(boxes.scores),
        "labels": list(boxes.labels),
    }


def load_box_pipeline(
    detector: str | os.PathLike[str] = "proposer-world",
    tagger: str | os.PathLike[str] | None = None,
    *,
    vocabulary: Sequence[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    threshold: float = THRESHOLD,
    pad_value: int | None = None,
    legacy_empty_query: bool = False,
    device: str | torch.device | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> BoxPipeline:
    """The pipeline of a tagger and a detector by their names.

    Args:
        detector, labels, threshold, pad_value, legacy_empty_query: as `load_detector` takes them.
        tagger, vocabulary: as `load_tagger` takes them. A CLIP without a vocabulary chooses from what the detector
            looks for by itself.
        device: for all models; by default a GPU if there is one.
        cache: as `BoxPipeline` takes it.

    Raises:
        InputError: there is no such model, it is of another kind, or an option does not suit it.
        CheckpointError: a model is damaged or incomplete.
    """
    where = find_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finds = load_detector(
        detector,
        labels=labels,
        threshold=threshold,
        pad_value=pad_value,
        legacy_empty_query=legacy_empty_query,
        device=where,
    )
    shipped = [str(name) for name in (detector, tagger) if name is not None and find_checkpoint(name).parent == WEIGHTS]
    if shipped:
        warnings.warn(
            f"{' and '.join(shipped)} know{'s' * (len(shipped) == 1)} the rendered world only, nothing of photographs; "
            "for those, give an OWLv2 as detector and RAM++, or another CLIP, as tagger",
            stacklevel=2,
        )
    if vocabulary is not None and finds.names is not None and not set(vocabulary) & set(finds.names):
        raise InputError(
            f"{detector} knows none of the words {', '.join(vocabulary)}"
            f"{suggestion(vocabulary[0], finds.names)}; it finds {', '.join(finds.names[:8])}, ... only."
        )
    names = load_tagger(tagger, vocabulary=vocabulary, default_vocabulary=finds.names or (), device=where)
    return BoxPipeline(finds, names, cache=cache)
