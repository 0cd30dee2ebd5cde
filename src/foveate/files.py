"""Files that appear whole or not at all.

Everything that foveate writes goes through `atomic_write` or `atomic_folder`: the content is written under a temporary
name next to its destination (so that the rename stays on one file system), flushed to the disk, and renamed. A full
disk, a kill or an exception leaves the old content of the destination, never half of the new one.

Links are followed: what they point to is replaced, not the link. A terminal, a pipe or a device cannot be replaced; it
is written to, once the content is complete.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, overload

from foveate.errors import InputError

# Where the system keeps the open files of this process. One may be a regular file, and must be written to all the
# same: renaming another into its place would part it from the shell's `> file`, and lose what `>> file` had before.
_DESCRIPTORS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["w"] = "w") -> AbstractContextManager[IO[str]]: ...
@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> AbstractContextManager[IO[Any]]:
    """Context manager that gives a file object whose content becomes `path` when the block ends without an exception.

    Parent folders are made. Text is UTF-8 with "\\n" line ends on every platform; what UTF-8 cannot hold (bytes of a
    file name that are no text) is written as a backslash escape.

    Args:
        path: the destination; an existing file is replaced, a folder is refused. A terminal, a pipe or a device gets
            the content when the block ends.
        mode: "w" for text, "wb" for bytes.

    Raises:
        InputError: `path` is an existing folder, a socket, or a disk.
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
    target = _target_file(path)
    if target is None:
        content = io.BytesIO() if "b" in mode else io.StringIO()
        yield content
        data = content.getvalue()
        with path.open("ab") as file:  # appending, for /dev/stdout may be a file that has content already
            file.write(data if isinstance(data, bytes) else _encoded(data))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(target)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with partial.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name_destination(error, partial, path)
        raise
    _sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: the destination. It must not exist, or be an empty folder, unless `overwrite` is set. The current folder
            and a mount point are refused: a rename cannot replace them, or would take them from under the user.
        overwrite: replace an existing folder. The old one stays complete until the new one is.

    Raises:
        InputError: `path` is a file, a folder that cannot be replaced, or a non-empty one and `overwrite` is not set.
        OSError: the disk is full, the folder is not writable, ...; nothing partial is left behind.
    """
    path = Path(path)
    target = _followed(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{path} is a file; give the name of a folder to write.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{path} already exists and is not empty; choose another folder or remove it first.")
    if target == Path.cwd() or os.path.ismount(target):
        kind = "a mount point" if os.path.ismount(target) else "the current folder"
        raise InputError(
            f"{path} is {kind}, which cannot be replaced; give a new folder in it, such as {path / 'out'}."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(target)
    try:
        partial.mkdir()
        yield partial
        for item in partial.rglob("*"):
            if item.is_file():
                _sync_file(item)
        _swap_in(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _name_destination(error, partial, path)
        raise
    _sync_folder(target.parent)


def file_states(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of a folder: what is not the same after any of them was written."""
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())


def cache_folder(name: str) -> Path:
    """Where foveate keeps what it can compute again: `name` in the folder that the environment variable FOVEATE_CACHE
    names, or else in `foveate` in the user's cache folder (XDG_CACHE_HOME, ~/.cache). It need not exist."""
    own = os.environ.get("FOVEATE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (never raises)
    return Path(own or Path(home) / "foveate") / name


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
        InputError: `path` is a folder or anything else than a file, or there is nothing to resume.
        OSError: the disk is full, the folder is not writable, ...
    """

    def __init__(self, path: str | os.PathLike[str], *, key: str, resume: bool = False) -> None:
        self.path = Path(path)
        target = _target_file(self.path)
        if target is None:
            raise InputError(f"{self.path} is not a regular file, so no lines can be kept in it; give another name.")
        self._target = target
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.partial = target.with_name(f"{_shortened(target.name, 200)}.{digest}.partial")
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

    @classmethod
    def go_on(cls, path: str | os.PathLike[str], *, key: str) -> ResumableLines:
        """Resumes an interrupted run with the same key where there is one, and starts anew where there is none."""
        lines = cls(path, key=key)
        return cls(path, key=key, resume=True) if lines.partial.is_file() else lines

    def __enter__(self) -> ResumableLines:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("ab")
        self._file.truncate(self._size)
        return self

    def append(self, line: str) -> None:
        """Adds a line and hands it to the operating system."""
        data = _encoded(line) + b"\n"
        self._file.write(data)
        self._file.flush()
        self._size += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                self._file.close()
                self.partial.replace(self._target)
                _sync_folder(self._target.parent)
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


def _followed(path: Path) -> Path:
    """The absolute path with all links followed."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise InputError(f"{path} is a link that leads back to itself; give another name.")
    return target


def _target_file(path: Path) -> Path | None:
    """The regular file that a destination stands for, or None for what is written to instead of being replaced.

    Raises:
        InputError: a folder, a socket, a disk, or a link in a circle.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:  # there is nothing yet; what else may be wrong is said when it is written
        return _followed(path)
    if kind == stat.S_IFDIR:
        raise InputError(f"{path} is a folder; give the name of a file to write.")
    if kind in (stat.S_IFCHR, stat.S_IFIFO) or str(path).startswith(_DESCRIPTORS):
        return None
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is a socket or a disk, not a file; give the name of a file to write.")
    return _followed(path)


def _name_destination(error: BaseException, partial: Path, path: Path) -> None:
    """An error of the system names what the user gave, not the temporary name, which is gone by then."""
    if not isinstance(error, OSError):
        return
    if error.filename is None and error.errno in _FULL:
        error.filename = os.fspath(path)
    elif isinstance(error.filename, str) and error.filename.startswith(os.fspath(partial)):
        error.filename = os.fspath(path) + error.filename.removeprefix(os.fspath(partial))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


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
    return path.with_name(f".{_shortened(path.name, 100)}.{secrets.token_hex(6)}.partial")


def _shortened(name: str, most: int) -> str:
    """Names are limited to 255 bytes on common file systems: a destination's own may already use most of them."""
    return os.fsdecode(os.fsencode(name)[:most])


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
