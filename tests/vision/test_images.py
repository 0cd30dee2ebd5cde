from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from foveate.errors import InputError
from foveate.vision.images import (
    check_image_file,
    decode_rle,
    describe_source,
    encode_rle,
    load_image,
    load_mask,
    mask_to_box,
    polygons_to_box,
    rle_to_box,
    to_array,
)


def encoded(image: Image.Image, format: str = "PNG", **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def pixels(source: Any) -> list[list[list[int]]]:
    return np.asarray(load_image(source)).tolist()


RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[1, 2, 3], [40, 50, 60], [255, 255, 255]]], dtype=np.uint8)


class TestSources:
    def test_every_kind_of_source_gives_the_same_pixels(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        data = encoded(Image.fromarray(RGB))
        path.write_bytes(data)
        sources = [
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            Image.fromarray(RGB),
            RGB,
            Image.open(path),
        ]
        for source in sources:
            image = load_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), RGB)

    def test_array_kinds(self) -> None:
        grey = np.array([[0, 7], [200, 255]], dtype=np.uint8)
        np.testing.assert_array_equal(to_array(grey), np.repeat(grey[..., None], 3, axis=2))
        rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
        # over white: alpha 51/255 = 0.2 of black leaves 0.8 * 255 = 204
        assert to_array(rgba).tolist() == [[[200, 100, 0], [255, 255, 255], [204, 204, 204]]]
        np.testing.assert_array_equal(to_array(np.asfortranarray(RGB)), RGB)
        np.testing.assert_array_equal(to_array(RGB[:, ::-1]), RGB[:, ::-1])

    def test_one_pixel_is_enough(self) -> None:
        assert load_image(np.array([[9]], dtype=np.uint8)).size == (1, 1)
        assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))) == [[[1, 2, 3]]]

    def test_result_shares_nothing_with_the_source(self) -> None:
        array, image = RGB.copy(), Image.fromarray(RGB)
        for source in (array, image):
            result = load_image(source)
            result.paste((9, 9, 9), (0, 0, 3, 2))
        np.testing.assert_array_equal(array, RGB)
        np.testing.assert_array_equal(np.asarray(image), RGB)
        writable = to_array(array)
        writable[:] = 0
        np.testing.assert_array_equal(array, RGB)

    @given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
    def test_png_round_trip(self, array: np.ndarray) -> None:
        np.testing.assert_array_equal(to_array(encoded(load_image(array))), array)

    def test_import_and_use_need_no_torch(self) -> None:
        code = (
            "import sys, numpy; from foveate.vision.images import load_image;"
            "load_image(numpy.zeros((2, 2, 3), 'uint8'));"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        source = Path(__file__).parents[2] / "src"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(source)})


# The upright image for a stored [[1, 2, 3], [4, 5, 6]], written out from the EXIF definition of where the stored row 0
# and column 0 lie: 6, for instance, has row 0 on the right and column 0 on top.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


