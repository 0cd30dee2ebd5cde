"""The one door for images and region masks: whatever a caller holds becomes an upright 8-bit RGB image, or an
`InputError` that names the source and says what to do.

Sizes are checked before anything is decoded, and only formats with a decoder inside Pillow are opened (EPS and WMF,
which start other programs, are not). Nothing here needs torch.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import stat
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.errors import InputError

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

MAX_PIXELS = 64_000_000
MAX_BYTES = 100 * 2**20

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "JPEG2000", "AVIF", "PPM")
# One slash is enough, for `Path("https://...")` has only that left; "C:/..." is no URL.
_URL = re.compile(r"^([a-z][a-z0-9+.-]+:/|data:)", re.IGNORECASE)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTIBLE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa")
_EXIF_ORIENTATION = 0x0112
# EXIF 2.32, tag 0x0112: the operation that makes an image stored with this orientation upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Any image source -> a new upright RGB `PIL.Image` that shares no memory with the source.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled by 1/257 and rounded
    (65535 -> 255); CMYK, palette, grey and 1-bit images are converted; of an animation the first frame is taken.

    Args:
        source: path, encoded bytes, `PIL.Image`, or uint8 array of shape (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey.
        max_pixels: most pixels (width x height) that are decoded; checked on the header, before decoding.
        max_bytes: most bytes of a file or of encoded bytes that are read.

    Raises:
        InputError: URL; missing, empty, oversized, truncated or corrupt file; not an image; a pixel type whose range is
            not defined (32-bit integer, float); an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    name = describe_source(source)
    image = _decoded(source, name, max_pixels, max_bytes)
    return _upright(_to_rgb(image, name), image, name)


def load_mask(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A region drawn as an image -> upright bool mask (H, W), set where the image's own value is not zero.

    That value is the number in a 1-bit, grey or 16-bit image, the index in a palette image, and in others the colour
    (black is zero). Colours of a palette and transparency may draw the region instead, where index or colour is the
    same everywhere; where they draw another region, the image is refused.

    Raises:
        InputError: as `load_image`, or palette, colour and transparency draw different regions.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source, max_pixels)
    name = describe_source(source)
    image = _decoded(source, name, max_pixels, max_bytes)
    meanings = _mask_meanings(image, name)
    telling = [mask for mask in meanings if mask.any() and not mask.all()] or meanings[:1]
    if any((mask != telling[0]).any() for mask in telling[1:]):
        raise InputError(
            f"{_capital(name)} is no clear mask: what is black in it, what is transparent and what has index 0 in its "
            "palette are different pixels; save it as a grey image in which 0 is outside."
        )
    return np.array(_upright(Image.fromarray(telling[0]), image, name))


def load_class_map(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """An image whose values are numbers of classes -> (H, W): the value of a grey image, the index of a palette image.

    Raises:
        InputError: as `load_image`, or the image has colours that are no numbers.
    """
    name = describe_source(source)
    image = _decoded(
        _from_array(source, max_pixels) if isinstance(source, np.ndarray) else source, name, max_pixels, max_bytes
    )
    if image.mode not in ("1", "L", "P", "I", *_SIXTEEN_BIT_MODES):
        raise InputError(
            f"{_capital(name)} has the colours of {image.mode}, not a class for each pixel; give a grey image."
        )
    return np.asarray(_upright(image, image, name)).astype(np.int64)


def _mask_meanings(image: Image.Image, name: str) -> list[np.ndarray]:
    """What may be meant by an image as a mask, the likeliest first. Each one is bool (H, W)."""
    if image.mode in ("1", "L", "I", *_SIXTEEN_BIT_MODES):
        return [np.asarray(image).astype(bool)]
    rgba = np.asarray((image if image.has_transparency_data else _to_rgb(image, name)).convert("RGBA"))
    opaque = rgba[..., 3] != 0
    # Under full transparency there may be any colour, which nobody has seen.
    meanings = [rgba[..., :3].any(axis=-1) & opaque, opaque]
    return [np.asarray(image).astype(bool), *meanings] if image.mode == "P" else meanings


def check_image_file(path: str | os.PathLike[str]) -> None:
    """Refuses at once what `load_image` would refuse later: a URL, a folder, a path without a file.

    Raises:
        InputError: it is one of these.
    """
    name, path = describe_source(path), os.fspath(path)
    if _URL.match(path):
        raise InputError(f"{_capital(name)} is a URL; download it first and give the file, nothing is fetched here.")
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{_capital(name)} does not exist; check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise _unreadable(name, error) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{_capital(name)} is {kind}; give the path of an image file.")


def _decoded(source: ImageSource, name: str, max_pixels: int, max_bytes: int) -> Image.Image:
    """The image as it is stored, with its pixels in memory."""
    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        data = _read_file(os.fspath(source), name, max_bytes)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        raise InputError(
            f"An image must be a path, bytes, a PIL image or a uint8 array, got {type(source).__name__}; "
            "convert it first."
        )
    if not data:
        raise InputError(f"{_capital(name)} is empty (0 bytes); give a complete image file.")
    if len(data) > max_bytes:
        raise InputError(
            f"{_capital(name)} is larger than the limit of {max_bytes} bytes; shrink the image or raise max_bytes."
        )
    return _decode(_open(data, name, max_pixels), name, max_pixels)


def to_array(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Any image source -> writable uint8 array (H, W, 3), RGB. Arguments and errors as `load_image`."""
    return np.array(load_image(source, max_pixels=max_pixels, max_bytes=max_bytes))


