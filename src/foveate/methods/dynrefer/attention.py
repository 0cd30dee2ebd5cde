"""Where the model read: the cross-attention of a region's queries to what its views show (spec 2.3 to 2.7).

The Q-Former's queries attend to 1 + g*g tokens of a region: a class token, made of those of all views, and the g x g
cells of the region, each made of what all views show there. This is the only place where the answers look at places, so
it is what is shown, as a mean over the heads and over all layers that have cross-attention:

    A[j, k]  of query j to token k                                                (Q, 1 + g*g), rows add up to 1
    region:  mean over j of A[j, k]
    a word:  sum over j of a[j] A[j, k]

with a[j] the attention of that word's query in its head to the region token that query j became, as a mean over the
head's heads and layers. The second line follows the word through two attentions and leaves out what mixes between
them: the Q-Former's self-attention and the residuals. Nor does it say where the tower's own attention got what stands
in a cell. Cells are places in the region; RoIAlign, which is linear, says which patches of each view a cell is made of
(`Attention.in_view`). The shifts that the align module learnt for context views are not followed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.ops.roi_align import axis_weights
from foveate.vision.drawing import GREY, MAX_SIDE, PALETTE, fit_text, more_regions

SAMPLES = 2
"""Of a RoI bin along each axis (spec 2.3)."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Where one query of a region read, through the views of some tasks.

    Attributes:
        tasks: the tasks that looked through these views.
        query: "region" for all queries of the Q-Former alike, "category" or "tag" for that of a word.
        word: the category or tag; None of "region".
        cells: (g, g) float32, share of each cell of the region, rows from top to bottom.
        whole: share of the class token, which stands for the views as wholes; with the cells it adds up to 1.
        coefficients: (n,) t of the views.
        boxes: (n,) xyxy pixels of the views in the image.
    """

    tasks: tuple[str, ...]
    query: str
    word: str | None
    cells: np.ndarray = field(repr=False)
    whole: float
    coefficients: tuple[float, ...]
    boxes: tuple[tuple[int, int, int, int], ...] = field(repr=False)
    _in_patches: np.ndarray = field(repr=False)  # (n, 4) float32: the region in each view, xyxy in patches

    @property
    def label(self) -> str:
        """The query in words."""
        return "all of the region" if self.word is None else f"{self.query}: {self.word}"

    def in_view(self, number: int) -> np.ndarray:
        """(g, g) float32: share of each patch of a view, which tile the view's box; they add up to 1 - `whole`.

        A cell is a mean of bilinear samples of patches; its share goes to them by their weights.
        """
        side = len(self.cells)
        x0, y0, x1, y1 = torch.from_numpy(self._in_patches[number])[:, None]
        along_y = axis_weights(y0, y1, side, side, SAMPLES, False)[0].numpy()
        along_x = axis_weights(x0, x1, side, side, SAMPLES, False)[0].numpy()
        return along_y.T @ self.cells @ along_x

    def heat(self, number: int) -> Image.Image:
        """(g x g) RGBA of a view, to be laid over its box: no colour where nothing was read, opaque red where most was,
        in proportion between."""
        share = self.in_view(number)
        share = share / max(float(share.max()), 1e-12)
        pixels = np.empty((*share.shape, 4), np.uint8)
        pixels[..., 0], pixels[..., 2] = 255, 0
        pixels[..., 1] = np.rint(200 * (1 - share))
        pixels[..., 3] = np.rint(255 * share)
        return Image.fromarray(pixels, "RGBA")


class Readings:
    """What a tapped Q-Former attended to."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._layers = 0

    def add(self, query: Tensor, key: Tensor, heads: int) -> None:
        """Projected queries (R, Q, H*d) and keys (R, K, H*d) of a layer."""
        query, key = (part.unflatten(-1, (heads, -1)).transpose(1, 2).float() for part in (query, key))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        attention = scores.softmax(dim=-1).mean(dim=1)
        self._sum = attention if self._sum is None else self._sum + attention
        self._layers += 1

    def take(self) -> Tensor:
        """(R, Q, K) float32 of the last call, mean over its heads and layers."""
        assert self._sum is not None
        mean = self._sum / self._layers
        self._sum, self._layers = None, 0
        return mean


@contextmanager
def tap_qformer(qformer: nn.Module) -> Iterator[Readings]:
    """Reads the cross-attention of a Q-Former while it runs in the body of the `with`, of this thread's calls alone.

    The layers give their queries and keys anyway, so that their own attention stays as it is, and so do the results.
    """
    readings = Readings()
    owner = threading.get_ident()
    handles = []

    def listen(attention: Any) -> None:
        parts: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                if threading.get_ident() != owner:
                    return
                parts[name] = output
                if len(parts) == 2:
                    readings.add(parts.pop("query"), parts.pop("key"), attention.num_attention_heads)

            return hook

        for name in ("query", "key"):
            handles.append(getattr(attention, name).register_forward_hook(keep(name)))

    try:
        for name, module in qformer.named_modules():
            if name.endswith("crossattention.attention"):
                listen(module)
        yield readings
    finally:
        for handle in handles:
            handle.remove()


def plot_attention(regions: Sequence[Any], *, side: int = 160) -> Image.Image:
    """A row for each region and query: the views, and over each in red the patches that were read.

    The first rows are shown where all of them would be higher than 16,383 pixels.

    Args:
        regions: that were described with `attention=True`.
        side: pixels of a view in the picture.

    Raises:
        InputError: a region has no attention.
    """
    for number, region in enumerate(regions, 1):
        if not region.attention:
            raise InputError(f"region {number} has no attention to draw; describe it with attention=True.")
    font = ImageFont.load_default(12)
    gap, head = 8, 36
    rows = [(number, region, own) for number, region in enumerate(regions, 1) for own in region.attention]
    shown = rows[: (MAX_SIDE - gap - head) // (side + head + gap)]
    left_out = len(regions) - (shown[-1][0] if shown else 0)
    columns = max((len(own.boxes) for *_, own in shown), default=1)
    size = (columns * (side + gap) + gap, max(1, len(shown)) * (side + head + gap) + gap + head * (left_out > 0))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for row, (number, region, own) in enumerate(shown):
        top = gap + row * (side + head + gap)
        said = f"{number}: {own.label} - {1 - own.whole:.0%} in the region, {own.whole:.0%} to the views as wholes"
        draw.text((gap, top), fit_text(said, font, size[0] - 2 * gap), PALETTE[(number - 1) % len(PALETTE)], font=font)
        images = {view.box: view.image for view in region.views}
        for column, (t, box) in enumerate(zip(own.coefficients, own.boxes, strict=True)):
            left = gap + column * (side + gap)
            draw.text((left, top + 16), f"t = {t:g}", fill=GREY, font=font)
            view = images[box].convert("L").convert("RGBA").resize((side, side))
            # Patches as they are: between them there is nothing that could be shown.
            heat = own.heat(column).resize((side, side), Image.Resampling.NEAREST)
            heat.putalpha(heat.getchannel("A").point(lambda value: value * 3 // 4))
            picture.paste(Image.alpha_composite(view, heat).convert("RGB"), (left, top + head))
    if left_out:
        draw.text((gap, size[1] - head), more_regions(left_out), fill=GREY, font=font)
    return picture
