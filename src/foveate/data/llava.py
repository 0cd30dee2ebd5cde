"""Reader of conversations about pictures in LLaVA's JSON form, with the boxes of MG-LLaVA's box files beside them.

LLaVA-1.5's mix, ALLaVA, ShareGPT4V, Video-ChatGPT and the text-only conversations of ShareGPT have this form (MG-LLaVA
spec 3.1). A sample has an image, a video, or neither.
"""

from __future__ import annotations

import marshal
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, overload

from foveate.data.records import (
    BadRecord,
    RecordLog,
    get,
    get_list,
    get_text,
    iterate_json_list,
    name_of,
    read_json,
)
from foveate.data.samples import BoxSet, ConversationSample, Message
from foveate.errors import InputError

IMAGE, VIDEO = "<image>", "<video>"
"""What stands for the picture in a text of these files."""

_SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "bing": "gpt",
    "bard": "gpt",
}
"""Who speaks, in LLaVA's files and in ShareGPT's; the prompts of "system" are not read (spec 3.3)."""


class Conversations(Sequence[ConversationSample]):
    """The conversations of one or more files, by index. The files are read and checked once, images are not touched;
    each sample rests as one compact byte string.

    Box records are joined by id, and by image where they name one. Of several records with the same id the last counts:
    in the published files they belong to one picture (spec 3.1).

    Args:
        annotations: JSON lists of `{id, image or video or neither, conversations: [{from, value}]}`. A message may have
            the extra keys `kind` and `size`, which `foveate world scenes` writes.
        images: folder that the paths of images and videos start from.
        boxes: JSON lists, or objects by id, of `{id, boxes, scores, labels}` or, of a video, `{id, frames: [{boxes,
            scores, labels}]}`. Without any, samples have no boxes; with some, every image needs a record.
        skip_bad: count broken records in `skipped` instead of raising.

    Attributes:
        skipped: broken records that were left out because of `skip_bad`, by reason.
        dropped: what the rules of the format leave out, by reason.

    Raises:
        InputError: a file is missing or damaged, a record is broken and `skip_bad` is off (names file and record), or
            no sample is left.
    """

    def __init__(
        self,
        annotations: Path | str | Sequence[Path | str],
        images: Path | str,
        boxes: Path | str | Sequence[Path | str] = (),
        *,
        skip_bad: bool = False,
    ) -> None:
        self.images = Path(images)
        files, box_files = _paths(annotations), _paths(boxes)
        if not files:
            raise InputError("no annotation file is given; give at least one JSON file of conversations.")
        log = RecordLog(skip_bad)
        known = BoxIndex(box_files, log) if box_files else None
        self._records: list[bytes] = []
        images_of: dict[str, str] = {}
        for path in files:
            for number, record in enumerate(iterate_json_list(path)):
                try:
                    plain = self._read(record, known, log)
                except BadRecord as error:
                    log.bad(path, f"sample {name_of(record, 'id')} (number {number})", error)
                    continue
                if plain is None:
                    log.dropped["conversations without an answer"] += 1
                    continue
                if plain[1] is not None and box_files and images_of.setdefault(plain[0], plain[1]) != plain[1]:
                    # Visual Genome and GQA name the same pictures by different paths, so this is no error.
                    log.dropped["nothing, but an id names several images, whose boxes are the same"] += 1
                self._records.append(marshal.dumps(plain))
        self.skipped: Counter[str] = log.skipped
        self.dropped: Counter[str] = log.dropped
        log.report(", ".join(map(str, files)))
        if not self._records:
            raise InputError(f"{', '.join(map(str, files))}: no usable conversation; is it another kind of file?")

    @staticmethod
    def _read(record: Any, known: BoxIndex | None, log: RecordLog) -> tuple[Any, ...] | None:
        """(id, image, video, messages, boxes) in plain values, or None for a conversation without an answer."""
        sample_id = record_id(record)
        image, video = (relative_path(record, key) for key in ("image", "video"))
        if image is not None and video is not None:
            raise BadRecord('has both "image" and "video"')
        messages = _messages(record, log)
        written = {
            name: sum(text.count(name) for who, text, *_ in messages if who == "human") for name in (IMAGE, VIDEO)
        }
        wanted = VIDEO if video is not None else IMAGE if image is not None else None
        if wanted is None and any(written.values()):
            raise BadRecord("has a placeholder, but no image or video", next(name for name in written if written[name]))
        if wanted is not None and sum(written.values()) != 1:
            raise BadRecord(f"needs one {wanted} in its questions", sum(written.values()))
        if wanted == IMAGE and not written[IMAGE]:
            raise BadRecord("has a placeholder of a video, but an image", VIDEO)
        if wanted == VIDEO:  # some files write <image> for a video, too
            messages = [(who, text.replace(IMAGE, VIDEO), *rest) for who, text, *rest in messages]
        first = next((place for place, message in enumerate(messages) if message[0] == "human"), len(messages))
        if not any(message[0] == "gpt" for message in messages[first:]):
            return None
        boxes: tuple[Any, ...] = ()
        picture = image if image is not None else video
        if known is not None and picture is not None:
            form, boxes = known.of(sample_id, picture)
            if (wanted == VIDEO) != (form == "frames"):
                raise BadRecord(f"its box record is not of {'a video' if wanted == VIDEO else 'an image'}", form)
        return (sample_id, image, video, tuple(messages), boxes)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> ConversationSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[ConversationSample]: ...
    def __getitem__(self, index: int | slice) -> ConversationSample | list[ConversationSample]:
        """The sample at `index`, counted from the end if negative; a slice gives a list.

        Raises:
            IndexError: there is no such sample.
        """
        if isinstance(index, slice):
            return [self._sample(record) for record in self._records[index]]
        return self._sample(self._records[index])

    def _sample(self, record: bytes) -> ConversationSample:
        sample_id, image, video, messages, boxes = marshal.loads(record)
        return ConversationSample(
            sample_id=sample_id,
            messages=tuple(Message(*message) for message in messages),
            image=None if image is None else self.images / image,
            video=None if video is None else self.images / video,
            boxes=tuple(BoxSet(*frame) for frame in boxes),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.images)!r}): {len(self)} conversations"


