"""What server and worker say to each other: frames of JSON with bytes behind it, over a pipe.

Not pickles: the worker decodes pictures of strangers, and what it says must not be able to run anything in the server.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("!II")
LONGEST = 2**31
"""Bytes of a part; more is a fault."""


def pack(message: dict[str, Any], blob: bytes = b"") -> bytes:
    """A frame: both lengths, the message as JSON, the bytes."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return b"".join((_LENGTHS.pack(len(text), len(blob)), text, blob))


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame.

    Raises:
        asyncio.IncompleteReadError: the other side is gone.
        ValueError: what came is no frame.
    """
    lengths = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    _check(lengths)
    text = await reader.readexactly(lengths[0])
    return json.loads(text), await reader.readexactly(lengths[1])


def read_frame_from(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next frame of a file; None where the other side is gone.

    Raises:
        ValueError: what came is no frame.
    """
    head = file.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        return None
    lengths = _LENGTHS.unpack(head)
    _check(lengths)
    text, blob = file.read(lengths[0]), file.read(lengths[1])
    if len(text) < lengths[0] or len(blob) < lengths[1]:
        return None
    return json.loads(text), blob


def _check(lengths: tuple[int, ...]) -> None:
    if max(lengths) > LONGEST:
        raise ValueError(f"a frame of {max(lengths)} bytes")
