"""How a picture is cut into partitions, and in which order their tokens reach the language model (spec 2.1, 2.5).

Symbols: P partitions, the first the full picture, then k = R * C sub-images row by row; N = S * S tokens of each.
The sub-images tile a canvas on which the picture keeps its shape, padded in the middle; their tokens form a mosaic of
R * S rows and C * S columns, of which the padding is cut off again. The full picture is stretched to a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

NEWLINE = -1
"""Stands for a newline token in a sequence of token numbers."""


@dataclass(frozen=True)
class Partitions:
    """The partitions of one picture.

    Attributes:
        side: S, tokens per side of a partition.
        grid: (R, C), rows and columns of sub-images; (0, 0) for the full picture alone.
        size: (height, width) of the picture in pixels; only its shape matters. Not read without sub-images.
        tile: pixels per side of a partition.
        newlines: whether the host ends each row of the mosaic with a newline token.
        rounding: "current" or "legacy", of the unpadded mosaic.
    """

    side: int
    grid: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (1, 1)
    tile: int = 336
    newlines: bool = False
    rounding: str = "current"

    @property
    def cells(self) -> int:
        """N, tokens of a partition."""
        return self.side**2

    @property
    def count(self) -> int:
        """P, partitions."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def candidates(self) -> int:
        """P * N, tokens before any is cut off or dropped."""
        return self.count * self.cells

    @property
    def full_length(self) -> int:
        """Tokens that reach the language model where nothing is dropped, newlines included."""
        return len(self._rows) + self.cells

    @cached_property
    def crop(self) -> tuple[int, int, int, int]:
        """Rows (first, end) and columns (first, end) of the mosaic that are left when the padding is cut off."""
        rows, columns = self.grid[0] * self.side, self.grid[1] * self.side
        height, width = self.size
        if width / height > columns / rows:
            pad = (rows - self._scaled(height, columns, width)) // 2
            return pad, rows - pad, 0, columns
        pad = (columns - self._scaled(width, rows, height)) // 2
        return 0, rows, pad, columns - pad

    def _scaled(self, length: int, target: int, reference: int) -> int:
        """`length` in tokens where `reference` becomes `target`."""
        if self.rounding == "legacy":  # whole part of a single-precision product, which may be one too small
            return int(np.float32(length) * (np.float32(target) / np.float32(reference)))
        return int(round(length * (target / reference), 7))

    @cached_property
    def _mosaic(self) -> Tensor:
        """(R * S, C * S) number of each cell's token among the P * N."""
        rows, columns = self.grid
        numbers = torch.arange(self.cells, self.candidates).view(rows, columns, self.side, self.side)
        return numbers.permute(0, 2, 1, 3).reshape(rows * self.side, columns * self.side)

    @cached_property
    def _rows(self) -> Tensor:
        """The unpadded mosaic with its newlines, row by row, flat."""
        if self.count == 1:
            return torch.empty(0, dtype=torch.long)
        top, bottom, left, right = self.crop
        inside = self._mosaic[top:bottom, left:right]
        if self.newlines:
            inside = torch.cat([inside, torch.full((len(inside), 1), NEWLINE)], dim=1)
        return inside.flatten()

    @cached_property
    def valid(self) -> Tensor:
        """(P, N) bool: cells that are not cut off with the padding."""
        valid = torch.zeros(self.candidates, dtype=torch.bool)
        valid[: self.cells] = True
        valid[self._rows[self._rows != NEWLINE]] = True
        return valid.view(self.count, self.cells)

    @property
    def newline_count(self) -> int:
        """Newline tokens of the host where nothing is dropped."""
        return int((self._rows == NEWLINE).sum())

    def sequence(self, keep: Tensor, newline: str = "none") -> tuple[Tensor, Tensor]:
        """Kept tokens in the order of the language model: the full picture's in raster order, then the mosaic's.

        Args:
            keep: (P, N) bool; cells in padding are passed over.
            newline: "none", "rows" (of mosaic rows that kept a token) or "all".

        Returns:
            (n,) numbers among the P * N, `NEWLINE` for a newline token; and (n,) places in the sequence that nothing is
            dropped from.
        """
        keep = keep.flatten().cpu()
        numbers = torch.cat([torch.arange(self.cells), self._rows])
        chosen = keep[numbers.clamp(min=0)] & (numbers != NEWLINE)
        if self.newlines and newline != "none" and len(self._rows):
            top, bottom, *_ = self.crop
            rows = chosen[self.cells :].view(bottom - top, -1)
            rows[:, -1] = True if newline == "all" else rows.any(dim=1)
        places = chosen.nonzero()[:, 0]
        return numbers[places], places

    def weights(self, *, padded: bool = True) -> tuple[Tensor, Tensor]:
        """How much of each cell of the full picture a row and a column of sub-images shows (spec 2.6).

        Args:
            padded: as the sub-images lie on the padded canvas; otherwise in equal blocks.

        Returns:
            (R, S) and (C, S), double precision: the share of a cell's height and width. A sub-image's score of a map A
            is rows @ A @ columns.T.
        """
        edges = self._edges() if padded else tuple(np.linspace(0, 1, parts + 1) for parts in self.grid)
        cells = np.arange(self.side + 1) / self.side
        shares = []
        for edge in edges:
            low = np.maximum(edge[:-1, None], cells[None, :-1])
            high = np.minimum(edge[1:, None], cells[None, 1:])
            shares.append(torch.from_numpy(np.clip(high - low, 0, None) * self.side))
        return shares[0], shares[1]

    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Borders of the rows (R + 1) and columns (C + 1) of tiles as shares of the picture's height and width."""
        ends = []
        for edges in self._unclipped_edges():
            ends.append(np.clip(edges, 0, 1))
        return ends[0], ends[1]

    def _unclipped_edges(self) -> tuple[np.ndarray, np.ndarray]:
        canvas = (self.grid[0] * self.tile, self.grid[1] * self.tile)
        height, width = self.size
        # The picture fills the canvas one way; the other way it is rounded up to whole pixels.
        if canvas[1] / width < canvas[0] / height:
            lengths = (min(math.ceil(height * (canvas[1] / width)), canvas[0]), canvas[1])
        else:
            lengths = (canvas[0], min(math.ceil(width * (canvas[0] / height)), canvas[1]))
        both = []
        for parts, length, whole in zip(self.grid, lengths, canvas, strict=True):
            both.append((np.arange(parts + 1) * self.tile - (whole - length) // 2) / length)
        return both[0], both[1]

    def regions(self) -> np.ndarray:
        """(P, 4) boxes xyxy, in pixels of the picture, that each partition shows; those of sub-images reach beyond the
        picture where they are padded."""
        height, width = self.size
        boxes = [(0.0, 0.0, float(width), float(height))]
        if self.count > 1:
            ys, xs = self._unclipped_edges()
            boxes += [
                (xs[x] * width, ys[y] * height, xs[x + 1] * width, ys[y + 1] * height)
                for y in range(self.grid[0])
                for x in range(self.grid[1])
            ]
        return np.array(boxes)
