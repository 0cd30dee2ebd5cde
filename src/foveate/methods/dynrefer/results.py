"""What a describer returns: regions with their words and probabilities, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, overload

from PIL import Image, ImageDraw, ImageFont

from foveate.vision.drawing import GREY, MAX_SIDE, PALETTE, Colour, draw_boxes, fit_text, more_regions

if TYPE_CHECKING:
    from .attention import Attention


@dataclass(frozen=True)
class View:
    """One crop that the model looked at.

    Attributes:
        t: interpolation coefficient, 0 for the region itself, 1 for the whole image.
        box: xyxy pixels of the crop in the image.
        tasks: the tasks that this view served.
    """

    t: float
    box: tuple[int, int, int, int]
    tasks: tuple[str, ...]
    _source: Image.Image = field(repr=False, compare=False)

    @property
    def image(self) -> Image.Image:
        """The crop at the image's own resolution."""
        return self._source.crop(self.box)


@dataclass(frozen=True)
class ViewChoice:
    """Which views some tasks of a region looked through, and why.

    Attributes:
        tasks: the tasks.
        coefficients: (n,) t's in the order in which the model takes them, 0 first.
        selection: "official", "pairwise" or "median" where they were searched, else "fixed".
        distances: candidate t -> d = (bits in which its hash differs from the region's) / t, where they were searched.
    """

    tasks: tuple[str, ...]
    coefficients: tuple[float, ...]
    selection: str = "fixed"
    distances: Mapping[float, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Report:
    """What a call cost. Reports of several calls can be added.

    Attributes:
        images, regions: described.
        views: (region, task group, view) combinations looked at: what encoding each anew would encode.
        crops: crops that the tower encoded. Equal crops that run together are encoded once.
        least_crops: the fewest crops of any choice of views with surroundings in it: every distinct region, and once an
            image the whole of it as the context of all.
        hashes: perceptual hashes that searches computed.
        milliseconds: wall clock by stage: "proposals", "search", "crops" (cut and resized), "tower", "fusion"
            (RoI-Align to region tokens), "heads" (tags, attributes, category), "captions", "other" (reading images,
            checks, results).
    """

    images: int = 0
    regions: int = 0
    views: int = 0
    crops: int = 0
    least_crops: int = 0
    hashes: int = 0
    milliseconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def extra_crops(self) -> int:
        """Encodes beyond those of the cheapest choice: what the policy or search cost."""
        return self.crops - self.least_crops

    def __add__(self, other: Report) -> Report:
        counts = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("images", "regions", "views", "crops", "least_crops", "hashes")
        }
        stages = dict.fromkeys((*self.milliseconds, *other.milliseconds))
        return Report(
            **counts,
            milliseconds={s: self.milliseconds.get(s, 0.0) + other.milliseconds.get(s, 0.0) for s in stages},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = {stage: round(value, 3) for stage, value in self.milliseconds.items()}
        return {**asdict(self), "extra_crops": self.extra_crops, "milliseconds": stages}

    def __str__(self) -> str:
        total = sum(self.milliseconds.values())
        stages = [
            f"  {stage:<10}{value:>10.1f} ms  {value / total if total else 0:>4.0%}"
            for stage, value in self.milliseconds.items()
        ]
        return "\n".join(
            [
                f"{self.regions} regions of {self.images} images in {total:.1f} ms",
                f"  {self.crops} crops encoded for {self.views} views; {self.extra_crops} more than the cheapest "
                f"choice of views ({self.least_crops})",
                f"  {self.hashes} hashes computed",
                *stages,
            ]
        )


@dataclass(frozen=True)
class Region:
    """A described region. What was not asked for is None or empty; scores are probabilities, logits are not.

    Attributes:
        box: xyxy pixels.
        caption, caption_score: the sentence and the probability of its tokens under the decoder.
        tags, tag_scores: tags above the model's threshold, best first; the scores of all tags.
        attributes, attribute_scores: attributes above the model's threshold, best first; the scores of all.
        category, category_score, category_scores: best class, its probability, and those of all classes.
        category_logits: the raw scores of all classes, which unlike the probabilities compare between regions.
        score: confidence of the proposal where the region was found by the describer itself.
        mask: COCO run-length encoding of the region where its proposer gives one.
        views: the crops that the model looked at.
        choices: how they were chosen, for each group of tasks that share theirs.
        attention: where the model read, where `attention=True` asked for it: for each group of tasks that share their
            views all queries alike, then those of the best category and the best tag.
    """

    box: tuple[float, float, float, float]
    caption: str | None = None
    caption_score: float | None = None
    tags: tuple[str, ...] = ()
    tag_scores: dict[str, float] = field(default_factory=dict, repr=False)
    attributes: tuple[str, ...] = ()
    attribute_scores: dict[str, float] = field(default_factory=dict, repr=False)
    category: str | None = None
    category_score: float | None = None
    category_scores: dict[str, float] = field(default_factory=dict, repr=False)
    category_logits: dict[str, float] = field(default_factory=dict, repr=False)
    score: float | None = None
    mask: dict[str, Any] | None = field(default=None, repr=False)
    views: tuple[View, ...] = field(default=(), repr=False)
    choices: tuple[ViewChoice, ...] = field(default=(), repr=False)
    attention: tuple[Attention, ...] = field(default=(), repr=False, compare=False)

    @property
    def joint_score(self) -> float | None:
        """Proposal score times caption score: that something is there and that these are the words for it. None where
        one of them is missing. Dense captioning (spec section 5) ranks by `score` alone where boxes are proposed."""
        if self.score is None or self.caption_score is None:
            return None
        return self.score * self.caption_score

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tags and attributes with the scores of those that are listed."""
        out: dict[str, Any] = {"box": [round(value, 2) for value in self.box]}
        if self.score is not None:
            out["score"] = round(self.score, 4)
        if self.caption is not None:
            out |= {"caption": self.caption, "caption_score": round(self.caption_score or 0.0, 4)}
        if self.joint_score is not None:
            out["joint_score"] = round(self.joint_score, 4)
        if self.tag_scores:
            out["tags"] = {tag: round(self.tag_scores[tag], 4) for tag in self.tags}
        if self.attribute_scores:
            out["attributes"] = {name: round(self.attribute_scores[name], 4) for name in self.attributes}
        if self.category is not None:
            out |= {"category": self.category, "category_score": round(self.category_score or 0.0, 4)}
        if self.mask is not None:
            out["mask"] = self.mask
        out["views"] = [{"t": view.t, "box": list(view.box), "tasks": list(view.tasks)} for view in self.views]
        searches = [choice for choice in self.choices if choice.distances]
        if searches:
            out["searches"] = [
                {
                    "selection": choice.selection,
                    "tasks": list(choice.tasks),
                    "t": list(choice.coefficients),
                    "distances": {f"{t:g}": round(value, 4) for t, value in choice.distances.items()},
                }
                for choice in searches
            ]
        return out


class Regions(Sequence[Region]):
    """The regions of one image, in the order of the given boxes, or by descending score where they were proposed.

    Attributes:
        image: RGB.
        regions: what was said.
        report: what the call cost that described them, with all of its images.
    """

    def __init__(self, image: Image.Image, regions: Sequence[Region], report: Report | None = None) -> None:
        self.image = image
        self.regions = tuple(regions)
        self.report = report

    def __len__(self) -> int:
        return len(self.regions)

    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> Regions: ...
    def __getitem__(self, index: int | slice) -> Region | Regions:
        if isinstance(index, slice):
            return Regions(self.image, self.regions[index], self.report)
        return self.regions[index]

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __repr__(self) -> str:
        return f"Regions({self.image.width}x{self.image.height}, {list(self.regions)!r})"

    def to_dict(self) -> dict[str, Any]:
        """Size of the image and the regions as plain values."""
        width, height = self.image.size
        return {"width": width, "height": height, "regions": [region.to_dict() for region in self.regions]}

    def plot(self, *, side: int = 640) -> Image.Image:
        """The image with numbered boxes, and beside it what was said of each, as far as there is room for it.

        Args:
            side: least length in pixels of the image's longer side; small images are enlarged for reading, and such
                as would give a picture of more than 16,383 pixels are reduced.
        """
        # The words beside the picture are three quarters as wide again.
        most = min(MAX_SIDE * 4 / 7 / self.image.width, MAX_SIDE / self.image.height)
        scale = min(max(1.0, side / max(self.image.size)), most)
        size = [max(1, round(length * scale)) for length in self.image.size]
        picture = self.image.resize((size[0], size[1]))
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(max(13, round(min(picture.size) / 34)))
        line = max(2, round(min(picture.size) / 220))
        for number, region in enumerate(self.regions):
            x0, y0, x1, y1 = (value * scale for value in region.box)
            colour = PALETTE[number % len(PALETTE)]
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=line)
            label = str(number + 1)
            left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
            width, height = right - left + 8, bottom - top + 8
            at = (min(max(0.0, x0), picture.width - width), max(0.0, y0 - height))
            draw.rectangle((*at, at[0] + width, at[1] + height), fill=colour)
            draw.text((at[0] + 4 - left, at[1] + 4 - top), label, fill="white", font=font)
        return _beside(picture, list(self._legend()), font)

    def plot_dense(self, *, side: int = 1024) -> Image.Image:
        """The image with a thin numbered box in a colour of its own for each region, and below it a line for each:
        number, caption (or category), proposal score. Made for many regions; `plot` says more of few.

        Args:
            side: least length in pixels of the image's longer side; small images are enlarged for reading, and such
                as would give a picture of more than 16,383 pixels are reduced.
        """
        words = [region.caption or region.category or "region" for region in self.regions]
        return draw_boxes(
            self.image, [region.box for region in self.regions], words, [region.score for region in self.regions], side
        )

    def _legend(self) -> Iterator[list[tuple[Colour, str]]]:
        """Lines for each region."""
        for number, region in enumerate(self.regions):
            colour = PALETTE[number % len(PALETTE)]
            head = region.caption or region.category or "region"
            score = region.caption_score if region.caption is not None else region.category_score
            lines = [(colour, f"{number + 1}  {head}" + (f"  ({score:.2f})" if score is not None else ""))]
            if region.category is not None and region.caption is not None:
                lines.append((GREY, f"     category: {region.category} ({region.category_score:.2f})"))
            if region.attributes:
                words = ", ".join(f"{name} {region.attribute_scores[name]:.2f}" for name in region.attributes)
                lines.append((GREY, f"     attributes: {words}"))
            if region.tags:
                lines.append((GREY, f"     tags: {', '.join(region.tags)}"))
            yield lines

    @property
    def searched(self) -> bool:
        """Whether views of any region were searched."""
        return any(choice.distances for region in self.regions for choice in region.choices)

    def plot_views(self, *, side: int = 128, explain: bool = False) -> Image.Image:
        """A row per region: every crop that the model looked at, labelled with its t and tasks.

        The first regions are shown where all of them would be higher than 16,383 pixels.

        Args:
            side: pixels of a crop in the picture.
            explain: show instead, for each region and group of tasks, the nested views in the image and every candidate
                with its hash distance, the chosen ones framed: see `explain_views`. Views that were not searched are
                shown with the distances that the official search would have seen.
        """
        if explain:
            from .explanation import explain_views  # which draws what this module defines

            return explain_views(self.image, self.regions, side=side)
        font = ImageFont.load_default(12)
        gap, head = 8, 34
        shown = self.regions[: (MAX_SIDE - gap - head) // (side + head + gap)]
        left_out = len(self.regions) - len(shown)
        columns = max((len(region.views) for region in shown), default=0)
        height = max(1, len(shown)) * (side + head + gap) + gap
        size = (max(1, columns) * (side + gap) + gap, height + head * (left_out > 0))
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        if left_out:
            draw.text((gap, height), more_regions(left_out), fill=GREY, font=font)
        for row, region in enumerate(shown):
            top = gap + row * (side + head + gap)
            for column, view in enumerate(region.views):
                left = gap + column * (side + gap)
                draw.text((left, top), f"{row + 1}: t = {view.t:g}", fill=PALETTE[row % len(PALETTE)], font=font)
                draw.text((left, top + 15), fit_text(", ".join(view.tasks), font, side), fill=GREY, font=font)
                picture.paste(view.image.resize((side, side)), (left, top + head))
        return picture

    def plot_attention(self, *, side: int = 160) -> Image.Image:
        """A row for each region and query: the views in grey, and in red the patches that were read: see
        `attention.plot_attention`.

        Args:
            side: pixels of a view in the picture.

        Raises:
            InputError: the regions were described without `attention=True`.
        """
        from .attention import plot_attention  # which needs torch

        return plot_attention(self.regions, side=side)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines, indent = [""], " " * (len(text) - len(text.lstrip(" ")) + 3)
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word or " "
        if font.getlength(longer) > width and lines[-1].strip():
            lines.append(indent + word)
        else:
            lines[-1] = longer
    return lines


def _beside(picture: Image.Image, legend: list[list[tuple[Colour, str]]], font: Any) -> Image.Image:
    """The picture with its legend on the right, as wide as the picture and as tall as either needs."""
    width = max(420, picture.width * 3 // 4)
    height = round(font.size * 1.45)
    lines: list[tuple[Colour, str]] = []
    for number, entry in enumerate(legend):
        wrapped = [(colour, line) for colour, text in entry for line in _wrap(text, font, width - 24)]
        # One line is kept for saying that there is more.
        if height * (len(lines) + len(wrapped) + 1) + 24 > MAX_SIDE:
            lines.append((GREY, more_regions(len(legend) - number)))
            break
        lines += wrapped
    out = Image.new("RGB", (picture.width + width, max(picture.height, height * len(lines) + 24)), "white")
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    for row, (colour, text) in enumerate(lines):
        draw.text((picture.width + 12, 12 + row * height), text, fill=colour, font=font)
    return out
