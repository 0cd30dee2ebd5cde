"""The DynRefer network, top to bottom as in figure 3 of the paper (spec 2).

    views -> frozen tower -> RoI-Align + CLS of each view -> align to view 1 -> fuse -> Q-Former -> region tokens x_v
    x_v -> tags | x_v -> contrast with text (attributes, classes) | x_v (+ control words) -> language model -> caption

Shapes: R regions, n views, C tower width, g RoI grid side, Q query tokens, V texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.utils.generic import ModelOutput

from foveate.language.generation import GeneratedSequences, generate_finite
from foveate.language.lm import load_text_encoder, untie_lm_head
from foveate.language.pretrained import PartsElsewhere, load_exactly
from foveate.ops.deform import deform_sample
from foveate.ops.roi_align import roi_align
from foveate.vision.towers import build_tower, load_tower

from .captioners import load_captioner, with_padding_row
from .configuration import DynReferConfig
from .losses import asymmetric_loss, prompt_loss, region_text_contrast

TRAINABLE = ("cvem", "cem", "tag", "attr", "qformer", "t5_proj", "llm_proj")
"""A parameter is trained if its name contains one of these (spec 3); the query tokens are therefore frozen."""


class PairConv2d(nn.Conv2d):
    """A convolution each of whose outputs reads two neighbouring channels, as a depthwise one of all channels and a sum
    of pairs: oneDNN runs groups of one channel several times as fast as groups of two."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, 2 C, h, w) -> (B, C, h, w)."""
        assert self.bias is not None
        single = F.conv2d(input, self.weight.flatten(0, 1)[:, None], padding=self.padding, groups=input.shape[1])
        return single[:, 0::2] + single[:, 1::2] + self.bias[:, None, None]


class AlignModule(nn.Module):
    """Resamples the features of a context view onto the grid of the region view (paper section 3.2, spec 2.4).

    A DCNv4 layer whose offsets and weights are predicted from both views: 3 x 3 taps, C channels in `groups` groups.
    """

    taps = 9

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.value_proj = nn.Linear(channels, channels)
        self.offset_mask_dw = PairConv2d(2 * channels, channels, 3, padding=1, groups=channels)
        # The official layer pads the 3 * groups * taps numbers to a multiple of 8; the tail is unused.
        self.offset_mask = nn.Linear(channels, math.ceil(3 * groups * self.taps / 8) * 8)
        self.output_proj = nn.Linear(channels, channels)

    def reset_parameters(self) -> None:
        """Zero offsets and weights: a context view starts by contributing only its CLS token."""
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.offset_mask_dw.reset_parameters()
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)

    def forward(self, reference: Tensor, features: Tensor) -> Tensor:
        """(B, C, g, g) features of the region view and of a context view -> (B, C, g, g) aligned context features."""
        value = self.value_proj(features.permute(0, 2, 3, 1))
        hidden = self.offset_mask_dw(torch.cat([features, reference], dim=1))
        offset_mask = self.offset_mask(hidden.permute(0, 2, 3, 1))
        sampled = deform_sample(value, offset_mask, groups=self.groups)
        return self.output_proj(sampled).permute(0, 3, 1, 2)


class HeadAttention(nn.Module):
    """Cross-attention of text queries to region tokens, with residual and LayerNorm (post-norm BERT)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({name: nn.Linear(size, size) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(size, size), "LayerNorm": nn.LayerNorm(size, eps=1e-12)})

    def forward(self, queries: Tensor, memory: Tensor, dropout: float) -> Tensor:
        """(1 or R, V, E) queries, (R, Q, E) region tokens -> (R, V, E)."""
        q, k, v = (
            self._project(name, source) for name, source in (("query", queries), ("key", memory), ("value", memory))
        )
        attended = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v, dropout_p=dropout)
        attended = self.output["dense"](rearrange(attended, "r h l d -> r l (h d)"))
        return self.output["LayerNorm"](F.dropout(attended, dropout) + queries)

    def weights(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(1 or R, V, E) queries, (R, Q, E) region tokens -> (R, h, V, Q) float32, what `forward` weighs values by."""
        q, k = (self._project(name, source).float() for name, source in (("query", queries), ("key", memory)))
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _project(self, name: str, source: Tensor) -> Tensor:
        return rearrange(self.self[name](source), "r l (h d) -> r h l d", h=self.heads)


