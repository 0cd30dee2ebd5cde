"""The MG-LLaVA network, top to bottom as in figure 2 of the paper (spec 2).

    low-resolution picture -> CLIP -> tokens L
    high-resolution picture -> ConvNeXt -> stage maps;  last map + L -> Conv-Gate fusion -> projector -> image tokens
    stage maps + boxes -> RoIAlign, mean -> projector -> object tokens
    text with [image tokens][object tokens] in the place of <image> -> language model -> answer

Shapes: B conversations, V pictures of all of them (a video has one for each frame), N = g * g image tokens of a
picture, K_v boxes of a picture, s and S sides of the two resolutions, C width of the language model, T ids of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextModel
from transformers.utils.generic import ModelOutput

from foveate.errors import InputError
from foveate.language.generation import FiniteLogits
from foveate.language.pretrained import PartsElsewhere, load_exactly
from foveate.language.templates import IGNORED, IMAGE_ID, VIDEO_ID
from foveate.vision.towers import build_tower, load_tower

from .configuration import MGLlavaConfig
from .fusion import (
    ChannelConcat,
    ConvConcat,
    ConvGate,
    CrossAttention,
    GateConcat,
    PatchInfoMining,
    Resampler,
    TokenConcat,
)
from .objects import pool_levels, pool_objects, upsample_stages

STAGES = ("pretrain", "sft")
"""Stages of training: projectors and fusion; then the language model too (spec 3.2)."""


class HighResTower(nn.Module):
    """A ConvNeXt trunk that gives the map of every stage; frozen.

    Args:
        config: a `ConvNextConfig`.
        legacy_train_mode: follow `train()`, so that drop-path is active in training (spec 7.7).
    """

    def __init__(self, config: Any, *, legacy_train_mode: bool = False) -> None:
        super().__init__()
        self.model: Any = ConvNextModel._from_config(config)
        # The pooled features' norm belongs to a classifier; without it no weight is left unset (spec 2.7).
        self.model.layernorm = nn.Identity()
        self.legacy_train_mode = legacy_train_mode
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> HighResTower:
        return super().train(mode and self.legacy_train_mode)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(V, 3, S, S) -> maps (V, C_k, S / stride_k, S / stride_k), the finest first. No gradient."""
        with torch.no_grad():
            hidden = self.model.embeddings(pixel_values.to(self.model.dtype))
            stages = []
            for stage in self.model.encoder.stages:
                hidden = stage(hidden)
                stages.append(hidden)
        return tuple(stages)


def projector(width: int, out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear (spec 2.1)."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


@dataclass(frozen=True)
class TowerFeatures:
    """What the frozen towers see of V pictures, as much of it as the configuration uses.

    Attributes:
        low: (V, N, l) low-resolution tokens.
        maps: the maps (V, C_k, n_k, n_k) of the trunk that fusion reads; none without fusion.
        levels: pooled objects (sum of K_v, channels) for each level that is projected by itself; none without objects.
        counts: (V,) K_v; of no entries without objects.
    """

    low: Tensor
    maps: tuple[Tensor, ...] = ()
    levels: tuple[Tensor, ...] = ()
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def tensors(self) -> dict[str, Tensor]:
        """By names that `of` reads, as a batch of training carries them."""
        numbered = {"maps": self.maps, "levels": self.levels}
        many = {f"{name}.{k}": one for name, several in numbered.items() for k, one in enumerate(several)}
        return {"low": self.low, "counts": self.counts, **many}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TowerFeatures:
        """What `tensors` gave."""

        def several(name: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"{name}.{k}"] for k in range(len(tensors)) if f"{name}.{k}" in tensors)

        return cls(tensors["low"], several("maps"), several("levels"), tensors["counts"])

    @classmethod
    def join(cls, parts: Sequence[TowerFeatures]) -> TowerFeatures:
        """The pictures of all parts, in order."""
        maps, levels = (
            zip(*(part.maps for part in parts), strict=True),
            zip(*(part.levels for part in parts), strict=True),
        )
        return cls(
            torch.cat([part.low for part in parts]),
            tuple(torch.cat(one) for one in maps),
            tuple(torch.cat(one) for one in levels),
            torch.cat([part.counts for part in parts]),
        )


