"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from foveate.errors import InputError
from foveate.files import ResumableLines, atomic_folder, atomic_write, file_states


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data reach the page cache, and the disk turns out to be full when they are flushed to it."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_text_is_utf8_with_unix_line_ends_and_makes_parents(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "text.txt") as file:
        file.write("größe\n")
    assert (tmp_path / "a" / "b" / "text.txt").read_bytes() == "größe\n".encode()
    assert names(tmp_path / "a" / "b") == ["text.txt"]


def test_bytes_replace_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"a much longer old content")
    with atomic_write(path, "wb") as file:
        file.write(b"\x00\xff")
        assert path.read_bytes() == b"a much longer old content", "readers see the old content until the block ends"
    assert path.read_bytes() == b"\x00\xff"


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_the_old_file_and_nothing_partial(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "text.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write("new")
    assert names(tmp_path) == ([] if old is None else ["text.txt"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_write(tmp_path / "text.txt") as file:
        file.write("half of the content")
        raise error
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"), atomic_write(tmp_path):
        pass


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    with atomic_write(path) as file:
        file.write("x")
    assert path.read_text() == "x"


def test_a_name_of_255_bytes_that_are_not_ascii_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("名" * 85)
    with atomic_write(path) as file:
        file.write("x")
    with ResumableLines(path, key="a") as lines:
        lines.append("y")
    assert path.read_text() == "y\n"
    assert names(tmp_path) == [path.name]


def test_bytes_of_a_file_name_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with atomic_write(tmp_path / "text") as file:
        file.write(name)
    with ResumableLines(tmp_path / "lines", key=name) as lines:
        lines.append(name)
    assert (tmp_path / "text").read_text() == "caf\\udce9.png"
    assert (tmp_path / "lines").read_text() == "caf\\udce9.png\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real/text.txt", tmp_path / "link.txt"
    if there:
        target.write_text("old")
    link.symlink_to("real/text.txt")
    with atomic_write(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with ResumableLines(link, key="a") as lines:
        lines.append("line")
    assert link.is_symlink()
    assert target.read_text() == "line\n"
    assert names(tmp_path / "real") == ["text.txt"]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for write in (lambda path: atomic_write(path).__enter__(), lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(InputError, match="leads back to itself"):
            write(tmp_path / "loop")
    assert names(tmp_path) == ["loop"]


@pytest.mark.parametrize(("mode", "content"), [("w", "größe\n"), ("wb", b"\x00\xff")])
def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path: Path, mode: Any, content: Any) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with atomic_write(pipe, mode) as file:
        file.write(content)
    reader.join(10)
    assert read == [content.encode() if isinstance(content, str) else content]
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_terminal_gets_the_content_only_if_it_is_complete() -> None:
    main, terminal = os.openpty()
    name = os.ttyname(terminal)
    with pytest.raises(ValueError, match="stop"), atomic_write(name) as file:
        file.write("half")
        raise ValueError("stop")
    with atomic_write(name) as file:
        file.write("whole")
    assert os.read(main, 100) == b"whole"
    assert Path(name).is_char_device()
    for descriptor in (main, terminal):
        os.close(descriptor)


def test_the_standard_output_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `foveate ... --out /dev/stdout >> log`."""
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a") as file:
        inode = log.stat().st_ino
        with atomic_write(f"/dev/fd/{file.fileno()}") as content:
            content.write("after\n")
    assert log.read_text() == "before\nafter\n"
    assert log.stat().st_ino == inode


def test_what_cannot_keep_lines_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        ResumableLines(tmp_path / "pipe", key="a")
    with pytest.raises(InputError, match="null is not a regular file"):
        ResumableLines("/dev/null", key="a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(InputError, match="s is a socket or a disk"), atomic_write(tmp_path / "s"):
            pass
    assert names(tmp_path) == ["pipe", "s"]


def test_errors_name_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(NotADirectoryError) as caught, atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        (folder / "file/below").write_text("")
    assert caught.value.filename == str(tmp_path / "out/file/below")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="text") as caught, atomic_write(tmp_path / "text"):
        pass
    assert caught.value.filename == str(tmp_path / "text")
    assert names(tmp_path) == []


def test_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not out.exists()
    assert (out / "sub" / "a.txt").read_text() == "a"
    assert names(tmp_path / "deep") == ["out"]


def test_folder_refuses_to_mix_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:  # an empty folder is fine
        (folder / "a.txt").write_text("a")
    with pytest.raises(InputError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "out" / "a.txt"):
        pass


@pytest.mark.parametrize("name", ["", ".", "../here"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"is the current folder.*out"), atomic_folder(name):
        pass
    with pytest.raises(InputError, match="is a folder"), atomic_write(name):
        pass
    assert names(tmp_path) == ["here"]
    assert names(tmp_path / "here") == []


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(InputError, match="disk is a mount point"), atomic_folder(tmp_path / "disk"):
        pytest.fail("the work has begun")
    assert names(tmp_path) == ["disk"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real/a.txt").read_text() == "a"
    assert names(tmp_path) == ["out", "real"]


def test_folder_overwrite_replaces_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert names(out) == ["old.txt"]
    assert names(out) == ["new.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(OSError, match="No space left"), atomic_folder(out, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old.txt"]


def test_lines_are_renamed_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "lines.jsonl"
    with ResumableLines(path, key="a") as lines:
        lines.append("größe")
        lines.append("2")
        assert not path.exists()
    assert path.read_bytes() == "größe\n2\n".encode()
    assert names(path.parent) == ["lines.jsonl"]


def test_interrupted_lines_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt), ResumableLines(path, key="a") as lines:
        lines.append("1")
        lines.append("2")
        raise KeyboardInterrupt
    assert not path.exists()
    with lines.partial.open("ab") as file:
        file.write(b"half a li")  # what a kill in the middle of a write leaves
    with ResumableLines(path, key="a", resume=True) as lines:
        assert lines.finished == ["1", "2"]
        lines.append("3")
    assert path.read_text() == "1\n2\n3\n"
    assert names(tmp_path) == ["lines.jsonl"]


def test_only_the_same_run_is_resumed_and_a_new_one_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(ValueError, match="stop"), ResumableLines(path, key="a") as lines:
        lines.append("1")
        raise ValueError("stop")
    with pytest.raises(InputError, match="no interrupted run"):
        ResumableLines(path, key="b", resume=True)
    with ResumableLines(path, key="a") as lines:
        assert lines.finished == []
        lines.append("new")
    assert path.read_text() == "new\n"


def test_no_line_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), ResumableLines(tmp_path / "lines", key="a"):
        raise ValueError("stop")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("full_disk")
def test_lines_survive_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(OSError, match="No space left"), ResumableLines(path, key="a") as lines:
        lines.append("1")
    assert names(tmp_path) == [lines.partial.name]
    assert lines.partial.read_text() == "1\n"


def test_lines_go_on_where_they_can(tmp_path: Path) -> None:
    def write(*lines: str, stop: bool) -> list[str]:
        file = ResumableLines.go_on(tmp_path / "a.txt", key="k")
        with suppress(KeyboardInterrupt), file:
            for line in lines:
                file.append(line)
            if stop:
                raise KeyboardInterrupt
        return file.finished

    assert write("one", "two", stop=True) == []
    assert write("three", stop=False) == ["one", "two"]
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\nthree\n"
    assert write("new", stop=False) == []
    assert (tmp_path / "a.txt").read_text() == "new\n"


def test_states_of_files_tell_changes(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("1")
    (tmp_path / "a").write_text("12")
    before = file_states(tmp_path)
    assert [(name, size) for name, size, _ in before] == [("a", 2), ("b", 1)]
    os.utime(tmp_path / "a", (1, 1))
    assert file_states(tmp_path) != before
