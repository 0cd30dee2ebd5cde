"""Videos as frames: a folder of pictures, an animation that Pillow reads, or any container where PyAV is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.errors import InputError
from foveate.vision.images import MAX_PIXELS, ImageSource, describe_source, load_image

ANIMATIONS = (".gif", ".webp", ".apng")
CONTAINERS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
MAX_FRAMES = 1_000_000


@dataclass(frozen=True)
class Video:
    """Frames of a video in their order, upright RGB."""

    frames: tuple[ImageSource, ...]

    def __len__(self) -> int:
        return len(self.frames)


def is_video(source: object) -> bool:
    """Whether a source is a video: a `Video`, a folder, a container by its ending, or an animation."""
    if isinstance(source, Video):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    if path.suffix.lower() in CONTAINERS or path.is_dir():
        return True
    if path.suffix.lower() not in ANIMATIONS or not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except OSError:
        return False


def load_video(source: Video | str | os.PathLike[str] | Sequence[ImageSource], frames: int) -> Video:
    """`frames` frames at even distances, the first and the last among them; those of a short video repeat.

    Args:
        source: a file, a folder whose pictures are the frames in the order of their names, or frames.

    Raises:
        InputError: there is no such file, it has no frame, does not decode, or needs PyAV, which is not installed.
    """
    if isinstance(source, Video):
        return Video(tuple(source.frames[index] for index in even_indices(len(source), frames, "the video")))
    if not isinstance(source, str | os.PathLike):
        listed = list(source)
        return Video(tuple(listed[index] for index in even_indices(len(listed), frames, "the video")))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        chosen = [files[index] for index in even_indices(len(files), frames, f"the folder {path}")]
        return Video(tuple(load_image(file) for file in chosen))
    if not path.is_file():
        raise InputError(f"{describe_source(path)} does not exist; check the path of the video.")
    if path.suffix.lower() in ANIMATIONS:
        return _read_animation(path, frames)
    return _read_container(path, frames)


def even_indices(total: int, wanted: int, what: str = "the video") -> list[int]:
    """Whole parts of `wanted` numbers at even distances from 0 to `total` - 1.

    Raises:
        InputError: there is no frame.
    """
    if total < 1:
        raise InputError(f"{what} has no frame; give at least one.")
    return np.linspace(0, total - 1, wanted).astype(int).tolist()


def _read_animation(path: Path, frames: int) -> Video:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path} has {image.width}x{image.height} pixels, more than are decoded; make it smaller."
                )
            total = getattr(image, "n_frames", 1)
            found = []
            for index in even_indices(total, frames, str(path)):
                image.seek(index)
                found.append(image.convert("RGB"))
            return Video(tuple(found))
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        raise _undecodable(path, error) from None


def _read_container(path: Path, frames: int) -> Video:
    try:
        import av
    except ImportError:
        raise InputError(
            f"{path} needs PyAV to be decoded, which is not installed: `pip install foveate[video]`, or give a folder "
            "of its frames or a GIF."
        ) from None
    try:
        with av.open(os.fspath(path)) as container:
            # Many files do not say, or say wrongly, how many frames they have.
            total = sum(1 for _ in _decoded(container))
        wanted = even_indices(total, frames, str(path))
        with av.open(os.fspath(path)) as container:
            seen = set(wanted)
            found = {index: _upright(frame) for index, frame in enumerate(_decoded(container)) if index in seen}
        return Video(tuple(found[index] for index in wanted))
    except InputError:
        raise
    except Exception as error:  # PyAV has an error of its own for each of FFmpeg's
        raise _undecodable(path, error) from None


def _decoded(container: Any) -> Iterator[Any]:
    for number, frame in enumerate(container.decode(video=0)):
        if number >= MAX_FRAMES:
            raise InputError(f"the video has more than {MAX_FRAMES} frames; cut it.")
        yield frame


def _upright(frame: Any) -> Image.Image:
    """Telephones film in one direction and note how to turn the picture."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _undecodable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} does not decode as a video ({error}); it is truncated or of another format.")
