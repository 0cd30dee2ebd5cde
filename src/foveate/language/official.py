"""Other people's checkpoint files in, ours out: what the conversion of every method needs.

Of a pickled file only tensors are read, and nothing in it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_write
from foveate.language.pretrained import first_line


class _Inert:
    """What stands in the place of every object that is no tensor: it takes whatever is done to it and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _TensorsOnly(pickle.Unpickler):
    """An unpickler that knows how tensors are put together, and makes `_Inert` objects of all else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("collections", "OrderedDict"),
            ("torch", "Size"),
        ):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        return _Inert


def read_tensors(
    path: str | os.PathLike[str], *, entries: Sequence[str] = ("model",), skip_objects: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`. Only tensors are read, and no code in it runs.

    Args:
        path: the file; it is mapped, so that tensors stay on the disk until they are used.
        entries: names that the file may have its tensors under, the first of them that it has; otherwise it is itself
            the mapping.
        skip_objects: pass over objects of other classes (a trainer's settings, ...) beside the tensors, where otherwise
            they are refused.

    Raises:
        InputError: there is no such file.
        CheckpointError: it is damaged, no PyTorch file, or holds something else than named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the downloaded checkpoint.")
    with path.open("rb"):  # what the operating system refuses is not damage
        pass
    try:
        with warnings.catch_warnings(action="ignore"):
            # A file of the old format cannot be mapped; the tensors of a new one stay on the disk until they are used.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if skip_objects and zipfile.is_zipfile(path):
            content = _load_around_objects(path)
        else:
            _refuse_objects(path, error)
    except Exception as error:  # zip, pickle and torch each raise their own
        raise CheckpointError(
            f"{path} is damaged, truncated or not a PyTorch file ({first_line(error)}); copy or download it again."
        ) from None
    if isinstance(content, dict):
        content = next((content[name] for name in entries if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        kind = "nothing" if content == {} else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {kind} instead of named tensors; give the downloaded checkpoint.")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are not named tensors ({', '.join(others[:10])}); give the "
            "downloaded checkpoint."
        )
    return {key: value.detach() for key, value in content.items()}


def _load_around_objects(path: Path) -> Any:
    """What a file holds, with inert objects in the place of all that is no tensor."""
    reader: Any = SimpleNamespace(Unpickler=_TensorsOnly, __name__="tensors_only")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or of another layout ({first_line(error)}); copy or download it again."
        ) from None


def _refuse_objects(path: Path, error: Exception) -> NoReturn:
    found = re.search(r"GLOBAL\s+([\w.]+)", str(error))
    what = f" ({found.group(1)})" if found else ""
    raise CheckpointError(
        f"{path} holds more than tensors and plain values{what}, so it was not opened, for code in it could run; "
        "get the file from its authors, or save the tensors of one that you trust alone."
    ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint folder, one or those of its index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read ({first_line(error)}); copy the checkpoint again.") from None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} has no weight_map of file names; copy the checkpoint again.")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / "model.safetensors"]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; copy or download the checkpoint again.")
    return files


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, mapped: each stays on the disk until it is used.

    Raises:
        CheckpointError: a file is missing, damaged or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated ({first_line(error)}); copy or download it again."
            ) from None
    return tensors


def refuse(what: str, problems: Mapping[str, Sequence[str]], advice: str) -> None:
    """One error that lists everything, if there is anything.

    Args:
        what: the sentence's beginning; `problems`: kind -> names; `advice`: its end.

    Raises:
        CheckpointError: a kind has names.
    """
    listed = []
    for kind, keys in problems.items():
        if keys := sorted(set(keys)):
            listed.append(f"{len(keys)} {kind} ({', '.join(keys)})")
    if listed:
        raise CheckpointError(f"{what}: {'; '.join(listed)}; {advice}.")


def files_of(source: Path) -> list[Path]:
    """The files that a checkpoint consists of: itself, or those of a folder."""
    if source.is_file():
        return [source]
    names = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
    return sorted({file for pattern in names for file in source.glob(pattern)})


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def write_safetensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    advance: Callable[[], None],
) -> None:
    """safetensors as transformers reads them; one shard at a time is in memory.

    Args:
        dtype: of all weights; None keeps that of each tensor.
        max_shard_size: weights beyond it are split into several files.
        advance: called for each tensor that has been written.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * (dtype or tensor.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        shard = {key: tensors[key].to(dtype or tensors[key].dtype).contiguous() for key in keys}
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, in its words
            raise OSError(f"cannot write {name}: {first_line(error)}") from error
        for _ in keys:
            advance()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
