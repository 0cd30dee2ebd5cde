"""Reading annotation files record by record: JSON that is parsed once, values that are checked, errors that name both.

A reader calls the `get_*` functions on a record of a file and catches `BadRecord` around it; `RecordLog` turns that
into an `InputError` that names file and record, or counts it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.errors import InputError

logger = logging.getLogger(__name__)

_SEPARATOR = re.compile(r"[\s,]*")


class BadRecord(Exception):
    """A record cannot be used. `reason` is the same sentence for records with the same fault, `value` the culprit."""

    def __init__(self, reason: str, value: Any = ...):
        super().__init__(reason)
        self.reason = reason
        self.value = value

    def __str__(self) -> str:
        return self.reason if self.value is ... else f"{self.reason} ({_short(self.value)})"


class RecordLog:
    """What a reader left out: `skipped` broken records, and `dropped` ones that its documented rules leave out."""

    def __init__(self, skip_bad: bool):
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def bad(self, path: Path, record: str, error: BadRecord) -> None:
        """Counts a broken record of `path`, or raises.

        Raises:
            InputError: `skip_bad` is off. Names file, record, fault and offending value.
        """
        if not self.skip_bad:
            raise InputError(
                f"{path}: {record}: {error}; correct the file, or pass skip_bad=True to leave such records out."
            ) from error
        self.skipped[f"{path.name}: {error.reason}"] += 1

    def report(self, dataset: str) -> None:
        """One line to the log for each of `skipped` and `dropped` that is not empty."""
        for level, counts, what in (
            (logging.WARNING, self.skipped, "broken records skipped"),
            (logging.INFO, self.dropped, "records left out by the format's rules"),
        ):
            if counts:
                listed = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
                logger.log(level, "%s: %d %s (%s)", dataset, counts.total(), what, listed)


def read_text(path: Path) -> str:
    """The text of an annotation file.

    Raises:
        InputError: the file is missing, not readable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; docs/datasets.md says which files a dataset needs.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); get the file again.") from error


def read_json(path: Path, kind: type[dict] | type[list]) -> Any:
    """The content of a JSON file whose top level is an object (`dict`) or a list.

    Raises:
        InputError: the file is missing, not JSON (truncated, ...), or of another kind.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(path, error) from error
    if not isinstance(value, kind):
        raise _wrong_top_level(path, kind, value)
    return value


def iterate_json_list(path: Path) -> Iterator[Any]:
    """The items of a JSON file that is one list, one by one: the parsed form of a file of hundreds of MB is never whole
    in memory, and each item is parsed once.

    Raises:
        InputError: the file is missing, not JSON (truncated, ...), or not a list.
    """
    text = read_text(path)
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if not text.startswith("[", position):
        raise _wrong_top_level(path, list, read_json(path, object))  # type: ignore[arg-type]
    position = _skip(text, position + 1)
    while not text.startswith("]", position):
        try:
            item, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _not_json(path, error) from error
        yield item
        position = _skip(text, end)
        if not text.startswith("]", position) and text.find(",", end, position) < 0:
            raise InputError(f"{path} is not JSON: character {end} should be a comma; get or write the file again.")
    if _skip(text, position + 1) != len(text):
        raise InputError(f"{path} is not JSON: text after the end of the list; get or write the file again.")


def _skip(text: str, position: int) -> int:
    match = _SEPARATOR.match(text, position)
    return match.end() if match else position


def _not_json(path: Path, error: Exception) -> InputError:
    where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
    return InputError(f"{path} is not JSON ({where}): it is truncated or damaged; get or write the file again.")


def _wrong_top_level(path: Path, kind: type, value: Any) -> InputError:
    names = {dict: "an object", list: "a list"}
    found = names.get(type(value), type(value).__name__)
    return InputError(f"{path} holds {found} where {names[kind]} is expected; is it another version of the file?")


def get(record: Any, *keys: str) -> Any:
    """The value of the first of `keys` that the record has.

    Raises:
        BadRecord: `record` is not an object or has none of the keys.
    """
    if not isinstance(record, dict):
        raise BadRecord("is not an object", record)
    for key in keys:
        if key in record:
            return record[key]
    raise BadRecord(f'has no key "{keys[0]}"')


def get_id(record: Any, *keys: str) -> int:
    """The whole number under the first of `keys` that the record has; `BadRecord` otherwise."""
    value = get(record, *keys)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise BadRecord(f'"{keys[0]}" is not a whole number', value)
    return value


def get_size(record: Any) -> tuple[int, int]:
    """An image's (width, height) in pixels; `BadRecord` unless both are positive whole numbers."""
    width, height = get_id(record, "width"), get_id(record, "height")
    if width < 1 or height < 1:
        raise BadRecord("the image size is not positive", (width, height))
    return width, height


def get_number(record: Any, *keys: str) -> float:
    """The finite number under the first of `keys` that the record has; `BadRecord` otherwise."""
    value = get(record, *keys)
    if type(value) not in (int, float) or not abs(value) < 1e12:  # false for NaN, too
        raise BadRecord(f'"{keys[0]}" is not a finite number', value)
    return value


def get_text(record: Any, *keys: str) -> str:
    """The string under the first of `keys` that the record has; `BadRecord` otherwise."""
    value = get(record, *keys)
    if not isinstance(value, str):
        raise BadRecord(f'"{keys[0]}" is not a string', value)
    return value


def get_words(record: Any, *keys: str) -> tuple[str, ...]:
    """The list of strings under the first of `keys`, stripped, in lower case, without repeats and empty ones.

    A record without any of the keys gives (): word lists are optional in every format. None counts as an empty list.

    Raises:
        BadRecord: something else than a list of strings.
    """
    if not any(key in record for key in keys):
        return ()
    value = get(record, *keys)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise BadRecord(f'"{keys[0]}" is not a list of strings', value)
    words = (" ".join(word.lower().split()) for word in value)
    return tuple(dict.fromkeys(word for word in words if word))


def get_xywh(record: Any) -> tuple[float, float, float, float]:
    """The four finite numbers of a COCO "bbox"; `BadRecord` otherwise."""
    value = get(record, "bbox")
    if not isinstance(value, list) or len(value) != 4:
        raise BadRecord('"bbox" is not a list of four numbers', value)
    if not all(type(number) in (int, float) and math.isfinite(number) for number in value):
        raise BadRecord('"bbox" is not finite numbers', value)
    return (value[0], value[1], value[2], value[3])


def get_list(record: Any, *keys: str) -> list[Any]:
    """The list under the first of `keys` that the record has; `BadRecord` otherwise."""
    value = get(record, *keys)
    if not isinstance(value, list):
        raise BadRecord(f'"{keys[0]}" is not a list', value)
    return value


def file_name(record: Any) -> str:
    """The image file of a COCO image record, a plain name.

    Raises:
        BadRecord: missing, not a string, or with a folder in it: a file from outside must not point anywhere else.
    """
    name = get_text(record, "file_name")
    if not name or name != Path(name).name or "\\" in name or name in (".", "..") or "\0" in name:
        raise BadRecord('"file_name" is not a plain file name', name)
    return name


def name_of(record: Any, *keys: str) -> str:
    """How an error calls a record: its id if it has one."""
    if isinstance(record, dict):
        for key in keys:
            if key in record:
                return _short(record[key])
    return "without id"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