class TestOrientation:
    @staticmethod
    def stored(orientation: int, format: str) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encoded(
            Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8) * 40),
            format,
            exif=exif,
        )

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_all_eight(self, orientation: int, format: str) -> None:
        image = load_image(self.stored(orientation, format))
        np.testing.assert_array_equal(np.asarray(image)[..., 0] // 40, UPRIGHT[orientation])
        assert image.getexif().get(0x0112, 1) == 1
        np.testing.assert_array_equal(to_array(image), np.asarray(image))

    def test_jpeg_and_opened_image(self) -> None:
        data = self.stored(6, "JPEG")
        assert load_image(data).size == (2, 3)
        opened = Image.open(io.BytesIO(data))
        assert load_image(opened).size == (2, 3)
        assert load_image(load_image(opened)).size == (2, 3)

    def test_unknown_value_leaves_the_image_as_stored(self) -> None:
        assert load_image(self.stored(9, "PNG")).size == (3, 2)

    def test_unreadable_exif_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        data = self.stored(6, "PNG")
        start = data.index(b"eXIf")
        length = struct.unpack(">I", data[start - 4 : start])[0]
        body = b"eXIf" + b"Exif\0\0XX" + b"\xff" * (length - 8)
        broken = data[:start] + body + struct.pack(">I", zlib.crc32(body)) + data[start + 8 + length :]
        assert load_image(broken).size == (3, 2)
        assert "unreadable EXIF" in caplog.text


class TestModes:
    def test_sixteen_bit_grey(self) -> None:
        values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], dtype=np.uint16)
        # v / 257 to the nearest: 128/257 < 0.5 < 129/257; 32768/257 = 127.502; 65278 = 254 * 257; 65407/257 = 254.502
        expected = [[0, 0, 1, 1], [128, 254, 255, 255]]
        for format in ("PNG", "TIFF", "PPM"):
            assert to_array(encoded(Image.fromarray(values), format))[..., 0].tolist() == expected, format
        assert to_array(Image.fromarray(values))[..., 2].tolist() == expected
        big_endian = Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes())
        assert to_array(big_endian)[..., 1].tolist() == expected

    def test_sixteen_bit_grey_with_a_transparent_value(self) -> None:
        image = Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))
        image.info["transparency"] = 1000
        assert to_array(image)[..., 0].tolist() == [[0, 255, 255]]

    def test_one_bit(self) -> None:
        image = Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)).convert("1")
        assert pixels(encoded(image)) == [[[0, 0, 0], [255, 255, 255], [0, 0, 0]]]

    def test_grey_with_alpha(self) -> None:
        image = Image.fromarray(np.array([[[100, 255], [100, 0], [0, 51]]], dtype=np.uint8), mode="LA")
        assert to_array(encoded(image))[..., 0].tolist() == [[100, 255, 204]]

    def test_palette(self) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200])
        image.putdata([0, 1, 2])
        assert pixels(encoded(image)) == [[[10, 20, 30], [200, 0, 0], [0, 0, 200]]]
        for format in ("PNG", "GIF"):
            data = encoded(image, format, transparency=1)
            assert pixels(data) == [[[10, 20, 30], [255, 255, 255], [0, 0, 200]]], format
        graded = encoded(image, transparency=bytes([255, 0, 51]))
        # 0.2 * (0, 0, 200) + 0.8 * 255 = (204, 204, 244)
        assert pixels(graded) == [[[10, 20, 30], [255, 255, 255], [204, 204, 244]]]

    def test_rgb_with_a_transparent_colour(self) -> None:
        data = encoded(Image.fromarray(RGB), transparency=(0, 255, 0))
        assert pixels(data)[0] == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        assert pixels(encoded(image, "TIFF"))[0][0] == [255, 0, 0]
        # Adobe stores CMYK JPEGs inverted; a wrong reading gives cyan instead of red
        red, green, blue = pixels(encoded(image, "JPEG", quality=95))[4][4]
        assert red > 245
        assert max(green, blue) < 10

    def test_animation_gives_its_first_frame(self) -> None:
        frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
        for format in ("GIF", "PNG", "WEBP", "TIFF"):
            kwargs = {"lossless": True} if format == "WEBP" else {}
            data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **kwargs)
            assert pixels(data)[0][0] == [255, 0, 0], format

    @pytest.mark.parametrize("mode", ["F", "I", "LAB"])
    def test_modes_without_a_defined_range(self, mode: str) -> None:
        with pytest.raises(InputError, match=f"mode {mode}.*convert it to 8-bit RGB"):
            load_image(Image.new(mode, (2, 2)))
        with pytest.raises(InputError, match=f"mode {mode}"):
            load_image(encoded(Image.new(mode, (2, 2)), "TIFF"))


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that promise width x height pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