@dataclass(frozen=True)
class VisualTokens:
    """What the language model sees of V pictures.

    Attributes:
        image: (V, N, C); V tensors (n_v, C) where tokens are dropped.
        objects: V tensors (K_v, C); of no rows where there are no object tokens.
        gate: (V, 1), tanh(a) of the gated fusions, else None.
        kept: (V, N) bool, which image tokens these are where some are dropped, else None.
    """

    image: Tensor | tuple[Tensor, ...]
    objects: tuple[Tensor, ...]
    gate: Tensor | None = None
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)

    def sequence(self, first: int, count: int = 1) -> Tensor:
        """(L, C) tokens of `count` pictures from `first` on: each one's image tokens, then its object tokens."""
        pieces = [
            piece for number in range(first, first + count) for piece in (self.image[number], self.objects[number])
        ]
        return torch.cat(pieces)

    def take(self, numbers: Sequence[int]) -> VisualTokens:
        """The pictures of these numbers, in their order."""
        rows = list(numbers)
        image = self.image[rows] if isinstance(self.image, Tensor) else tuple(self.image[number] for number in rows)
        gate = None if self.gate is None else self.gate[rows]
        kept = None if self.kept is None else self.kept[rows]
        return VisualTokens(image, tuple(self.objects[number] for number in rows), gate, kept)

    @staticmethod
    def join(parts: Sequence[VisualTokens]) -> VisualTokens:
        """The pictures of all parts, in order."""
        images = [part.image for part in parts if isinstance(part.image, Tensor)]
        gates = [part.gate for part in parts if part.gate is not None]
        kept = [part.kept for part in parts if part.kept is not None]
        return VisualTokens(
            torch.cat(images) if len(images) == len(parts) else tuple(one for part in parts for one in part.image),
            tuple(objects for part in parts for objects in part.objects),
            torch.cat(gates) if len(gates) == len(parts) else None,
            torch.cat(kept) if len(kept) == len(parts) else None,
        )


