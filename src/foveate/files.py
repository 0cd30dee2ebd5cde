"""Files that appear whole or not at all.

Everything that foveate writes goes through `atomic_write` or `atomic_folder`: the content is written under a temporary
name next to its destination (so that the rename stays on one file system), flushed to the disk, and renamed. A full
disk, a kill or an exception leaves the old content of the destination, never half of the new one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, overload

from foveate.errors import InputError


@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["w"] = "w") -> AbstractContextManager[IO[str]]: ...
@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> AbstractContextManager[IO[Any]]:
    """Context manager that gives a file object whose content becomes `path` when the block ends without an exception.

    Parent folders are made. Text is UTF-8 with "\\n" line ends on every platform.

    Args:
        path: the destination; an existing file is replaced, a folder is refused.
        mode: "w" for text, "wb" for bytes.

    Raises:
        InputError: `path` is an existing folder.
        OSError: the disk is full, the folder is not writable, ...; nothing partial is left behind.

    Example:
        >>> with atomic_write("regions.json") as file:
        ...     file.write("[]")
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'atomic_write takes mode "w" or "wb", not {mode!r}.')
    return _atomic_write(Path(path), mode)


@contextmanager
def _atomic_write(path: Path, mode: str) -> Iterator[IO[Any]]:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with partial.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: the destination. It must not exist, or be an empty folder, unless `overwrite` is set.
        overwrite: replace an existing folder. The old one stays complete until the new one is.

    Raises:
        InputError: `path` is a file, or a non-empty folder and `overwrite` is not set.
        OSError: the disk is full, the folder is not writable, ...; nothing partial is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give the name of a folder to write.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{path} already exists and is not empty; choose another folder or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(path)
    try:
        partial.mkdir()
        yield partial
        for item in partial.rglob("*"):
            if item.is_file():
                _sync_file(item)
        _swap_in(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(path.parent)


class ResumableLines:
    """A text file of lines that appears whole, and whose finished lines outlive an interruption.

    Lines go to `partial`, a file beside the destination; it is renamed when the `with` block ends without an
    exception. Otherwise its complete lines stay for a later run with `resume=True`, and an empty one is removed.

    Args:
        path: the destination.
        key: what the lines depend on (inputs and settings); a run only resumes one that had the same key.
        resume: continue the partial file of an interrupted run with the same key. Without it, one is started anew.

    Attributes:
        finished: the lines that an interrupted run left, without line ends.

    Raises:
        InputError: `path` is a folder, or there is nothing to resume.
        OSError: the disk is full, the folder is not writable, ...
    """

    def __init__(self, path: str | os.PathLike[str], *, key: str, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder; give the name of a file to write.")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.partial = self.path.with_name(f"{self.path.name}.{digest}.partial")
        self.finished: list[str] = []
        self._size = 0  # bytes of complete lines
        if resume:
            if not self.partial.is_file():
                raise InputError(
                    f"there is no interrupted run of {self.path} with these inputs and settings ({self.partial} does "
                    "not exist); leave out --resume to start it."
                )
            data = self.partial.read_bytes()
            self._size = data.rfind(b"\n") + 1
            self.finished = data[: self._size].decode("utf-8").split("\n")[:-1]

    def __enter__(self) -> ResumableLines:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("ab")
        self._file.truncate(self._size)
        return self

    def append(self, line: str) -> None:
        """Adds a line and hands it to the operating system."""
        data = line.encode("utf-8") + b"\n"
        self._file.write(data)
        self._file.flush()
        self._size += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                self._file.close()
                self.partial.replace(self.path)
                _sync_folder(self.path.parent)
        finally:
            if self.partial.exists():
                self._keep_complete_lines()

    def _keep_complete_lines(self) -> None:
        # Closing flushes again what a full disk refused, and may refuse again; the descriptor is closed all the same.
        with suppress(OSError):
            self._file.close()
        if self._size:
            os.truncate(self.partial, self._size)
        else:
            self.partial.unlink()


def _swap_in(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`; a folder that is there is moved aside first: rename does not replace it."""
    if not path.exists():
        partial.rename(path)
        return
    aside = _temporary_sibling(path)
    path.rename(aside)
    try:
        partial.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_sibling(path: Path) -> Path:
    # Names are limited to 255 bytes on common file systems: the destination's own name may already use most of them.
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.partial")


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