class TestRefusals:
    @pytest.mark.parametrize(
        "url",
        ["http://example.com/a.png", "HTTPS://example.com/a.png", "file:///etc/hosts", "data:image/png;base64,AA"],
    )
    def test_urls(self, url: str) -> None:
        for spelling in (url, Path(url)):  # which has one slash left
            with pytest.raises(InputError, match="is a URL; download it first"):
                load_image(spelling)

    def test_paths(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nothing\.png' does not exist"):
            load_image(tmp_path / "nothing.png")
        with pytest.raises(InputError, match=r"^Image file '[^']*' is a folder; give the path of an image file\.$"):
            load_image(tmp_path)
        with pytest.raises(InputError, match="is a folder"):
            check_image_file(tmp_path)
        with pytest.raises(InputError, match="cannot be read"):
            load_image("a\0b.png")
        with pytest.raises(InputError, match="cannot be read"):
            load_image("x" * 5000)
        fifo = tmp_path / "fifo.png"
        os.mkfifo(fifo)
        with pytest.raises(InputError, match="not a regular file"):
            load_image(fifo)

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.jpg"
        path.touch()
        with pytest.raises(InputError, match=r"empty\.jpg' is empty \(0 bytes\)"):
            load_image(path)
        with pytest.raises(InputError, match="empty"):
            load_image(b"")

    def test_not_an_image(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.png"
        path.write_text("hello there, this is not an image at all")
        with pytest.raises(InputError, match=r"notes\.png' is not an image in a known format \(.*\); give a JPEG"):
            load_image(path)

    def test_formats_that_start_other_programs_are_not_opened(self) -> None:
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        assert Image.open(io.BytesIO(eps)).format == "EPS"
        with pytest.raises(InputError, match="not an image in a known format"):
            load_image(eps)

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000"])
    def test_truncated(self, format: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        data = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
        path = tmp_path / "cut.img"
        for share in (0.3, 0.6):
            path.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(InputError, match=r"cut\.img' (is truncated or corrupt|is not an image|has a damaged)"):
                load_image(path)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_hostile_bytes_never_raise_anything_else(self) -> None:
        rng = np.random.default_rng(1)
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"):
            data = bytearray(encoded(image, format))
            for _ in range(40):
                mutated = bytearray(data)
                for position in rng.integers(0, min(len(data), 200), 4):
                    mutated[position] = int(rng.integers(256))
                with contextlib.suppress(InputError):
                    assert load_image(bytes(mutated), max_pixels=10**6).mode == "RGB"

    def test_pixel_limit_is_checked_on_the_header(self) -> None:
        with pytest.raises(InputError, match=r"9000x8000 = 72000000 pixels, more than the limit of 64000000"):
            load_image(png_bomb(9000, 8000))
        with pytest.raises(InputError, match="pixels than the limit"):
            load_image(png_bomb(60000, 60000))
        with pytest.raises(InputError, match="3x2 = 6 pixels, more than the limit of 5; shrink the image"):
            load_image(RGB, max_pixels=5)
        with pytest.raises(InputError, match="limit of 5"):
            load_image(Image.fromarray(RGB), max_pixels=5)
        assert load_image(RGB, max_pixels=6).size == (3, 2)

    def test_byte_limit(self, tmp_path: Path) -> None:
        data = encoded(Image.fromarray(RGB))
        path = tmp_path / "big.png"
        path.write_bytes(data)
        for source in (data, path):
            with pytest.raises(InputError, match=f"larger than the limit of {len(data) - 1} bytes"):
                load_image(source, max_bytes=len(data) - 1)
            assert load_image(source, max_bytes=len(data)).size == (3, 2)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 2, 3), np.float32), "must be uint8.*float32"),
            (np.zeros((2, 2), bool), "must be uint8.*bool"),
            (np.zeros((3, 8, 8), np.uint8), "move the channels last"),
            (np.zeros((2, 2, 1), np.uint8), r"\(2, 2, 1\)"),
            (np.zeros((1, 2, 2, 3), np.uint8), r"\(1, 2, 2, 3\)"),
            (np.zeros((5,), np.uint8), r"\(5,\)"),
            (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        ],
    )
    def test_arrays(self, array: np.ndarray, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(array)

    @pytest.mark.parametrize("source", [None, 3, [[1, 2]], {"a": 1}, object()])
    def test_other_types(self, source: Any) -> None:
        with pytest.raises(InputError, match=f"got {type(source).__name__}"):
            load_image(source)

    def test_image_without_pixels(self) -> None:
        with pytest.raises(InputError, match="no pixels"):
            load_image(Image.new("RGB", (0, 5)))


def drawn(*values: Any, mode: str = "L", size: tuple[int, int] = (3, 1), **changes: Any) -> bytes:
    """A PNG with these pixels; `palette` and `exif` are put into it."""
    image = Image.new(mode, size)
    image.putdata(values)
    if "palette" in changes:
        image.putpalette(changes.pop("palette"))
    return encoded(image, **changes)


class TestMaskImages:
    @pytest.mark.parametrize(
        "data",
        [
            drawn(0, 1, 255),
            drawn(0, 1, 1, mode="1"),
            drawn(0, 1, 300, mode="I;16"),
            drawn((0, 0, 0), (0, 0, 1), (9, 0, 0), mode="RGB"),
            drawn(0, 1, 2, mode="P", palette=[0, 0, 0, 200, 0, 0, 0, 200, 0]),
            # Label colours in which the background is not black, and a palette that has no colours at all.
            drawn(0, 1, 2, mode="P", palette=[90, 90, 90, 200, 0, 0, 0, 200, 0]),
            drawn(0, 1, 1, mode="P", palette=[0, 0, 0, 0, 0, 0]),
            # Black and white whose indices start at 1, as optimisers write them.
            drawn(1, 2, 2, mode="P", palette=[5, 5, 5, 0, 0, 0, 255, 255, 255]),
            # The region on transparency: black, white, and with any colour under what cannot be seen.
            drawn((0, 0, 0, 0), (0, 0, 0, 9), (0, 0, 0, 255), mode="RGBA"),
            drawn((255, 0), (255, 9), (255, 255), mode="LA"),
            drawn((7, 0, 0, 0), (255, 255, 255, 255), (1, 1, 1, 255), mode="RGBA"),
            drawn((0, 0, 0, 255), (255, 255, 255, 255), (1, 1, 1, 255), mode="RGBA"),
            drawn((0, 255), (1, 255), (255, 255), mode="LA"),
        ],
    )
    def test_what_is_not_zero(self, data: bytes) -> None:
        assert load_mask(data).tolist() == [[False, True, True]]
        assert load_mask(data).dtype == np.bool_

    @pytest.mark.parametrize(
        "data",
        [
            drawn((255, 255, 255, 0), (0, 0, 0, 255), (255, 255, 255, 255), mode="RGBA"),
            drawn(0, 1, 1, mode="P", palette=[255, 255, 255, 0, 0, 0]),
        ],
        ids=["transparency against colour", "palette against colour"],
    )
    def test_two_masks_in_one_are_refused(self, data: bytes) -> None:
        with pytest.raises(InputError, match=r"is no clear mask: .*save it as a grey image"):
            load_mask(data)

    @pytest.mark.parametrize(
        ("data", "value"),
        [
            (drawn(0, 0, 0), False),
            (drawn(*[(0, 0, 0, 255)] * 3, mode="RGBA"), False),
            (drawn(*[(9, 9, 9, 0)] * 3, mode="RGBA"), False),
            (drawn(0, 0, 0, mode="P", palette=[200, 0, 0]), False),
            (drawn(1, 1, 1, mode="P", palette=[0, 0, 0, 0, 0, 0]), True),
            (drawn(*[(255, 255, 255)] * 3, mode="RGB"), True),
        ],
    )
    def test_the_same_everywhere(self, data: bytes, value: bool) -> None:
        assert load_mask(data).tolist() == [[value] * 3]

    def test_it_is_turned_like_its_image(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn clockwise
        assert load_mask(drawn(0, 1, 1, exif=exif)).tolist() == [[False], [True], [True]]

    def test_broken_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            load_mask(tmp_path / "none.png")
        with pytest.raises(InputError, match="not an image"):
            load_mask(b"text")
        with pytest.raises(InputError, match="range is not defined"):
            load_mask(Image.new("F", (2, 2)))


def test_describe_source(tmp_path: Path) -> None:
    assert describe_source("dir/a.png") == "image file 'dir/a.png'"
    assert describe_source(Path("a.png")) == "image file 'a.png'"
    assert describe_source(b"abc") == "image bytes (3 bytes)"
    assert describe_source(Image.new("L", (4, 3))) == "PIL image (mode L, 4x3)"
    assert describe_source(RGB) == "array of shape (2, 3, 3) and dtype uint8"
    assert describe_source(None) == "NoneType object"
    assert len(describe_source("x" * 10_000)) < 300


class TestMasks:
    MASK = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=bool)

    def test_box_is_half_open(self) -> None:
        assert mask_to_box(self.MASK) == (1.0, 1.0, 3.0, 3.0)
        assert mask_to_box(np.ones((1, 1), bool)) == (0.0, 0.0, 1.0, 1.0)

    @pytest.mark.parametrize("mask", [np.zeros((2, 2), bool), np.ones((2, 2), np.uint8), np.ones(4, bool), [[True]]])
    def test_bad_masks(self, mask: Any) -> None:
        with pytest.raises(InputError, match="mask"):
            mask_to_box(mask)

    def test_hand_written_runs(self) -> None:
        # down the columns: 0 0 0 | 0 1 0 | 0 1 1 | 0 0 0
        runs = [4, 1, 2, 2, 3]
        np.testing.assert_array_equal(decode_rle({"size": [3, 4], "counts": runs}), self.MASK)
        # the fourth and fifth are stored as differences to the second and third: 2 - 1 = 1, 3 - 2 = 1
        assert encode_rle(self.MASK) == {"size": [3, 4], "counts": "41211"}
        np.testing.assert_array_equal(decode_rle({"size": [3, 4], "counts": b"41211"}), self.MASK)

    @given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
    def test_round_trip(self, mask: np.ndarray) -> None:
        height, width = mask.shape
        np.testing.assert_array_equal(decode_rle(encode_rle(mask), size=(height, width)), mask)
        if mask.any():
            assert rle_to_box(encode_rle(mask), size=(height, width)) == mask_to_box(mask)
            x1, y1, x2, y2 = map(int, mask_to_box(mask))
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1].any()
            assert mask[y2 - 1].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()

    def test_box_of_runs(self) -> None:
        assert rle_to_box({"size": [3, 4], "counts": "41211"}) == (1.0, 1.0, 3.0, 3.0)
        # a run from the foot of the second column to the head of the third, beside runs of nothing
        assert rle_to_box({"size": [3, 4], "counts": [0, 0, 5, 2, 5, 0]}) == (1.0, 0.0, 3.0, 3.0)
        with pytest.raises(InputError, match="no True pixel"):
            rle_to_box({"size": [3, 4], "counts": [5, 0, 7]})
        with pytest.raises(InputError, match=r"RLE is 3x4 .* image is 4x3"):
            rle_to_box({"size": [3, 4], "counts": [6, 6]}, size=(4, 3))

    def test_long_runs_round_trip(self) -> None:
        mask = np.zeros((700, 900), bool)
        mask[100:650, 3:880] = True
        np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)

    @pytest.mark.parametrize(
        ("rle", "message"),
        [
            ({"size": [3, 4]}, "An RLE must be"),
            ([1, 2], "An RLE must be"),
            ({"size": [3], "counts": [12]}, "two positive integers"),
            ({"size": [3, -4], "counts": [12]}, "two positive integers"),
            ({"size": [3.0, 4.0], "counts": [12]}, "two positive integers"),
            ({"size": [10**6, 10**6], "counts": [10**12]}, "more than 64000000 pixels"),
            ({"size": [3, 4], "counts": [4, 1]}, "add up to 5 .* needs 12"),
            ({"size": [3, 4], "counts": [13]}, "add up to 13"),
            ({"size": [3, 4], "counts": [14, -2]}, "smallest -2"),
            ({"size": [3, 4], "counts": []}, "add up to 0"),
            ({"size": [3, 4], "counts": [10**4299] * 20}, "more than 2\\^40"),
            ({"size": [3, 4], "counts": [12.0]}, "string or a list of integers"),
            ({"size": [3, 4], "counts": None}, "string or a list of integers"),
            ({"size": [3, 4], "counts": "4121"}, "add up to 9 .* needs 12"),
            ({"size": [3, 4], "counts": "\x00"}, "not in COCO's compressed form"),
            ({"size": [3, 4], "counts": "é"}, "not ASCII"),
            ({"size": [3, 4], "counts": "o"}, "middle of a number"),
            ({"size": [3, 4], "counts": "o" * 50}, "not in COCO's compressed form"),
        ],
    )
    def test_bad_encodings(self, rle: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            decode_rle(rle)

    def test_size_of_the_image(self) -> None:
        with pytest.raises(InputError, match=r"RLE is 3x4 .* image is 4x3"):
            decode_rle({"size": [3, 4], "counts": [12]}, size=(4, 3))


class TestPolygons:
    def test_box_spans_all_polygons(self) -> None:
        assert polygons_to_box([[5, 6, 9, 6, 9, 8.5], [1.5, 7, 2, 7, 2, 11]]) == (1.5, 6.0, 9.0, 11.0)
        assert polygons_to_box([np.array([0.0, 0, 4, 0, 4, 3])]) == (0.0, 0.0, 4.0, 3.0)  # type: ignore[list-item]

    @pytest.mark.parametrize(
        "polygons",
        [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [1, 2, 3, 4, 5, 6], "polygon", None]
        + [[[0, 0, 1, 1, 2, bad]] for bad in (float("nan"), float("inf"), "3", None, True)],
    )
    def test_bad_polygons(self, polygons: Any) -> None:
        with pytest.raises(InputError, match="olygon"):
            polygons_to_box(polygons)