def describe_source(source: object) -> str:
    """How messages name an image source: its path, or its type and size. Never raises."""
    if isinstance(source, (str, os.PathLike)):
        return f"image file {_shorten(str(source))!r}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image bytes ({memoryview(source).nbytes} bytes)"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        where = f" from {_shorten(str(filename))!r}" if filename else ""
        return f"PIL image (mode {source.mode}, {source.width}x{source.height}){where}"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape} and dtype {source.dtype}"
    return f"{type(source).__name__} object"


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{_capital(name)} has no pixels ({width}x{height}); give an image of at least 1x1.")
    if width * height > max_pixels:
        raise InputError(
            f"{_capital(name)} has {width}x{height} = {width * height} pixels, more than the limit of {max_pixels}; "
            "shrink the image or raise max_pixels."
        )


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    name = describe_source(array)
    if array.dtype != np.uint8:
        raise InputError(
            f"An image array must be uint8 with values 0..255, got an {name}; "
            "scale and convert it with .astype('uint8')."
        )
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (3, 4) else ""
        raise InputError(f"An image array must be (H, W), (H, W, 3) or (H, W, 4), got an {name}{hint}.")
    _check_pixels(array.shape[1], array.shape[0], name, max_pixels)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def _read_file(path: str, name: str, max_bytes: int) -> bytes:
    check_image_file(path)
    try:
        with Path(path).open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{_capital(name)} cannot be read ({reason}); check the path and its permissions.")


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{_capital(name)} has more pixels than the limit of {max_pixels} (and than Pillow's own "
            "Image.MAX_IMAGE_PIXELS allows); shrink the image."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{_capital(name)} is not an image in a known format (or its header is cut off); "
            f"give a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}."
        ) from error
    except Exception as error:  # hostile headers make Pillow's parsers raise anything
        raise InputError(f"{_capital(name)} has a damaged header ({_reason(error)}); give an intact file.") from error


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_pixels(*image.size, name, max_pixels)
    try:
        image.load()
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise InputError(
            f"{_capital(name)} is truncated or corrupt ({_reason(error)}); give an intact file."
        ) from error
    _check_pixels(*image.size, name, max_pixels)
    return image


