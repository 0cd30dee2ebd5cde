"""What every method's golden check needs: a folder of reference arrays that notices what is read, and the table."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveate.errors import InputError

CONFIG = "model_config.json"
CASES = "cases"
"""Name under which the items of a JSON file that is one list are found."""


class Tracked(dict[str, Any]):
    """A dict that remembers which of its keys were read, and names the missing one."""

    def __init__(self, entries: Any = (), name: str = "object") -> None:
        super().__init__(entries)
        self.name = name
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        if key not in self:
            raise InputError(f"the golden {self.name} has no {key!r}; its layout is not the documented one.")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()


def consume(value: Any) -> Any:
    """Plain copy of a piece of JSON all of which is handed on; every key below counts as read."""
    if isinstance(value, Mapping):
        return {key: consume(item) for key, item in value.items()}
    return [consume(item) for item in value] if isinstance(value, list) else value


def _unread(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Tracked):
        for key in value:
            if key not in value.read:
                yield f"{path}{key}"
            else:
                yield from _unread(dict.__getitem__(value, key), f"{path}{key}.")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unread(item, f"{path.removesuffix('.')}[{number}].")


class GoldenFolder:
    """All files of a golden folder: .safetensors and .npz as name -> array, .json as they are.

    Raises:
        InputError: there is no such folder, nothing in it, or a file in it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give one in the layout of the golden data.")
        self.folder = folder
        self.files: dict[str, Tracked] = {}
        self.foreign: list[str] = []  # what no check knows how to read
        for path in sorted(folder.iterdir()):
            if path.suffix in (".safetensors", ".npz", ".json"):
                self.files[path.name] = Tracked(_load(path), path.name)
            elif path.suffix not in (".md", ".txt"):
                self.foreign.append(path.name)
        if not self.files:
            raise InputError(f"the folder {folder} holds no .safetensors, .npz or .json file.")

    def __contains__(self, file: str) -> bool:
        return file in self.files

    def __getitem__(self, file: str) -> Tracked:
        if file not in self.files:
            raise InputError(f"the folder {self.folder} has no {file}, which other files of it need.")
        return self.files[file]

    def weights(self) -> dict[str, Tensor]:
        """Every `sd.` array of every file under its official key."""
        state: dict[str, Tensor] = {}
        for file in self.files.values():
            for key in file:
                if key.startswith("sd."):
                    official, value = key.removeprefix("sd."), file[key]
                    if official in state and not torch.equal(state[official], value):
                        raise InputError(f"two files of {self.folder} hold different weights {official!r}.")
                    state[official] = value
        return state

    def unread(self) -> list[str]:
        """`file: array` of everything that no check read; settings are apart, see `unread_settings`."""
        unread = [f"{name}: {key}" for name, file in self.files.items() if name != CONFIG for key in _unread(file, "")]
        return [*unread, *self.foreign]

    def unread_settings(self) -> list[str]:
        return list(_unread(self.files[CONFIG], "")) if CONFIG in self.files else []


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            # Half and double arrays are compared in single precision: the model computes in it.
            return {
                key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()
            }
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=Tracked)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}.") from error
    if isinstance(value, list):
        return {CASES: value}
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object or a list.")
    return value


@dataclass
class Report:
    """The table: a row per compared array."""

    rows: list[tuple[str, str, str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(
        self, name: str, found: Any, expected: Any, *, absolute: float | None = None, relative: float | None = None
    ) -> None:
        """A row for an array of numbers; without a tolerance every number must be the same.

        The relative error is the largest absolute one over the largest expected magnitude.
        """
        ours, reference = _array(found), _array(expected)
        tolerance = _describe(absolute, relative)
        if ours.shape != reference.shape:
            self._add(name, f"shape {ours.shape}", f"not {reference.shape}", tolerance, False)
            return
        # nan stands for "undefined" and agrees with nan alone; equal infinities agree as well.
        same = (ours == reference) | (np.isnan(ours) & np.isnan(reference))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(ours - reference))
        error = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
        scale = float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0))
        share = error / scale if scale else (0.0 if error == 0 else float("inf"))
        good = error <= (absolute or 0.0) if relative is None else share <= relative
        self._add(name, f"{error:.2e}", f"{share:.2e}", tolerance, good)

    def same(self, name: str, found: Any, expected: Any) -> None:
        """A row for strings, ids and other lists, which must be equal; the errors are how many entries differ."""
        ours, reference = list(found), list(expected)
        different = sum(a != b for a, b in zip(ours, reference, strict=False)) + abs(len(ours) - len(reference))
        share = different / max(1, len(reference))
        self._add(name, f"{different} of {len(reference)}", f"{share:.2e}", "exact", different == 0)

    def fail(self, name: str, reason: str) -> None:
        """A row for a part that could not be compared at all."""
        self._add(name, "-", "-", reason, False)

    def _add(self, name: str, absolute: str, relative: str, tolerance: str, good: bool) -> None:
        self.rows.append((name, absolute, relative, tolerance, good))

    @property
    def failures(self) -> int:
        return sum(not good for *_, good in self.rows)

    def lines(self) -> list[str]:
        width = max([len(name) for name, *_ in self.rows] + [len("array")])
        table = [("array", "max abs", "max rel", "tolerance", "")]
        table += [(*row, "ok" if good else "FAIL") for *row, good in self.rows]
        return [
            f"{name:<{width}}  {absolute:>12}  {relative:>12}  {tolerance:<12}  {verdict}".rstrip()
            for name, absolute, relative, tolerance, verdict in table
        ]


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _describe(absolute: float | None, relative: float | None) -> str:
    if relative is not None:
        return f"rel {relative:.0e}"
    return "exact" if absolute is None else f"abs {absolute:.0e}"
