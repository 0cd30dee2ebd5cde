"""A picture of why a region was looked at as it was: nested views, candidates, hash distances (spec 4.2, 8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.vision.drawing import GREY, MAX_SIDE, PALETTE, fit_text, more_regions

from .configuration import CANDIDATE_VIEWS
from .results import Region, ViewChoice
from .views import hash_distances, interpolate_boxes, pixel_boxes

_GAP, _HEAD, _LABEL, _BAR = 8, 20, 34, 72


def explain_views(image: Image.Image, regions: Sequence[Region], *, side: int = 96) -> Image.Image:
    """A block for each region and group of tasks.

    Left the image with the nested views that were chosen; right every candidate crop with its t, and below it a bar of
    d = distance / t, the score by which searches choose. The chosen ones are framed in the colours of the boxes and
    numbered in the order in which the model takes them. In a pairwise search the score grows with each view chosen: the
    bar stacks what each of them adds, in its colour.

    The first blocks are shown where all of them would be higher than 16,383 pixels.

    Args:
        image: RGB that the regions are of.
        side: pixels of a crop in the picture.
    """
    blocks = [
        (number, region, choice)
        for number, region in enumerate(regions, 1)
        for choice in region.choices or (ViewChoice((), tuple(view.t for view in region.views) or (0.0,)),)
    ]
    height = _HEAD + _LABEL + side + _BAR + 2 * _GAP
    shown = blocks[: (MAX_SIDE - _HEAD - 2 * _GAP) // height]
    drawn = [_block(image, number, region, choice, side, height) for number, region, choice in shown]
    left_out = len(regions) - (shown[-1][0] if shown else 0)
    width = max((block.width for block in drawn), default=1)
    picture = Image.new("RGB", (width, max(1, height * len(drawn)) + (_HEAD + _GAP) * (left_out > 0)), "white")
    for row, block in enumerate(drawn):
        picture.paste(block, (0, row * height))
    if left_out:
        font = ImageFont.load_default(12)
        ImageDraw.Draw(picture).text((_GAP, height * len(drawn)), more_regions(left_out), fill=GREY, font=font)
    return picture


def _block(image: Image.Image, number: int, region: Region, choice: ViewChoice, side: int, height: int) -> Image.Image:
    font = ImageFont.load_default(12)
    columns = sorted({0.0, *CANDIDATE_VIEWS, *choice.coefficients})
    boxes = pixel_boxes(interpolate_boxes(np.array([region.box]), np.array(columns), *image.size), *image.size)[0]
    below = height - _HEAD - 2 * _GAP  # room for the image, and for crops with labels and bars
    scale = below / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    left = below + 2 * _GAP
    picture = Image.new("RGB", (left + len(columns) * (side + _GAP), height), "white")
    draw = ImageDraw.Draw(picture)

    how = choice.selection if choice.distances else "not searched; the distances are those of the official search"
    what = ", ".join(choice.tasks) or "views"
    title = f"{number}: {what} - {how}; d = hash distance / t"
    draw.text((_GAP, _GAP // 2), fit_text(title, font, picture.width - 2 * _GAP), fill=GREY, font=font)
    picture.paste(small, (_GAP, _HEAD + _GAP))
    places: dict[float, list[int]] = {}
    for place, t in enumerate(choice.coefficients):
        places.setdefault(t, []).append(place)
    # Wide views first, so that the narrow ones lie on top of them.
    for t, chosen in sorted(places.items(), reverse=True):
        x0, y0, x1, y1 = (float(value) * scale for value in boxes[columns.index(t)])
        corners = (_GAP + x0, _HEAD + _GAP + y0, _GAP + max(x0, x1 - 1), _HEAD + _GAP + max(y0, y1 - 1))
        draw.rectangle(corners, outline=_colour(chosen[0]), width=2)

    bars = _bars(image, region, choice, columns)
    highest = max((sum(value for value, _ in bar) for bar in bars), default=0.0) or 1.0
    for column, (t, box, bar) in enumerate(zip(columns, boxes, bars, strict=True)):
        x, y = left + column * (side + _GAP), _HEAD + _GAP
        chosen = places.get(t, [])
        colour = _colour(chosen[0]) if chosen else GREY
        draw.text((x, y), f"t = {t:g}", fill=colour, font=font)
        if chosen:
            label = "view " + ", ".join(str(place + 1) for place in chosen)
            draw.text((x, y + 15), fit_text(label, font, side), fill=colour, font=font)
        y += _LABEL
        picture.paste(image.crop(tuple(box.tolist())).resize((side, side)), (x, y))
        if chosen:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=colour, width=3)
        if t == 0:
            continue  # the region has no distance to itself
        base, top = y + side + _BAR, y + side + 18.0
        bottom = float(base)
        for value, part in bar:
            up = value / highest * (base - top)
            draw.rectangle((x + side // 4, bottom - up, x + side * 3 // 4, bottom), fill=part)
            bottom -= up
        draw.text((x, y + side + 3), f"d = {sum(value for value, _ in bar):.4g}", fill=colour, font=font)
        draw.line((x, base, x + side, base), fill=GREY)
    return picture


def _bars(
    image: Image.Image, region: Region, choice: ViewChoice, columns: Sequence[float]
) -> list[list[tuple[float, tuple[int, int, int]]]]:
    """For each column the parts (height, colour) of its score in the search's last round."""
    selection = choice.selection if choice.distances else "official"
    [distances] = hash_distances([image], [np.array([region.box])], columns, selection=selection)
    if selection != "pairwise":
        return [
            [(float(d) / t, _colour(choice.coefficients.index(t)) if t in choice.coefficients else GREY)] if t else []
            for t, d in zip(columns, distances[0, 0].tolist(), strict=True)
        ]
    # A view's score is that of the round in which it was chosen: what later ones would have added does not count.
    order = {t: place for place, t in enumerate(choice.coefficients)}
    rounds = len(choice.coefficients) - 1
    bars = []
    for column, t in enumerate(columns):
        before = choice.coefficients[: order.get(t, rounds)]
        bars.append([(float(distances[0, columns.index(s), column]) / t, _colour(order[s])) for s in before if t])
    return bars


def _colour(place: int) -> tuple[int, int, int]:
    return PALETTE[place % len(PALETTE)]