def _upright(image: Image.Image, stored: Image.Image, name: str) -> Image.Image:
    """`image`, made of the pixels of `stored`, turned as the EXIF data of `stored` ask for."""
    orientation = _orientation(stored, name)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return _shorten(text.splitlines()[0]) if text else type(error).__name__


def _orientation(image: Image.Image, name: str) -> int:
    """EXIF orientation 1..8 of a loaded image (a PNG's may follow its pixels); 1 where there is none."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception as error:  # the pixels are intact: viewers show such files as stored, and so do we
        logger.warning("%s has unreadable EXIF data (%s); its orientation is ignored.", name, _reason(error))
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    # Pillow gives PGM files deeper than 8 bits as mode I, already scaled to 0..65535
    if image.mode in _SIXTEEN_BIT_MODES or (image.mode == "I" and image.format == "PPM"):
        image = _sixteen_to_eight_bit(image)
    elif image.mode not in _CONVERTIBLE_MODES:
        raise InputError(
            f"{_capital(name)} has pixels of mode {image.mode}, whose range is not defined; "
            "convert it to 8-bit RGB first."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    else:
        rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    # What described the stored image (EXIF orientation, transparency) must not be applied to the new one again.
    rgb.info = {}
    return rgb


def _sixteen_to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey -> L, or LA where one grey value is marked transparent (PNG tRNS). 65535 = 255 * 257."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


# ---------------------------------------------------------------------------------------------------------------------
# Regions: masks, COCO run-length encodings and polygons
# ---------------------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]


def mask_to_box(mask: np.ndarray) -> Box:
    """The smallest half-open xyxy box (pixels) that holds all True pixels of a bool mask (H, W).

    Raises:
        InputError: not a two-dimensional bool array, or no pixel is True.
    """
    mask = _checked_mask(mask)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        raise InputError(f"The mask of shape {mask.shape} has no True pixel; give a mask that covers something.")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Bool mask (H, W) -> COCO compressed run-length encoding {"size": [H, W], "counts": str}, ready for JSON.

    Raises:
        InputError: not a two-dimensional bool array, or an empty one.
    """
    from pycocotools import mask as coco_mask

    mask = _checked_mask(mask)
    rle: Any = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in mask.shape], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: dict[str, Any], *, size: tuple[int, int] | None = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """COCO run-length encoding -> bool mask (H, W).

    Args:
        rle: {"size": [H, W], "counts": ...} with compressed counts (str or bytes) or uncompressed ones (list of int,
            runs of 0 and 1 in turn down the columns).
        size: (H, W) that the mask must have, e.g. that of its image.

    Raises:
        InputError: a wrong or missing key, malformed counts, or runs that do not add up to H * W.
    """
    from pycocotools import mask as coco_mask

    height, width, runs = _checked_runs(rle, size)
    uncompressed: Any = {"size": [height, width], "counts": runs}
    encoded: Any = coco_mask.frPyObjects(uncompressed, height, width)
    return coco_mask.decode(encoded).astype(bool)