@dataclass(frozen=True)
class AssembledInputs:
    """Text and visual tokens of B rows, padded to one length.

    Attributes:
        inputs_embeds: (B, T', C), zero where padded.
        attention_mask: (B, T') of 1 and 0.
        position_ids: (B, T') from 0 in every row; 0 where padded.
        labels: (B, T'), `IGNORED` at visual tokens and padding; None where none were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


@dataclass
class MGLlavaOutput(ModelOutput):
    """loss: scalar; logits: (B, T', vocabulary), None where there is a loss; gate: (V, 1), tanh(a)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    gate: Tensor | None = None


class MGLlavaPreTrainedModel(PreTrainedModel):
    config_class = MGLlavaConfig
    base_model_prefix = "mg_llava"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """Every module draws its own weights when it is made (spec 2.1, 2.3); a checkpoint has to have all."""


class MGLlavaModel(PartsElsewhere, MGLlavaPreTrainedModel):
    """MG-LLaVA whole: two frozen towers, fusion, object features, projectors, language model."""

    def __init__(self, config: MGLlavaConfig, language_model: Any = None) -> None:
        """With a `language_model` that is loaded already, in place of one with fresh weights."""
        super().__init__(config)
        low, width = config.vision_config.hidden_size, config.language_config.hidden_size
        dims = config.high_res_config.hidden_sizes
        self.vision_tower = build_tower(config.vision_config)
        if config.sees_high_res:
            self.high_res_tower = HighResTower(config.high_res_config, legacy_train_mode=config.legacy_tower_train_mode)
        fusion = _FUSIONS.get(config.fusion)
        if fusion is not None:
            mined = sum(dims) if config.patch_info_stages == "all" else dims[-1]
            self.fusion = fusion(low, mined if config.fusion == "patch_info_mining" else dims[-1])
        elif config.fusion == "channel_concat":
            self.fusion = ChannelConcat()
        if config.fusion == "resampler":
            self.image_projector: nn.Module = Resampler(low, width, config.grid_size, config.resampler_heads)
        else:
            self.image_projector = projector(config.image_width, width)
        if config.objects != "none" and config.object_levels == "multi_level":
            self.level_projectors = nn.ModuleList(nn.Linear(dim, low) for dim in dims)
        if config.objects == "f_to_b":
            self.object_attention = CrossAttention(config.image_width, config.object_width)
        elif config.objects == "b_to_f":
            keys = low if config.unfused_keys else config.image_width
            self.object_attention = CrossAttention(config.object_width, keys)
        if config.has_object_tokens:
            self.box_projector = projector(config.object_width, width)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.language_config)
        self.post_init()

    FROZEN_PARTS = {"vision": "vision_tower", "high_res": "high_res_tower.model"}  # noqa: RUF012

    def base_weights(self, part: str, path: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """A tower's, from a checkpoint of CLIP or of a ConvNeXt."""
        if part == "vision":
            return load_tower(path, dtype=dtype).state_dict()
        from .conversion import load_trunk  # which knows other layouts, and this module

        return load_trunk(path)[1]

    # ---------------------------------------------------------------- what is trained

    def set_stage(self, stage: str) -> MGLlavaModel:
        """Leave gradients to what a stage of training learns (spec 3.2).

        Args:
            stage: "pretrain": projectors and fusion; "sft": these and the language model. The towers never learn.
        """
        if stage not in STAGES:
            raise InputError(f"there is no training stage {stage!r}; use {' or '.join(STAGES)}.")
        frozen = ("vision_tower.", "high_res_tower.", *(("language_model.",) if stage == "pretrain" else ()))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        return self

    def bridge_parameters(self) -> list[nn.Parameter]:
        """What lies between the towers and the language model, in both stages trained."""
        others = ("vision_tower.", "high_res_tower.", "language_model.")
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(others)]

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    @property
    def bridge_dtype(self) -> torch.dtype:
        return next(self.image_projector.parameters()).dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; missing, unexpected, misshapen or non-finite weights are an error that lists them.

        Raises:
            CheckpointError: the same, or a file that cannot be read.
        """
        load = super().from_pretrained
        return load_exactly(load, pretrained_model_name_or_path, *args, what="the MG-LLaVA checkpoint", **kwargs)

    # ---------------------------------------------------------------- seeing

    def encode_low(self, pixel_values: Tensor) -> Tensor:
        """(V, 3, s, s) normalised pictures -> (V, N, l) tokens of the tower's `vision_layer`, no class token."""
        tokens = self.vision_tower(pixel_values, layers=(self.config.vision_layer,)).patch_tokens
        return tokens.to(self.bridge_dtype)

    def encode_high(self, pixel_values_aux: Tensor) -> tuple[Tensor, ...]:
        """(V, 3, S, S) normalised pictures -> the maps of the trunk's stages, the finest first.

        Raises:
            InputError: the pictures are of another size.
        """
        side = self.config.high_res_size
        if tuple(pixel_values_aux.shape[1:]) != (3, side, side):
            raise InputError(
                f"pixel_values_aux must be (pictures, 3, {side}, {side}), not {tuple(pixel_values_aux.shape)}."
            )
        return self.high_res_tower(pixel_values_aux)

    def fuse(self, low: Tensor, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens (V, N, l) and stage maps -> image tokens before their projector, and a (V, 1) of the gated fusions
        (spec 2.3, 2.6)."""
        if self.config.fusion == "none":
            return low, None
        if self.config.fusion == "patch_info_mining" and self.config.patch_info_stages == "all":
            high = upsample_stages(stages)
        else:
            high = stages[-1]
        fused = self.fusion(low, high.to(low.dtype))
        return fused if isinstance(fused, tuple) else (fused, None)

    def pool_boxes(self, stages: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Stage maps and V tensors (K_v, 4) of boxes on the canvas -> features (sum of K_v, channels), one tensor for
        each level that has a projection of its own (spec 2.4, 2.6). Pooled in float32, without gradient."""
        config = self.config
        options = {"canvas": config.box_canvas, "bins": config.object_bins, "pooling": config.object_pooling}
        if config.object_levels == "multi_level":
            return tuple(torch.cat(level) for level in pool_levels(stages, boxes, **options))
        pooled = pool_objects(stages if config.object_levels == "all" else stages[-1:], boxes, **options)
        return (torch.cat(pooled),)

    def object_features(self, levels: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """What `pool_boxes` gave -> V tensors (K_v, object width)."""
        if self.config.object_levels != "multi_level":
            return list(levels[0].split(list(counts)))
        pairs = zip(self.level_projectors, levels, strict=True)
        # The mean over bins has been taken; being linear, it may come before projection and sum.
        projected = [project(level.to(self.bridge_dtype)) for project, level in pairs]
        return list(torch.stack(projected).sum(dim=0).split(list(counts)))

    def merge_objects(self, low: Tensor, fused: Tensor, objects: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Image tokens and object features, one attending to the other where the configuration says so (spec 2.6)."""
        if self.config.objects not in ("f_to_b", "b_to_f"):
            return fused, list(objects)
        counts = [len(own) for own in objects]
        padded = pad_sequence([own.to(fused.dtype) for own in objects], batch_first=True)
        if self.config.objects == "f_to_b":
            real = torch.arange(padded.shape[1], device=padded.device) < torch.tensor(
                counts, device=padded.device
            ).unsqueeze(1)
            return self.object_attention(fused, padded, real), []
        attended = self.object_attention(padded, low if self.config.unfused_keys else fused)
        return fused, [rows[:count] for rows, count in zip(attended, counts, strict=True)]

    def look(
        self, pixel_values: Tensor, pixel_values_aux: Tensor | None, boxes: Sequence[Tensor] | None
    ) -> TowerFeatures:
        """What the frozen towers see of V pictures: the half of `encode` that no training changes.

        Arguments and errors as `encode`.
        """
        low = self.encode_low(pixel_values)
        maps: tuple[Tensor, ...] = ()
        levels: tuple[Tensor, ...] = ()
        counts: list[int] = []
        if self.config.sees_high_res:
            if pixel_values_aux is None:
                raise InputError("pixel_values_aux is missing: this model looks at pictures in high resolution, too.")
            stages = self.encode_high(pixel_values_aux)
            if self.config.fusion == "patch_info_mining" and self.config.patch_info_stages == "all":
                maps = stages
            elif self.config.fusion != "none":
                maps = stages[-1:]
            if self.config.objects != "none":
                self._check_boxes(boxes, len(low))
                assert boxes is not None
                levels, counts = self.pool_boxes(stages, boxes), [len(own) for own in boxes]
        return TowerFeatures(low, maps, levels, torch.tensor(counts))

    def bridge(self, seen: TowerFeatures) -> VisualTokens:
        """Fusion, object features and projectors: the half of `encode` that is trained."""
        low = seen.low.to(self.bridge_dtype)
        fused, logit = self.fuse(low, seen.maps)
        objects: list[Tensor] = []
        counts = seen.counts.tolist()
        if self.config.objects != "none":
            fused, objects = self.merge_objects(low, fused, self.object_features(seen.levels, counts))
        image, kept = self.project_image(fused)
        if self.config.has_object_tokens:
            projected = self.box_projector(torch.cat(objects).to(self.bridge_dtype))
            tokens = projected.split(counts)
        else:
            tokens = tuple(image[0].new_zeros(len(image), 0, image[0].shape[-1]))
        return VisualTokens(image, tokens, None if logit is None else torch.tanh(logit.detach()), kept)

    def encode(
        self, pixel_values: Tensor, pixel_values_aux: Tensor | None, boxes: Sequence[Tensor] | None
    ) -> VisualTokens:
        """Pictures as the language model sees them. They depend on no text, so a conversation needs them once.

        Args:
            pixel_values: (V, 3, s, s) normalised.
            pixel_values_aux: (V, 3, S, S) normalised; None only for a model that sees no high resolution.
            boxes: V tensors (K_v, 4) xyxy on the canvas, each with at least one box (0, 0, 0, 0 for none); not read
                by a model without objects.

        Raises:
            InputError: sizes that do not fit, a picture without a box, or a missing input.
        """
        return self.bridge(self.look(pixel_values, pixel_values_aux, boxes))

    @property
    def projects_tokens(self) -> bool:
        """Whether the projector takes each image token by itself, so that a token can be left out before it."""
        return self.config.fusion != "resampler"

    def project_image(self, fused: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
        """Fused image tokens (V, N, C') as the language model reads them, and which of them these are: None for all.

        `foveate.drop_visual_tokens` puts its own function in this one's place; see `VisualTokens` for what it returns.
        """
        return self.image_projector(fused), None

    @staticmethod
    def _check_boxes(boxes: Sequence[Tensor] | None, pictures: int) -> None:
        if boxes is None or len(boxes) != pictures:
            given = "none" if boxes is None else len(boxes)
            raise InputError(f"{pictures} pictures need {pictures} tensors of boxes, {given} given.")
        for number, own in enumerate(boxes):
            if own.ndim != 2 or own.shape[1] != 4 or not len(own):
                raise InputError(
                    f"the boxes of picture {number} must be (K, 4) with at least one, (0, 0, 0, 0) for none, not "
                    f"{tuple(own.shape)}."
                )

    # ---------------------------------------------------------------- reading

    def assemble(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visuals: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        left_padding: bool = False,
    ) -> AssembledInputs:
        """Puts visual tokens in the place of their placeholders (spec 2.5).

        Args:
            input_ids: (B, T); `IMAGE_ID` and `VIDEO_ID` are placeholders.
            attention_mask: (B, T), 0 where padded, on whichever side; None for no padding.
            visuals: (L, C) tokens for each placeholder, in the order of rows and places.
            labels: (B, T), `IGNORED` where nothing is learnt.
            left_padding: pad on the left, as generation needs it.

        Raises:
            InputError: more or fewer placeholders than visuals.
        """
        embedding: Any = self.get_input_embeddings()
        device = embedding.weight.device
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        words = embedding(input_ids.clamp(min=0).to(device))
        ids, real = input_ids.cpu(), attention_mask.bool().cpu()
        found = int((((ids == IMAGE_ID) | (ids == VIDEO_ID)) & real).sum())
        if found != len(visuals):
            raise InputError(
                f"the text has {found} placeholders for images and videos, and {len(visuals)} are given; write "
                "<image> once for each."
            )
        rows: list[Tensor] = []
        row_labels: list[Tensor] = []
        taken = 0
        for number, row in enumerate(ids):
            own = real[number].nonzero()[:, 0].tolist()
            tokens = [int(row[place]) for place in own]
            pieces: list[Tensor] = []
            learnt: list[Tensor] = []
            start = 0
            for place in [*(i for i, token in enumerate(tokens) if token in (IMAGE_ID, VIDEO_ID)), len(tokens)]:
                text = own[start:place]
                pieces.append(words[number, text])
                if labels is not None:
                    learnt.append(labels[number, text].to(device))
                if place < len(tokens):
                    visual = visuals[taken].to(device=device, dtype=words.dtype)
                    taken += 1
                    pieces.append(visual)
                    if labels is not None:
                        learnt.append(torch.full((len(visual),), IGNORED, dtype=labels.dtype, device=device))
                start = place + 1
            rows.append(torch.cat(pieces))
            if labels is not None:
                row_labels.append(torch.cat(learnt))
        side = "left" if left_padding else "right"
        lengths = torch.tensor([len(row) for row in rows], device=device)
        embeds = pad_sequence(rows, batch_first=True, padding_side=side)
        places = torch.arange(embeds.shape[1], device=device).expand(len(rows), -1)
        if left_padding:
            positions = places - (embeds.shape[1] - lengths)[:, None]
            mask = positions >= 0
        else:
            positions, mask = places, places < lengths[:, None]
        padded_labels = None
        if labels is not None:
            padded_labels = pad_sequence(row_labels, batch_first=True, padding_value=IGNORED, padding_side=side)
        return AssembledInputs(embeds, mask.to(attention_mask.dtype), positions * mask, padded_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        boxes: Tensor | Sequence[Tensor] | None = None,
        box_counts: Tensor | None = None,
        visual_counts: Tensor | Sequence[int] | None = None,
        visual_tokens: VisualTokens | None = None,
        tower_features: Mapping[str, Tensor] | None = None,
    ) -> MGLlavaOutput:
        """Logits, or the loss where labels are given: next-token cross-entropy, the mean over the learnt tokens of the
        batch (spec 3.2).

        Args:
            input_ids, attention_mask, labels: (B, T), as `assemble` takes them.
            pixel_values, pixel_values_aux: of V pictures, as `encode` takes them; None for texts only.
            boxes: V tensors (K_v, 4), or one (V, K, 4) of which `box_counts` (V,) rows are real.
            visual_counts: pictures of each placeholder, in order; by default 1 for an image and `num_frames` for a
                video. Pictures beyond their sum belong to no text and are passed over.
            visual_tokens: what `encode` gave, instead of pictures and boxes.
            tower_features: `TowerFeatures.tensors` of what `look` gave, instead of pictures and boxes.

        Raises:
            InputError: inputs that do not fit each other.
        """
        assert input_ids is not None
        visual = visual_tokens
        if visual is None and tower_features is not None:
            visual = self.bridge(TowerFeatures.of(tower_features))
        elif visual is None and pixel_values is not None:
            visual = self.encode(pixel_values, pixel_values_aux, _split_boxes(boxes, box_counts))
        inputs = self.assemble(
            input_ids, attention_mask, self._by_placeholder(input_ids, attention_mask, visual, visual_counts), labels
        )
        gate = None if visual is None else visual.gate
        call = {
            "inputs_embeds": inputs.inputs_embeds,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
            "use_cache": False,
        }
        if inputs.labels is None:
            return MGLlavaOutput(logits=self.language_model(**call).logits, gate=gate)
        # The answers are a small part of what is read: logits of other places would only cost memory.
        targets = inputs.labels[:, 1:]
        learnt = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
        if self._keeps_logits():
            logits = self.language_model(**call, logits_to_keep=learnt).logits
        else:
            logits = self.language_model(**call).logits[:, learnt]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[:, learnt].flatten(), ignore_index=IGNORED)
        if visual is not None:  # all of it in the graph, also what belongs to no text (spec 2.5)
            loss = loss + sum(tokens.flatten()[:0].sum() for tokens in (*visual.image, *visual.objects))
        elif self.training and torch.is_grad_enabled():
            # A batch of texts only: with parameters out of the graph, other processes would wait for them for ever.
            loss = loss + sum(parameter.sum() * 0.0 for parameter in self.bridge_parameters())
        return MGLlavaOutput(loss=loss, gate=gate)

    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.language_model.forward).parameters

    def _by_placeholder(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visual: VisualTokens | None,
        counts: Tensor | Sequence[int] | None,
    ) -> list[Tensor]:
        """The visual tokens of each placeholder, in order."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids = input_ids[real.bool()].tolist()
        kinds = [token for token in ids if token in (IMAGE_ID, VIDEO_ID)]
        if counts is None:
            wanted = [self.config.num_frames if kind == VIDEO_ID else 1 for kind in kinds]
        else:
            wanted = counts.tolist() if isinstance(counts, Tensor) else [int(count) for count in counts]
        available = 0 if visual is None else len(visual)
        if len(wanted) != len(kinds) or sum(wanted) > available:
            raise InputError(
                f"the texts have {len(kinds)} placeholders that stand for {sum(wanted)} pictures, and {available} "
                "pictures are given; write <image> or <video> once for each image or video."
            )
        starts = [sum(wanted[:number]) for number in range(len(wanted))]
        return [visual.sequence(start, count) for start, count in zip(starts, wanted, strict=True)] if visual else []

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        visual_tokens: VisualTokens | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        boxes: Tensor | Sequence[Tensor] | None = None,
        box_counts: Tensor | None = None,
        visual_counts: Tensor | Sequence[int] | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Tensor:
        """New token ids (B, T'') of prompts, by transformers' `generate`: beams, sampling, stopping criteria, ...

        Args:
            input_ids, ...: as `forward`; rows may be padded on either side.
            settings: as `transformers.GenerationMixin.generate` takes them.

        Raises:
            InputError: inputs that do not fit each other.
            CheckpointError: the language model gives non-finite logits.
        """
        visual = visual_tokens
        if visual is None and pixel_values is not None:
            visual = self.encode(pixel_values, pixel_values_aux, _split_boxes(boxes, box_counts))
        visuals = self._by_placeholder(input_ids, attention_mask, visual, visual_counts)
        inputs = self.assemble(input_ids, attention_mask, visuals, left_padding=True)
        processors = LogitsProcessorList([FiniteLogits(self.language_model), *settings.pop("logits_processor", ())])
        return self.language_model.generate(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            generation_config=generation_config,
            logits_processor=processors,
            **settings,
        )


_FUSIONS: dict[str, Any] = {
    "conv_gate": ConvGate,
    "gate_concat": GateConcat,
    "conv_concat": ConvConcat,
    "resampler": TokenConcat,
    "patch_info_mining": PatchInfoMining,
}


def _split_boxes(boxes: Tensor | Sequence[Tensor] | None, counts: Tensor | None) -> list[Tensor] | None:
    if boxes is None or not isinstance(boxes, Tensor):
        return None if boxes is None else list(boxes)
    numbers = [boxes.shape[1]] * len(boxes) if counts is None else counts.tolist()
    return [own[:number] for own, number in zip(boxes, numbers, strict=True)]