class HeadLayer(nn.Module):
    """One layer of a recognition head: cross-attention, then a feed-forward of four times the width."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.crossattention = HeadAttention(size, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, 4 * size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * size, size), "LayerNorm": nn.LayerNorm(size, eps=1e-12)})

    def forward(self, queries: Tensor, memory: Tensor, dropout: float) -> Tensor:
        hidden = self.crossattention(queries, memory, dropout)
        expanded = self.output["dense"](F.gelu(self.intermediate["dense"](hidden)))
        return self.output["LayerNorm"](F.dropout(expanded, dropout) + hidden)


class RecognitionHead(nn.Module):
    """Texts query the region tokens (spec 2.6, 2.7): no self-attention and no positions, so that texts never see
    each other and any list of them can be scored in chunks."""

    chunk_size = 512

    def __init__(self, size: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(HeadLayer(size, heads) for _ in range(layers))})

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(V, E) queries and (R, Q, E) region tokens -> (R, V, E)."""
        if not self.training and len(queries) > self.chunk_size:
            # Bounds memory to R x chunk x 4E at inference; 4,585 tags at once would need gigabytes.
            return torch.cat([self(chunk, memory) for chunk in queries.split(self.chunk_size)], dim=1)
        dropout = self.dropout if self.training else 0.0
        hidden = queries[None]
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            hidden = layer(hidden, memory, dropout)
        return hidden

    def attention(self, queries: Tensor, memory: Tensor) -> Tensor:
        """How much a text of each region attends to its region tokens, mean over heads and layers.

        (R, E) queries and (R, Q, E) region tokens -> (R, Q) float32, rows add up to 1.
        """
        hidden, weights = queries[:, None], []
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            weights.append(cast(HeadLayer, layer).crossattention.weights(hidden, memory).mean(dim=1)[:, 0])
            hidden = layer(hidden, memory, 0.0)
        return torch.stack(weights).mean(dim=0)


@dataclass
class DynReferOutput(ModelOutput):
    """loss: scalar; losses: its weighted parts by name; query_output: (R, Q, H) region tokens."""

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    query_output: Tensor | None = None


class DynReferPreTrainedModel(PreTrainedModel):
    config_class = DynReferConfig
    base_model_prefix = "dynrefer"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # From here down and not part by part: transformers passes over modules of other packages that hold no parameter
        # of their own, as the align module and the heads do.
        if isinstance(module, DynReferModel):
            if self.config.align:
                module.cvem_align.reset_parameters()
            heads: list[nn.Module] = [module.get_submodule(name) for name in ("tag_head", "attr_head")]
            for head in heads:
                for part in head.modules():
                    if isinstance(part, nn.Linear):
                        nn.init.normal_(part.weight, std=self.config.initializer_range)
                        nn.init.zeros_(part.bias)
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)
            nn.init.zeros_(module.cem_memory)
            nn.init.constant_(module.attr_t, math.log(10.0))
            nn.init.constant_(module.attr_b, -10.0)


