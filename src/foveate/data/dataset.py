"""What all dataset readers share: random access to typed samples that are kept small until they are asked for."""

from __future__ import annotations

import marshal
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from foveate.data.masks import segmentation_to_rle
from foveate.data.records import RecordLog
from foveate.data.samples import ImageSample, Question, RegionSample, Relation
from foveate.errors import InputError


class RegionRecord(NamedTuple):
    """A `RegionSample` in plain values; `segmentation` as in a COCO file, `relations` as (predicate, id, name)."""

    region_id: int
    box: tuple[float, float, float, float]
    captions: tuple[str, ...] = ()
    category: str | None = None
    attributes: tuple[str, ...] = ()
    negative_attributes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    relations: tuple[tuple[str, int, str], ...] = ()
    segmentation: Any = None
    score: float | None = None
    crowd: bool = False
    tag_places: tuple[int, ...] | None = None


class ImageRecord(NamedTuple):
    """An `ImageSample` in plain values; `path` from the dataset's root, `questions` as (question, answer, kind)."""

    image_id: int
    path: str
    width: int
    height: int
    regions: tuple[RegionRecord, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str, str], ...] = ()


class SampleDataset(Sequence[ImageSample]):
    """The images of one split of a dataset, by index: `len(dataset)`, `dataset[3]`, iteration.

    The annotation files are read and checked once, when the dataset is opened; images are not touched. Each image's
    annotations rest as one compact byte string (a hundred bytes a region, no Python objects), so that a dataset of
    millions of regions fits in memory and worker processes share it without copying.

    Attributes:
        root: the dataset's folder.
        split: name of the split, as the format calls it.
        skipped: broken records that were left out because of `skip_bad`, by reason.
        dropped: records that the documented rules of the format leave out, by reason.
    """

    format: str

    def __init__(self, root: Path | str, split: str, *, skip_bad: bool = False):
        self.root = Path(root)
        self.split = split
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder; give the folder that holds the {self.format} files.")
        log = RecordLog(skip_bad)
        self._records = [marshal.dumps(_plain(record)) for record in self._read(log)]
        self.skipped: Counter[str] = log.skipped
        self.dropped: Counter[str] = log.dropped
        log.report(f"{self.format} {self.root} {split}")
        if not self._records:
            raise InputError(f"{self.root}: the {self.format} split {split!r} has no usable image.")

    @abstractmethod
    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        """The images of the split with their regions, broken records told to `log`."""

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> ImageSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageSample]: ...
    def __getitem__(self, index: int | slice) -> ImageSample | list[ImageSample]:
        """The sample at `index`, counted from the end if negative; a slice gives a list.

        Raises:
            IndexError: there is no such image.
        """
        if isinstance(index, slice):
            return [self._sample(record) for record in self._records[index]]
        return self._sample(self._records[index])

    def _sample(self, record: bytes) -> ImageSample:
        image_id, path, width, height, regions, captions, questions = marshal.loads(record)
        return ImageSample(
            image_id=image_id,
            path=self.root / path,
            width=width,
            height=height,
            regions=tuple(_region(RegionRecord(*region), width, height) for region in regions),
            captions=captions,
            questions=tuple(Question(*question) for question in questions),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}, {self.split!r}): {len(self)} images"


def _plain(record: ImageRecord) -> tuple[Any, ...]:
    # marshal takes exact tuples only, not named ones.
    return (*record[:4], tuple(tuple(region) for region in record.regions), *record[5:])


def _region(record: RegionRecord, width: int, height: int) -> RegionSample:
    return RegionSample(
        region_id=record.region_id,
        box=record.box,
        captions=record.captions,
        category=record.category,
        attributes=record.attributes,
        negative_attributes=record.negative_attributes,
        tags=record.tags,
        relations=tuple(Relation(*relation) for relation in record.relations),
        mask=None if record.segmentation is None else segmentation_to_rle(record.segmentation, width, height),
        score=record.score,
        crowd=record.crowd,
        tag_places=record.tag_places,
    )
