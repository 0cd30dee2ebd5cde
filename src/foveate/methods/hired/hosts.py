"""LLaVA-1.5 and LLaVA-NeXT of transformers: pictures -> kept tokens -> what the language model reads (spec 2.7).

Nothing of transformers is changed. The tower runs through `foveate.vision.towers`, no deeper than needed, tokens are
chosen before the projector, and the language model gets `inputs_embeds`, which every 5.x takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from foveate.errors import CheckpointError, InputError
from foveate.language.templates import IGNORED
from foveate.vision.attention_taps import AttentionTap, tap_attention
from foveate.vision.towers import VisionTower

from .partitions import NEWLINE, Partitions
from .strategies import PictureTokens, Selection, Strategy, TowerFacts


@dataclass(frozen=True)
class VisualSequence:
    """One picture as the language model reads it.

    Attributes:
        embeds: (n, D), after the projector.
        places: (n,) which of the picture's placeholders they stand at.
        length: placeholders of the picture where nothing is dropped, as the host counts them.
        keep: (P, N) bool, the tokens chosen that are not padding.
        layout: the picture's partitions.
    """

    embeds: Tensor
    places: Tensor
    length: int
    keep: Tensor
    layout: Partitions


@dataclass(frozen=True)
class Look:
    """What the tower gives of all partitions of some pictures.

    Attributes:
        features: (P, N, C) before the projector.
        class_features: (P, C), None without a class token.
        taps: layer -> tap of the P partitions.
    """

    features: Tensor
    class_features: Tensor | None
    taps: Mapping[int, AttentionTap]


class LlavaHost:
    """What dropping needs to know of a LLaVA of transformers.

    Args:
        model: `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`.

    Raises:
        InputError: a model of another class, or one whose tokens cannot be dropped one by one.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration):
            raise InputError(
                f"visual tokens are dropped in LlavaForConditionalGeneration, LlavaNextForConditionalGeneration and "
                f"MG-LLaVA models, not in {type(model).__name__}."
            )
        self.model: Any = model
        self.config: Any = self.model.config
        self.high_resolution = isinstance(model, LlavaNextForConditionalGeneration)
        try:
            self.tower = VisionTower(self.model.model.vision_tower, freeze=False)
        except CheckpointError as error:
            raise InputError(f"visual tokens cannot be dropped here: {error}") from None
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        states = self.tower.num_layers + 1
        self.states = [layer % states for layer in layers]
        full = self.config.vision_feature_select_strategy == "full"
        if self.tower.has_cls == full:
            raise InputError(
                f"vision_feature_select_strategy {self.config.vision_feature_select_strategy!r} "
                + ("makes the class token a visual token" if full else "drops a patch, for want of a class token")
                + "; set it to "
                + ("'default'." if full else "'full'.")
            )
        self.side = self.tower.image_size // self.tower.patch_size
        feature = max(self.states) - 1
        self.facts = TowerFacts(self.tower.num_layers, feature, self.tower.has_cls)
        self._forward = inspect.signature(type(model).forward)

    def check(self, strategy: Strategy) -> None:
        """Whether a strategy can be used here.

        Raises:
            InputError: the tower lacks what it needs, or the budget is below a token for each partition.
        """
        strategy.layers(self.facts)
        check_size(strategy, self.side**2)

    # ---------------------------------------------------------------- pictures

    def layouts(self, image_sizes: Any, count: int, strategy: Strategy | None = None) -> list[Partitions]:
        """Partitions of each of `count` pictures.

        Args:
            image_sizes: (count, 2) heights and widths in pixels, which LLaVA-NeXT needs.

        Raises:
            InputError: sizes are missing, or not as many as pictures.
        """
        tile = self.tower.image_size
        if not self.high_resolution:
            return [Partitions(self.side, tile=tile)] * count
        if image_sizes is None or len(image_sizes) != count:
            given = "none" if image_sizes is None else len(image_sizes)
            raise InputError(f"{count} pictures need as many image_sizes, {given} given; pass what the processor gave.")
        found = []
        for height, width in torch.as_tensor(image_sizes).tolist():
            best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
            grid = (best[0] // tile, best[1] // tile)
            rounding = "current"
            if strategy is not None:
                grid, rounding = (grid[::-1] if strategy.grid_swapped else grid), strategy.unpad_rounding
            found.append(Partitions(self.side, grid, (height, width), tile, newlines=True, rounding=rounding))
        return found

    def pieces(self, pixel_values: Tensor, image_sizes: Any, strategy: Strategy) -> tuple[Tensor, list[Partitions]]:
        """All partitions of all pictures in one batch, and the pictures' layouts."""
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim not in (4, 5):
            given = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise InputError(f"pixel_values must be a tensor of 4 or 5 dimensions, not {given}.")
        if not self.high_resolution:
            return pixel_values, self.layouts(None, len(pixel_values))
        if pixel_values.ndim == 4:
            layouts = self.layouts(image_sizes, 0 if image_sizes is None else len(image_sizes), strategy)
            return pixel_values, layouts
        layouts = self.layouts(image_sizes, len(pixel_values), strategy)
        # Rows of a picture beyond its own partitions are zeros that fill up the batch.
        pieces = [own[: layout.count] for own, layout in zip(pixel_values, layouts, strict=True)]
        return torch.cat(pieces), layouts

    def encode(self, pixel_values: Tensor, image_sizes: Any, strategy: Strategy) -> list[VisualSequence]:
        """Pictures as the language model reads them, of each what the strategy keeps.

        Args:
            pixel_values: (V, 3, s, s) of LLaVA-1.5; (V, P, 3, s, s) or (sum of P, 3, s, s) of LLaVA-NeXT.
            image_sizes: (V, 2) heights and widths, of LLaVA-NeXT.

        Raises:
            InputError: shapes that do not fit, or a picture of which nothing would be left.
        """
        pieces, layouts = self.pieces(pixel_values, image_sizes, strategy)
        lengths = [layout.full_length for layout in self.layouts(image_sizes, len(layouts))]
        return self.pack(self.look(pieces, strategy.layers(self.facts)), layouts, lengths, strategy)

    def look(self, pieces: Tensor, layers: Sequence[int]) -> Look:
        """Partitions (P, 3, s, s) of any pictures through the tower, with taps of the layers given."""
        depth = max([max(self.states), *(layer + 1 for layer in layers)])
        asked = dict.fromkeys([*self.states, depth])
        with tap_attention(self.tower, layers) as taps:
            found = self.tower(pieces.to(self.tower.device), layers=tuple(asked)).layers
        states = dict(zip(asked, found, strict=True))
        features = torch.cat([states[state].patch_tokens for state in self.states], dim=-1)
        return Look(features, states[self.states[-1]].cls, taps)

    def select(
        self, look: Look, layouts: Sequence[Partitions], strategy: Strategy
    ) -> list[tuple[PictureTokens, Selection]]:
        """What a strategy chooses of each picture, padding still in."""
        if sum(layout.count for layout in layouts) != len(look.features):
            wanted = sum(layout.count for layout in layouts)
            raise InputError(f"{len(look.features)} partitions are given for pictures that have {wanted}.")
        chosen = []
        start = 0
        for layout in layouts:
            own = slice(start, start + layout.count)
            start += layout.count
            picture = PictureTokens(
                look.features[own],
                self.facts,
                layout,
                {layer: tap[own] for layer, tap in look.taps.items()},
                None if look.class_features is None else look.class_features[own],
                self.model.model.multi_modal_projector,
            )
            chosen.append((picture, strategy.select(picture)))
        return chosen

    def pack(
        self, look: Look, layouts: Sequence[Partitions], lengths: Sequence[int], strategy: Strategy
    ) -> list[VisualSequence]:
        """Projects what is kept of all pictures at once, and puts newlines where they stay (spec 2.5).

        Args:
            lengths: placeholders of each picture where nothing is dropped.
        """
        chosen = self.select(look, layouts, strategy)
        base = self.model.model
        rows: list[Tensor] = []
        orders: list[tuple[Tensor | None, Tensor]] = []
        for picture, selection in chosen:
            if selection.features is not None:
                rows.append(selection.features)
                orders.append((None, torch.arange(len(selection.features))))
                continue
            numbers, places = picture.layout.sequence(selection.keep, strategy.newline)
            kept = numbers[numbers != NEWLINE].to(picture.device)
            rows.append(picture.features.flatten(0, 1)[kept])
            orders.append((numbers, places))
        projected = base.multi_modal_projector(torch.cat(rows)).split([len(own) for own in rows])
        sequences = []
        for (picture, selection), own, (numbers, places), length in zip(
            chosen, projected, orders, lengths, strict=True
        ):
            if numbers is not None and len(numbers) > len(own):
                embeds = base.image_newline.to(own).expand(len(numbers), -1).clone()
                embeds[(numbers != NEWLINE).to(own.device)] = own
            else:
                embeds = own
            if not len(embeds):
                raise InputError(f"a budget of {strategy.budget} leaves no token of a picture; give a larger one.")
            if strategy.grid_swapped or strategy.unpad_rounding != "current":
                places = torch.arange(len(embeds))  # of another mosaic than the host's, which has no such places
            if int(places[-1]) >= length:
                raise InputError(f"{len(embeds)} tokens of a picture are kept, and its text has room for {length}.")
            keep = selection.keep & picture.layout.valid.to(selection.keep.device)
            sequences.append(VisualSequence(embeds, places, length, keep, picture.layout))
        return sequences

    # ---------------------------------------------------------------- prompts

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model by name."""
        bound = self._forward.bind_partial(self.model, *args, **kwargs).arguments
        named = dict(bound)
        named.pop("self", None)
        return {**named, **named.pop("kwargs", {})}

    def assemble(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visuals: Sequence[VisualSequence],
        *,
        labels: Tensor | None = None,
        positions: str = "contiguous",
        left_padding: bool | None = None,
    ) -> dict[str, Tensor]:
        """Prompts whose placeholders agree with what is kept, with the visual tokens in their places (spec 2.7).

        Args:
            input_ids: (B, T); each picture has one placeholder, or as many as it has tokens where nothing is dropped,
                as the processor writes them.
            attention_mask: (B, T), 0 where padded; None for no padding.
            visuals: of each picture, in the order of rows and places.
            labels: (B, T), of which those of dropped tokens go.
            positions: "contiguous" or "original".
            left_padding: pad the rows on the left; by default on the side where they are padded, else on the left.

        Returns:
            input_ids, inputs_embeds (B, T', D), attention_mask, position_ids (1 where padded), and labels where given.

        Raises:
            InputError: placeholders and pictures do not agree.
        """
        device = self.model.get_input_embeddings().weight.device
        ids, real, marks = input_ids.cpu(), self._real(input_ids, attention_mask), None
        marks = None if labels is None else labels.cpu()
        rows, spans = self._expanded(ids, real, marks, [visual.length for visual in visuals])
        pieces: dict[str, list[Tensor]] = {"input_ids": [], "position_ids": [], "labels": []}
        for number, (row, row_labels) in enumerate(rows):
            keep = torch.ones(len(row), dtype=torch.bool)
            for (where, start), visual in zip(spans, visuals, strict=True):
                if where == number:
                    keep[start : start + visual.length] = False
                    keep[start + visual.places] = True
            kept = keep.nonzero()[:, 0]
            pieces["input_ids"].append(row[kept])
            pieces["position_ids"].append(kept if positions == "original" else torch.arange(len(kept)))
            if row_labels is not None:
                pieces["labels"].append(row_labels[kept])
        if left_padding is None:
            left_padding = not bool((real[:, 0] & ~real[:, -1]).any())
        lengths = torch.tensor([len(row) for row in pieces["input_ids"]])
        places = torch.arange(int(lengths.max())).expand(len(rows), -1)
        mask = places >= (places.shape[1] - lengths)[:, None] if left_padding else places < lengths[:, None]

        def padded(name: str, value: int) -> Tensor:
            out = torch.full(mask.shape, value)
            out[mask] = torch.cat(pieces[name])
            return out.to(device)

        padding = self.config.text_config.pad_token_id
        given = {"input_ids": padded("input_ids", 0 if padding is None else int(padding))}
        embeds = self.model.get_input_embeddings()(given["input_ids"]).clone()
        embeds[~mask.to(device)] = 0
        if visuals:
            here = (given["input_ids"] == self.config.image_token_id) & mask.to(device)
            embeds[here] = torch.cat([visual.embeds for visual in visuals]).to(embeds)
        given |= {"inputs_embeds": embeds, "attention_mask": mask.long().to(device)}
        given["position_ids"] = padded("position_ids", 1)
        if labels is not None:
            given["labels"] = padded("labels", IGNORED)
        return given

    def _real(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) bool, on the CPU: what is no padding."""
        if attention_mask is None:
            return torch.ones(input_ids.shape, dtype=torch.bool)
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask is {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}; with "
                "pictures, pass the whole prompt, not only what a cache has not read yet."
            )
        return attention_mask.cpu().bool()

    def _expanded(
        self, ids: Tensor, real: Tensor, labels: Tensor | None, lengths: Sequence[int]
    ) -> tuple[list[tuple[Tensor, Tensor | None]], list[tuple[int, int]]]:
        """Rows without padding, with all placeholders of each picture; and (row, first place) of each picture."""
        image = self.config.image_token_id
        found = [(row, int(place)) for row in range(len(ids)) for place in ((ids[row] == image) & real[row]).nonzero()]
        if len(found) != sum(lengths) and len(found) != len(lengths):
            raise InputError(
                f"the text has {len(found)} placeholders of pictures, and {len(lengths)} pictures of "
                f"{sum(lengths)} tokens are given; let the processor write the text, or write one for each picture."
            )
        single = len(found) == len(lengths) != sum(lengths)
        rows: list[tuple[Tensor, Tensor | None]] = []
        spans: list[tuple[int, int]] = []
        taken = 0
        for row in range(len(ids)):
            own = real[row].nonzero()[:, 0]
            marks = ids[row][own] == image
            if not single:
                start = 0
                places = marks.nonzero()[:, 0].tolist()
                while start < len(places):
                    length = lengths[taken]
                    if places[start : start + length] != list(range(places[start], places[start] + length)):
                        raise InputError(
                            f"picture {taken} needs {length} placeholders in a row, and the text has fewer there; let "
                            "the processor write the text."
                        )
                    spans.append((row, places[start]))
                    start, taken = start + length, taken + 1
                repeats = torch.ones(len(own), dtype=torch.long)
            else:
                repeats = torch.ones(len(own), dtype=torch.long)
                for place in marks.nonzero()[:, 0].tolist():
                    spans.append((row, int(repeats[:place].sum())))
                    repeats[place] = lengths[taken]
                    taken += 1
            rows.append(
                (
                    ids[row][own].repeat_interleave(repeats),
                    None if labels is None else labels[row][own].repeat_interleave(repeats),
                )
            )
        return rows, spans


def check_size(strategy: Strategy, cells: int) -> None:
    """Whether a budget leaves each partition of N tokens at least one on average.

    Raises:
        InputError: it does not.
    """
    if int(cells * strategy.budget) < 1:
        raise InputError(
            f"a budget of {strategy.budget} of {cells} tokens is less than one token for each partition of a picture; "
            f"give at least {1 / cells:.4g}."
        )