class DynReferModel(PartsElsewhere, DynReferPreTrainedModel):
    """DynRefer whole: frozen tower, region encoder, tag head, contrast head and captioner.

    The captioner is of one of two kinds (`captioners.py`); the layer before it is called `t5_proj` or `llm_proj`, as in
    the official weights, and `language_proj` is it.
    """

    t5_proj: nn.Linear
    llm_proj: nn.Linear

    def __init__(self, config: DynReferConfig) -> None:
        super().__init__(config)
        width, hidden, size = config.vision_config.hidden_size, config.qformer_config.hidden_size, config.head_size
        text_width = config.text_config.projection_dim
        language_width = config.language_config.hidden_size

        # For BLIP-2's tower the official frozen `ln_vision` is the tower's own final norm.
        self.vision_tower = build_tower(config.vision_config)
        if not self.vision_tower.has_cls:
            raise ValueError(f"a {config.vision_config.model_type} tower has no class token, which the views need")
        self.text_encoder = CLIPTextModelWithProjection(config.text_config)
        self.captioner = config.captioner
        self.language_model = self.captioner.model_class.from_config(config.language_config)

        if config.align:
            self.cvem_align = AlignModule(width, config.align_groups)
        self.cvem_mlp = nn.Sequential(nn.Linear(config.num_views * width, width), nn.ReLU(), nn.Linear(width, width))
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, hidden))
        self.qformer = Blip2QFormerModel(config.qformer_config)

        depth, heads, dropout = config.head_layers, config.head_num_attention_heads, config.head_dropout
        self.tag_vision_proj = nn.Linear(hidden, size)
        self.tag_text_proj = nn.Linear(text_width, size)
        self.tag_head = RecognitionHead(size, depth, heads, dropout)
        self.tag_fc = nn.Linear(size, 1)
        self.attr_vision_proj = nn.Linear(hidden, size)
        self.attr_text_proj = nn.Linear(text_width, size)
        self.attr_head = RecognitionHead(size, depth, heads, dropout)
        self.attr_fc = nn.Linear(size, 1)
        self.attr_t = nn.Parameter(torch.tensor(math.log(10.0)))
        self.attr_b = nn.Parameter(torch.tensor(-10.0))

        self.add_module(self.captioner.projection, nn.Linear(hidden, language_width))
        self.cem_memory = nn.Parameter(torch.zeros(language_width))
        self.post_init()
        self.freeze()

    @property
    def language_proj(self) -> nn.Linear:
        """Region tokens -> the language model's width."""
        return cast(nn.Linear, self.get_submodule(self.captioner.projection))

    # ---------------------------------------------------------------- frozen parts

    def freeze(self) -> None:
        """Leave gradients only to the trainable parts (spec 3)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name.split(".")[0] for part in TRAINABLE))

    def train(self, mode: bool = True) -> DynReferModel:
        super().train(mode)
        # Frozen encoders stay deterministic. The language model follows `mode`: its dropout is active in training.
        self.vision_tower.eval()
        self.text_encoder.eval()
        return self

    FROZEN_PARTS = {"vision": "vision_tower", "text": "text_encoder", "language": "language_model"}  # noqa: RUF012

    def language_layers(self) -> list[nn.Module]:
        """The layers of the language model, those of an encoder first."""
        return self.captioner.layers(self.language_model)

    def cast_frozen(self, dtype: torch.dtype) -> DynReferModel:
        """The frozen tower, text encoder and language model in `dtype`; what is trained stays as it is."""
        return self._cast(dtype, tuple(f"{name}." for name in self.FROZEN_PARTS.values()))

    def _cast(self, dtype: torch.dtype, prefixes: tuple[str, ...] = ("",)) -> DynReferModel:
        """Parameters in `dtype`; beside float16, those that transformers keeps in float32 there (T5's `wo`).

        Buffers stay as they are: the frequencies of rotary positions lose places in half precision.
        """
        kept = set(self._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes):
                parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
        return self

    def before_base_models(self) -> None:
        # What is copied in afterwards is thus rounded once only.
        self._cast(self.query_tokens.dtype)

    def load_base_models(self, names: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """Fill the frozen parts from their own checkpoints, as all models do that have some elsewhere."""
        super().load_base_models(names, dtype)
        self.freeze()
        return self

    def base_weights(self, part: str, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tower's, the text encoder's or the language model's."""
        if part == "vision":
            return load_tower(path, dtype=dtype).state_dict()
        if part == "text":
            return load_text_encoder(path, dtype=dtype).state_dict()
        source: Any = load_captioner(path, dtype)[0]
        if source.get_output_embeddings().weight is not source.get_input_embeddings().weight:
            # A fresh T5 shares them, and the copy would overwrite the embedding with the output layer.
            untie_lm_head(self.language_model)
        rows = self.config.language_config.vocab_size
        return with_padding_row(source.state_dict(), self.captioner, rows)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; missing, unexpected, misshapen or non-finite weights are an error that lists them.

        Raises:
            CheckpointError: the same, or a file that cannot be read.
        """
        load = super().from_pretrained
        return load_exactly(load, pretrained_model_name_or_path, *args, what="the DynRefer checkpoint", **kwargs)

    # ---------------------------------------------------------------- region encoder

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """(U, 3, s, s) normalised views -> (U, 1 + g*g, C) tokens, CLS first, normalised (spec 2.2).

        "last_hidden_state" brings the tower's own final norm; an inner layer is normalised without parameters.
        """
        layer = self.config.vision_layer
        tokens = self.vision_tower(pixel_values, layers=(layer,)).hidden_states
        # The frozen parts may be of half the precision of what is trained on them.
        tokens = tokens.to(self.query_tokens.dtype)
        return tokens if isinstance(layer, str) else F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)

    def region_features(self, tokens: Tensor, region_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features and CLS of each view of each region (spec 2.3).

        Args:
            tokens: (R*n, 1 + g*g, C) view tokens, region-major.
            region_boxes: (R, n, 4) xyxy, the region in pixels of each resized view.
        Returns:
            (R, n, C, g, g) features, (R, n, C) CLS tokens.
        """
        regions, views = region_boxes.shape[:2]
        grid = self.config.grid_size
        maps = rearrange(tokens[:, 1:], "b (h w) c -> b c h w", h=grid)
        aligned = roi_align(
            maps,
            region_boxes.reshape(-1, 4),
            output_size=(grid, grid),
            spatial_scale=1 / self.config.vision_config.patch_size,
            sampling_ratio=2,
            aligned=False,
        )
        return aligned.unflatten(0, (regions, views)), tokens[:, 0].unflatten(0, (regions, views))

    def align_views(self, features: Tensor) -> Tensor:
        """(R, n, C, g, g) -> the same, views 2..n resampled onto view 1 (spec 2.4)."""
        if not self.config.align or features.shape[1] == 1:
            return features
        reference, context = features[:, :1], features[:, 1:]
        count = context.shape[1]
        aligned = self.cvem_align(reference.expand(-1, count, -1, -1, -1).flatten(0, 1), context.flatten(0, 1))
        return torch.cat([reference, aligned.unflatten(0, (-1, count))], dim=1)

    def encode_regions(self, tokens: Tensor, region_boxes: Tensor) -> Tensor:
        """View tokens (R*n, 1 + g*g, C) and boxes (R, n, 4) -> region tokens x_v (R, Q, H) (spec 2.3 to 2.5)."""
        features, cls = self.region_features(tokens, region_boxes)
        features = self.align_views(features)
        view_tokens = torch.cat([cls[:, :, None], rearrange(features, "r n c h w -> r n (h w) c")], dim=2)
        fused = self.cvem_mlp(rearrange(view_tokens, "r n l c -> r l (n c)"))
        queries = self.query_tokens.expand(len(fused), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=fused).last_hidden_state

    # ---------------------------------------------------------------- decoders

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(V, L) token ids -> (V, D) text embeddings, not L2-normalised (spec 2.8). No gradient."""
        with torch.no_grad():
            embeds = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).text_embeds
            return embeds.to(self.attr_text_proj.weight.dtype)

    def tag_logits(self, query_output: Tensor, tag_embeds: Tensor) -> Tensor:
        """(R, Q, H) region tokens, (V, D) tag embeddings -> (R, V) logits (spec 2.6)."""
        hidden = self.tag_head(self.tag_text_proj(tag_embeds), self.tag_vision_proj(query_output))
        return self.tag_fc(hidden).squeeze(-1)

    def text_logits(self, query_output: Tensor, text_embeds: Tensor) -> Tensor:
        """(R, Q, H) region tokens, (V, D) text embeddings -> (R, V) raw similarities (spec 2.7)."""
        hidden = self.attr_head(self.attr_text_proj(text_embeds), self.attr_vision_proj(query_output))
        return self.attr_fc(F.normalize(hidden, dim=-1)).squeeze(-1)

    def tag_attention(self, query_output: Tensor, tag_embeds: Tensor) -> Tensor:
        """(R, Q, H) region tokens, (R, D) the embedding of a tag for each -> (R, Q) what the tag's query attends to."""
        return self.tag_head.attention(self.tag_text_proj(tag_embeds), self.tag_vision_proj(query_output))

    def text_attention(self, query_output: Tensor, text_embeds: Tensor) -> Tensor:
        """The same of the contrast head, whose texts are attributes and classes."""
        return self.attr_head.attention(self.attr_text_proj(text_embeds), self.attr_vision_proj(query_output))

    def contrast_logits(self, similarity: Tensor) -> Tensor:
        """Raw similarities -> the logits of the training objective, e^attr_t * s + attr_b."""
        return self.attr_t.exp() * similarity + self.attr_b

    def language_inputs(self, query_output: Tensor, control_ids: Tensor, control_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the captioner reads before a caption: region tokens, then control words (spec 2.10, 2.11).

        Returns:
            inputs_embeds (R, Q + L, width), attention_mask (R, Q + L).
        """
        return self.captioner.prompt(*self._visual_and_control(query_output, control_ids), control_mask)

    def _visual_and_control(self, query_output: Tensor, control_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Projected region tokens, and embedded control words each with `cem_memory` added."""
        control = self.language_model.get_input_embeddings()(control_ids) + self.cem_memory
        return self.language_proj(query_output), control

    def caption_loss(
        self, query_output: Tensor, control_ids: Tensor, control_mask: Tensor, caption_ids: Tensor, caption_mask: Tensor
    ) -> Tensor:
        """Token-mean cross-entropy of the captions; padding and what stands before them does not count (spec 3)."""
        visual, control = self._visual_and_control(query_output, control_ids)
        labels = caption_ids.masked_fill(caption_mask == 0, -100)
        logits, labels = self.captioner.teach(self.language_model, visual, control, control_mask, caption_ids, labels)
        # Not left to the language model: it would sum in its own precision, which may be half.
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(
        self, query_output: Tensor, control_ids: Tensor, control_mask: Tensor, **settings: Any
    ) -> GeneratedSequences:
        """Captions of regions: token ids and their scores exp(sequence score) (spec 4.1 step 7).

        Raises:
            CheckpointError: the language model gave non-finite logits.
        """
        inputs_embeds, attention_mask = self.language_inputs(query_output, control_ids, control_mask)
        return generate_finite(
            self.language_model,
            inputs_embeds=inputs_embeds.to(self.language_model.dtype),
            attention_mask=attention_mask,
            **{**self.config.generation, **settings},
        )

    # ---------------------------------------------------------------- training

    def forward(
        self,
        pixel_values: Tensor | None = None,
        region_boxes: Tensor | None = None,
        *,
        view_tokens: Tensor | None = None,
        view_index: Tensor | None = None,
        tag_embeds: Tensor | None = None,
        tag_targets: Tensor | None = None,
        caption_text_ids: Tensor | None = None,
        caption_text_mask: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_labels: Tensor | None = None,
        control_ids: Tensor | None = None,
        control_mask: Tensor | None = None,
        caption_ids: Tensor | None = None,
        caption_mask: Tensor | None = None,
    ) -> DynReferOutput:
        """Region tokens and every objective whose targets are given and whose weight is not zero.

        Args:
            pixel_values: (U, 3, s, s) distinct views.
            region_boxes: (R, n, 4) xyxy, the region in pixels of each of its views.
            view_tokens: (U, 1 + g*g, C) what `encode_views` gave for them, instead of `pixel_values`.
            view_index: (R, n) rows of `pixel_values`; None if U = R*n in region-major order.
            tag_embeds, tag_targets: (V, D) embeddings of the tag list, (R, V) of 0 and 1.
            caption_text_ids, caption_text_mask: (R, L) captions for the contrast head's text encoder.
            prompt_embeds, prompt_labels: (P, D), (R, P) of 1, 0 and -1 (unknown).
            control_ids, control_mask, caption_ids, caption_mask: (R, L) for the language model.
        """
        config = self.config
        assert region_boxes is not None
        if (pixel_values is None) == (view_tokens is None):
            raise ValueError("give either pixel_values or view_tokens")
        with torch.no_grad():
            tokens = self.encode_views(pixel_values) if pixel_values is not None else view_tokens
        assert tokens is not None
        if view_index is not None:
            tokens = tokens[view_index.flatten()]
        query_output = self.encode_regions(tokens, region_boxes)

        losses: dict[str, Tensor] = {}
        if config.caption_loss_weight and caption_ids is not None:
            assert control_ids is not None
            assert control_mask is not None
            assert caption_mask is not None
            losses["caption"] = config.caption_loss_weight * self.caption_loss(
                query_output, control_ids, control_mask, caption_ids, caption_mask
            )
        if config.tag_loss_weight and tag_targets is not None:
            assert tag_embeds is not None
            logits = self.tag_logits(query_output, tag_embeds).float()
            losses["tag"] = config.tag_loss_weight * asymmetric_loss(logits, tag_targets)
        if config.contrast_loss_weight and caption_text_ids is not None:
            embeds = self.encode_text(caption_text_ids, caption_text_mask)
            losses["contrast"] = config.contrast_loss_weight * self._contrast(query_output, embeds)
        if config.prompt_loss_weight and prompt_labels is not None:
            assert prompt_embeds is not None
            logits = self.contrast_logits(self.text_logits(query_output, prompt_embeds)).float()
            losses["prompt"] = config.prompt_loss_weight * prompt_loss(logits, prompt_labels)
        loss = torch.stack([value.float() for value in losses.values()]).sum() if losses else None
        return DynReferOutput(loss=loss, losses=losses, query_output=query_output)

    def _contrast(self, query_output: Tensor, text_embeds: Tensor) -> Tensor:
        """The contrast objective, over the regions and captions of all processes (spec 3, L_rtc)."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            similarity = self.text_logits(query_output, text_embeds).float()
            return region_text_contrast(similarity.T, similarity, self.attr_t, self.attr_b)
        all_queries, all_texts = _gather(query_output), _gather(text_embeds)
        rank = torch.distributed.get_rank()
        return gathered_contrast(self, query_output, text_embeds, all_queries, all_texts, rank)


def gathered_contrast(
    model: DynReferModel, query_output: Tensor, text_embeds: Tensor, all_queries: Tensor, all_texts: Tensor, rank: int
) -> Tensor:
    """Contrast of one process against what all processes gathered (no gradient through the gathered tensors)."""
    text_to_region = model.text_logits(all_queries.detach(), text_embeds).float().T
    region_to_text = model.text_logits(query_output, all_texts.detach()).float()
    return region_text_contrast(
        text_to_region, region_to_text, model.attr_t, model.attr_b, offset=rank * len(query_output)
    )


def _gather(tensor: Tensor) -> Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(pieces, tensor.detach().contiguous())
    return torch.cat(pieces)


def group_maximum(scores: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """(R, sum of sizes) scores of prompts -> (R, groups): the best prompt of each attribute (spec 2.9)."""
    return torch.stack([chunk.amax(dim=1) for chunk in scores.split(list(group_sizes), dim=1)], dim=1)