def _paths(given: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]


def record_id(record: Any, key: str = "id") -> str:
    """The id as a string: files of one collection hold numbers and strings (spec 3.1). `BadRecord` if it is neither."""
    value = get(record, key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadRecord(f'"{key}" is neither a string nor a whole number', value)
    return str(value)


def relative_path(record: Any, key: str) -> str | None:
    """A path below the folder of images; None where the record has none. `BadRecord` if it leads elsewhere."""
    if record.get(key) is None:
        return None
    text = get_text(record, key)
    path = PurePosixPath(text)
    # A file from outside must not point anywhere else.
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise BadRecord(f'"{key}" is not a path below the folder of images', text)
    return str(path)


def _messages(record: Any, log: RecordLog) -> list[tuple[Any, ...]]:
    """(speaker, text, kind, size) of each message."""
    messages = []
    for message in get_list(record, "conversations"):
        speaker, text = get_text(message, "from"), get_text(message, "value")
        if speaker == "system":
            log.dropped["system prompts"] += 1
            continue
        if speaker not in _SPEAKERS:
            raise BadRecord('"from" is neither human nor gpt', speaker)
        extra = (None if message.get(key) is None else get_text(message, key) for key in ("kind", "size"))
        messages.append((_SPEAKERS[speaker], text, *extra))
    if not messages:
        raise BadRecord("has no messages")
    return messages


# -------------------------------------------------------------------- boxes


def open_box_records(path: Path) -> Iterator[tuple[str, str | None, tuple[BoxSet, ...]]]:
    """(id, image or video where the record names it, boxes, one set a frame) of each record of a box file.

    Raises:
        InputError: the file is missing or damaged, or a record is broken.
    """
    log = RecordLog(False)
    for record in _box_records(path):
        try:
            sample_id, picture, (_, frames) = _box_record(record)
        except BadRecord as error:
            log.bad(path, f"box record {name_of(record, 'id')}", error)
            continue
        yield sample_id, picture, tuple(BoxSet(*frame) for frame in frames)


def _box_records(path: Path) -> Iterator[Any]:
    """The records of a list, or of an object by id."""
    try:
        with path.open(encoding="utf-8") as file:
            by_id = file.read(64).lstrip().startswith("{")
    except (OSError, UnicodeDecodeError):
        by_id = False  # said below, in one sentence
    if not by_id:
        yield from iterate_json_list(path)
        return
    for key, record in read_json(path, dict).items():
        yield {"id": key, **record} if isinstance(record, dict) else record


def _box_record(record: Any, by_stem: bool = False) -> tuple[str, str | None, tuple[str, tuple[Any, ...]]]:
    if by_stem:
        named = isinstance(record, dict) and "video" in record
        sample_id, picture = PurePosixPath(get_text(record, "video") if named else record_id(record)).stem, None
    else:
        sample_id, picture = record_id(record), relative_path(record, "image") or relative_path(record, "video")
    if "frames" in record:
        return sample_id, picture, ("frames", tuple(_box_set(frame) for frame in get_list(record, "frames")))
    return sample_id, picture, ("boxes", (_box_set(record),))


def _box_set(record: Any) -> tuple[Any, ...]:
    """(boxes, scores, labels) in plain values."""
    boxes, scores, labels = (get_list(record, key) for key in ("boxes", "scores", "labels"))
    if not len(boxes) == len(scores) == len(labels):
        raise BadRecord("has not as many scores and labels as boxes", (len(boxes), len(scores), len(labels)))
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(_finite(side) for side in box):
            raise BadRecord("a box is not four finite numbers", box)
    for score in scores:
        if not _finite(score) or not 0 <= score <= 1:
            raise BadRecord("a score is not a number from 0 to 1", score)
    for label in labels:
        if not isinstance(label, str):
            raise BadRecord("a label is not a string", label)
    return (tuple(map(tuple, boxes)), tuple(scores), tuple(labels))


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class BoxIndex:
    """The records of MG-LLaVA's box files, small until they are asked for: ("boxes" or "frames", an entry a picture) by
    id, or by id and picture where the record names it.

    Args:
        by_stem: index records of videos by the file's name without its ending, as evaluations do (spec 3.1): that of
            "video" or, without it, the id.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `log.skip_bad` is off.
    """

    def __init__(self, paths: Sequence[Path], log: RecordLog, *, by_stem: bool = False) -> None:
        self._found: dict[str | tuple[str, str], bytes] = {}
        self._pictures: dict[str, str] = {}  # of ids whose records name their picture, the last one
        for path in paths:
            for record in _box_records(path):
                try:
                    sample_id, picture, plain = _box_record(record, by_stem)
                except BadRecord as error:
                    log.bad(path, f"box record {name_of(record, 'id', 'video')}", error)
                    continue
                key = sample_id if picture is None else (sample_id, picture)
                if picture is not None:
                    self._pictures[sample_id] = picture
                if key in self._found:
                    log.dropped["box records of an id that comes again"] += 1
                self._found[key] = marshal.dumps(plain)

    def of(self, sample_id: str, picture: str | None = None) -> tuple[str, tuple[Any, ...]]:
        """The record of a sample.

        Args:
            picture: its path below the folder of images; None where it has none, such as a picture in a table.

        Raises:
            BadRecord: there is none, or only one of another picture.
        """
        named = self._pictures.get(sample_id)
        for key in ((sample_id, named if picture is None else picture), sample_id):
            if key in self._found:
                return marshal.loads(self._found[key])  # type: ignore[index]
        if named is not None:
            raise BadRecord("the box file has this id for another picture only", picture)
        raise BadRecord("has no record in the box file", sample_id if picture is None else picture)