def rle_to_box(rle: dict[str, Any], *, size: tuple[int, int] | None = None) -> Box:
    """What `mask_to_box` gives of a decoded RLE, from its runs alone: its cost does not grow with the picture.

    Args:
        rle, size: as `decode_rle` takes them.

    Raises:
        InputError: as `decode_rle`, or the mask is empty.
    """
    height, width, runs = _checked_runs(rle, size)
    ends = np.cumsum(np.array(runs, dtype=np.int64))
    starts, ends = ends[:-1][::2], ends[1::2]  # of the runs of 1, which are every second
    drawn = ends > starts
    if not drawn.any():
        raise InputError(f"The mask of shape {(height, width)} has no True pixel; give a mask that covers something.")
    first, last = starts[drawn], ends[drawn] - 1
    top, bottom = int((first % height).min()), int((last % height).max())
    if (first // height != last // height).any():  # it goes on at the top of the next column
        top, bottom = 0, height - 1
    return float(first[0] // height), float(top), float(last[-1] // height + 1), float(bottom + 1)


def _checked_runs(rle: dict[str, Any], size: tuple[int, int] | None) -> tuple[int, int, list[int]]:
    """Height, width and runs of an RLE. Raises as `decode_rle`."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise InputError(f'An RLE must be {{"size": [H, W], "counts": ...}}, got {_shorten(repr(rle))}.')
    shape = rle["size"]
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(_is_int(side) and side > 0 for side in shape):
        raise InputError(f"The size of an RLE must be two positive integers [H, W], got {_shorten(repr(shape))}.")
    height, width = int(shape[0]), int(shape[1])
    if height * width > MAX_PIXELS:
        raise InputError(f"The RLE of size {height}x{width} has more than {MAX_PIXELS} pixels; shrink the mask.")
    if size is not None and (height, width) != tuple(size):
        raise InputError(
            f"The RLE is {height}x{width} (height x width) but its image is {size[0]}x{size[1]}; they must agree."
        )
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = run_lengths(counts)
    elif isinstance(counts, (list, tuple)) and all(_is_int(run) for run in counts):
        runs = [int(run) for run in counts]
    else:
        raise InputError(f"The counts of an RLE must be a string or a list of integers, got {_shorten(repr(counts))}.")
    if any(abs(run) > 2**40 for run in runs):  # the sum may have more digits than Python writes out
        raise InputError(f"The RLE of size {height}x{width} has a run of more than 2^40 pixels; give its own runs.")
    # pycocotools writes past its buffer or stops short on runs that do not fit, so they are checked before it sees them
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise InputError(
            f"The runs of the RLE add up to {sum(runs)} (smallest {min(runs, default=0)}) but its size "
            f"{height}x{width} needs {height * width}; the encoding is truncated or of another image."
        )
    return height, width, runs


def polygons_to_box(polygons: Sequence[Sequence[float]]) -> Box:
    """COCO polygons [[x1, y1, x2, y2, ...], ...] in pixels -> the xyxy box from the smallest to the largest coordinate
    of all of them. Polygons on one line give a box without width or height; the caller decides what that means.

    Raises:
        InputError: no polygon, fewer than three points, an odd number of values, or a value that is no finite number.
    """
    if isinstance(polygons, (str, bytes)) or not isinstance(polygons, Sequence) or len(polygons) == 0:
        raise InputError(
            f"Polygons must be a non-empty list [[x1, y1, x2, y2, ...], ...], got {_shorten(repr(polygons))}."
        )
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple, np.ndarray)) or len(polygon) < 6 or len(polygon) % 2:
            raise InputError(
                f"A polygon must be a flat list of at least three x, y pairs, got {_shorten(repr(polygon))}."
            )
        for value in polygon:
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise InputError(f"Polygon coordinates must be finite numbers in pixels, got {_shorten(repr(value))}.")
    xs = [float(value) for polygon in polygons for value in polygon[0::2]]
    ys = [float(value) for polygon in polygons for value in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def _checked_mask(mask: np.ndarray) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise InputError(f"A mask must be a non-empty bool array of shape (H, W), got {describe_source(mask)}.")
    return mask


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def run_lengths(counts: str | bytes) -> list[int]:
    """COCO's compressed counts -> run lengths: base-32 little-endian digits (bit 5 = more follow, bit 4 of the last =
    sign) in characters from "0", and from the fourth run on the difference to the run two before.

    Raises:
        InputError: a character outside the code, or a number that is cut off. Negative runs are the caller's to refuse.
    """
    try:
        codes = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise InputError(f"The counts of the RLE are not ASCII: {_shorten(repr(counts))}.") from error
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        digit = code - 48
        if not 0 <= digit < 64 or shift > 35:
            raise InputError(f"The counts of the RLE are not in COCO's compressed form: {_shorten(repr(counts))}.")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value |= -1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise InputError(f"The counts of the RLE end in the middle of a number: {_shorten(repr(counts))}.")
    return runs
