"""Argument checks that the metrics share: arrays in, a clear `InputError` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foveate.errors import InputError


def float_array(value: Any, name: str, shape: tuple[int | None, ...] | None) -> np.ndarray:
    """`value` as a finite float64 array of `shape`, where None admits any length (or, as a whole, any shape)."""
    array = _numeric_array(value, name)
    if shape is not None:
        _check_shape(array, name, shape)
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name} holds {array[index]} at index {index}; only finite numbers can be evaluated.")
    return array


def int_array(value: Any, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """`value` as an int64 array of `shape`, where None admits any length; whole floats and bools are accepted."""
    array = _numeric_array(value, name)
    _check_shape(array, name, shape)
    as_float = array.astype(np.float64)
    if array.dtype.kind == "f" and not (np.isfinite(as_float) & (as_float == np.floor(as_float))).all():
        bad = array[~(np.isfinite(as_float) & (as_float == np.floor(as_float)))].flat[0]
        raise InputError(f"{name} holds {bad}; give whole numbers.")
    return array.astype(np.int64)


def labels_in(value: Any, name: str, shape: tuple[int | None, ...], allowed: tuple[int, ...]) -> np.ndarray:
    """An int64 array whose entries are all in `allowed`."""
    array = int_array(value, name, shape)
    bad = ~np.isin(array, allowed)
    if bad.any():
        raise InputError(f"{name} holds {array[bad].flat[0]}; allowed are {', '.join(map(str, allowed))}.")
    return array


def boxes_array(value: Any, name: str) -> np.ndarray:
    """`(N, 4)` float64 xyxy boxes; an empty sequence gives `(0, 4)`. Inverted boxes are refused, empty ones are not."""
    array = _numeric_array(value, name)
    if array.size == 0 and array.ndim == 1:
        array = array.reshape(0, 4)
    array = float_array(array, name, (None, 4))
    inverted = (array[:, 2] < array[:, 0]) | (array[:, 3] < array[:, 1])
    if inverted.any():
        index = int(np.flatnonzero(inverted)[0])
        raise InputError(
            f"{name} has the box {array[index].tolist()} at index {index}; boxes are [x1, y1, x2, y2] with "
            "x1 <= x2 and y1 <= y2 (convert xywh boxes first)."
        )
    return array


def string_sequence(value: Any, name: str) -> list[str]:
    """A list of strings; one bare string is refused because it would be read as a list of letters."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
        raise InputError(f"{name} must be a sequence of strings, not {type(value).__name__}.")
    strings = list(value)
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise InputError(f"{name} holds {string!r} at index {index}; give a string.")
    return strings


def positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} is {value!r}; give a whole number of at least 1.")
    return int(value)


def _numeric_array(value: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} is not a regular array of numbers ({error}); give rows of equal length.") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} is of type {array.dtype}, not numbers; give an array of numbers.")
    return array


def _check_shape(array: np.ndarray, name: str, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("N" if length is None else str(length) for length in shape)
        raise InputError(f"{name} has shape {array.shape}; expected ({wanted}).")
