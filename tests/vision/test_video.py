from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.vision.video import Video, even_indices, is_video, load_video


def frame(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 12, 3), value, dtype=np.uint8))


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    path = tmp_path / "clip.gif"
    frames = [frame(20 * number) for number in range(10)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    return path


@pytest.fixture
def mp4(tmp_path: Path) -> Path:
    """Ten frames of 48 x 32, each brighter than the one before, the left half darker."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(10):
            pixels = np.full((32, 48, 3), 20 * number, dtype=np.uint8)
            pixels[:, :24] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(video: Video) -> list[int]:
    return [int(np.asarray(one)[0, 0, 0]) for one in video.frames]


def test_frames_at_even_distances() -> None:
    assert even_indices(10, 4) == [0, 3, 6, 9]
    assert even_indices(2, 4) == [0, 0, 0, 1]
    assert brightness(load_video([frame(value) for value in range(10)], 4)) == [0, 3, 6, 9]
    assert len(load_video(Video((frame(1),)), 3)) == 3


def test_an_animation(gif: Path) -> None:
    assert is_video(gif)
    assert brightness(load_video(gif, 4)) == pytest.approx([0, 60, 120, 180], abs=2)


def test_a_container(mp4: Path) -> None:
    assert is_video(mp4)
    found = load_video(mp4, 4)
    right = [int(np.asarray(one)[16, 40, 0]) for one in found.frames]
    assert right == pytest.approx([0, 60, 120, 180], abs=3)
    assert int(np.asarray(found.frames[3])[16, 5, 0]) == pytest.approx(90, abs=3)
    # More frames than there are repeat.
    assert len(load_video(mp4, 12)) == 12


def test_a_film_that_was_turned(mp4: Path) -> None:
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # (x, y) is shown at (-y, x)
    data = mp4.read_bytes()
    track = data.index(b"tkhd")
    mp4.write_bytes(data[:track] + data[track:].replace(upright, turned, 1))
    last = np.asarray(load_video(mp4, 2).frames[1])
    assert last.shape == (48, 32, 3)
    assert int(last[40, 16, 0]) == pytest.approx(180, abs=3), "the right half is below"
    assert int(last[5, 16, 0]) == pytest.approx(90, abs=3)


@pytest.mark.parametrize("kept", [0, 20, 400])
def test_a_container_that_is_cut_off(mp4: Path, kept: int) -> None:
    mp4.write_bytes(mp4.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"clip\.mp4 does not decode as a video") as caught:
        load_video(mp4, 4)
    assert "\n" not in str(caught.value)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="does not decode as a video"):
        load_video(path, 4)


def test_a_folder_of_frames_in_the_order_of_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        frame(number * 50).save(tmp_path / f"{number}.png")
    assert is_video(tmp_path)
    assert brightness(load_video(tmp_path, 3)) == [0, 50, 100]


def test_pictures_are_no_videos(tmp_path: Path) -> None:
    frame(3).save(tmp_path / "still.gif")
    frame(3).save(tmp_path / "a.png")
    assert not is_video(tmp_path / "still.gif")
    assert not is_video(tmp_path / "a.png")
    assert not is_video(frame(3))
    assert not is_video(None)
    assert is_video("clip.mp4")
    assert is_video(Video((frame(1),)))


def test_what_does_not_decode(tmp_path: Path, gif: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_video(tmp_path / "clip.mp4", 4)
    broken = tmp_path / "broken.gif"
    broken.write_bytes(gif.read_bytes()[:60])
    with pytest.raises(InputError, match="does not decode as a video"):
        load_video(broken, 4)
    container = tmp_path / "broken.mp4"
    container.write_bytes(b"no video")
    # With PyAV it does not decode, without it it cannot be tried; both are said.
    with pytest.raises(InputError, match=r"does not decode as a video|needs PyAV"):
        load_video(container, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no frame"):
        load_video(tmp_path / "empty", 4)
