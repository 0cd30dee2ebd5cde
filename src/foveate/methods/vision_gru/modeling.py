"""VisionGRU (arXiv 2412.18178): convolutional stem, four stages of bidirectional minGRU blocks, global state at linear
cost. Modules and parameters have the names of the released code, so that its checkpoints load as they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.models.upernet.configuration_upernet import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

from foveate.errors import InputError
from foveate.ops.scan import linear_scan, mingru_scan

from .configuration import VisionGRUConfig
from .losses import classification_loss

Size = tuple[int, int]

STEM_EPS = 1e-6
"""Of the norms of stem and down-sampling; those inside blocks have PyTorch's 1e-5 (spec 2.2, 2.3, 2.5)."""


def as_map(tokens: Tensor, size: Size) -> Tensor:
    """(B, h w, d) tokens -> (B, d, h, w), a view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def as_tokens(features: Tensor) -> Tensor:
    """(B, d, h, w) -> (B, h w, d) in raster order; a view where channels are neighbours in memory."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def halved(size: Size) -> Size:
    """Height and width after a convolution of stride 2 with padding 1: halves, rounded up."""
    return -(-size[0] // 2), -(-size[1] // 2)


class MinGRU(nn.Module):
    """The minimal gated unit (spec 2.4; "Were RNNs All We Needed?", arXiv 2410.01201, section 3.1).

    h_t = (1 - z_t) h_{t-1} + z_t g(p_t), with [p; q] = W_in x and z = sigmoid(q); the output is W_out h.
    """

    def __init__(self, dim: int, expansion: float = 2.0, candidate: str = "g") -> None:
        super().__init__()
        state = int(dim * expansion)
        self.candidate = candidate
        self.to_hidden_and_gate = nn.Linear(dim, 2 * state, bias=False)
        self.to_out = nn.Linear(state, dim, bias=False) if expansion != 1.0 else nn.Identity()

    def forward(self, x: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, d) and the state before the first of them (B, 1, C) -> output (B, L, d) and the last state."""
        h, last = scan(self.to_hidden_and_gate(x), state, [reverse], self.candidate)
        return self.to_out(h), last


def scan(pq: Tensor, state: Tensor | None, reverse: list[bool], candidate: str) -> tuple[Tensor, Tensor]:
    """The states (B, L, G C) of G directions from their candidates and gates (B, L, G 2 C), and the last ones."""
    if candidate == "g":
        return mingru_scan(pq, state, reverse)
    groups = len(reverse)
    p, q = pq.unflatten(2, (groups, 2, -1)).unbind(3)
    keep, new = torch.sigmoid(-q.float()), torch.sigmoid(q.float()) * p.float()
    starts = [None] * groups if state is None else list(state[:, 0].float().chunk(groups, 1))
    found = [
        linear_scan(keep[:, :, g], new[:, :, g], starts[g], dim=1, reverse=backwards)
        for g, backwards in enumerate(reverse)
    ]
    last = torch.cat([h[:, 0 if backwards else -1] for h, backwards in zip(found, reverse, strict=True)], 1)
    return torch.cat(found, 2).to(pq.dtype), last[:, None]


_RUNS = {"both": (("min_gru_1", False), ("min_gru_2", True)), "forward": (("min_gru_1", False),), "local": ()}
"""The units of a block, and whether each runs backwards."""


class Block(GradientCheckpointingLayer):
    """Depth-wise convolution for what is near, two minGRUs over the whole raster for what is far, feed-forward.

    Both runs see the map as one sequence, row after row: the first from its first pixel, the second from its last.
    """

    def __init__(self, dim: int, config: VisionGRUConfig) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.config = config
        if config.mixer == "both":
            self.min_gru_1 = MinGRU(dim, config.expansion, config.candidate)
            self.min_gru_2 = MinGRU(dim, config.expansion, config.candidate)
        elif config.mixer == "forward":
            self.min_gru_1 = MinGRU(dim, 2 * config.expansion, config.candidate)
        else:
            inner = 3 * int(dim * config.expansion)
            self.local = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.projection1 = nn.Linear(dim, hidden)
        self.projection2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.dw_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, h w, d) -> (B, h w, d)."""
        near = as_tokens(self.dw_conv(as_map(self.norm(x), size)))
        if not torch.is_grad_enabled() and x.shape[1] > self.config.stream_above:
            return self._stream(x, near)
        x = x + self._far(near)
        return x + self._feed_forward(x)

    def _far(self, u: Tensor) -> Tensor:
        """Both runs at once: one product into candidates and gates, one scan, one product that also sums them.

        Joining the matrices for this is a copy of them, which counts where there are fewer tokens than channels, as in
        the last stages of one small image; there the products are joined instead.
        """
        if self.config.mixer != "both":
            return self.min_gru_1(u)[0] if self.config.mixer == "forward" else self.local(u)
        units = (self.min_gru_1, self.min_gru_2)
        # A graph that is traced must not depend on the number of tokens.
        few = not torch.compiler.is_compiling() and u.shape[0] * u.shape[1] < u.shape[2]
        inward = [unit.to_hidden_and_gate.weight for unit in units]
        pq = torch.cat([F.linear(u, weight) for weight in inward], 2) if few else F.linear(u, torch.cat(inward))
        h, _ = scan(pq, None, [False, True], self.config.candidate)
        if few or isinstance(self.min_gru_1.to_out, nn.Identity):
            first, second = h.chunk(2, 2)
            return self.min_gru_1.to_out(first) + self.min_gru_2.to_out(second)
        return F.linear(h, torch.cat([unit.to_out.weight for unit in units], 1))  # type: ignore[arg-type]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.projection2(F.gelu(self.projection1(self.norm2(x))))

    def _stream(self, x: Tensor, near: Tensor) -> Tensor:
        """The same in slices of tokens, the states carried from one to the next (spec 4.3): exact, in less memory."""
        step = self.config.stream_tokens
        slices = [slice(start, start + step) for start in range(0, x.shape[1], step)]
        x = x.clone()
        if self.config.mixer == "local":
            for part in slices:
                x[:, part] += self.local(near[:, part])
        for name, reverse in _RUNS[self.config.mixer]:
            unit, state = self.get_submodule(name), None
            for part in reversed(slices) if reverse else slices:
                y, state = unit(near[:, part], state, reverse=reverse)
                x[:, part] += y
        for part in slices:
            x[:, part] += self._feed_forward(x[:, part])
        return x


class Stem(nn.Module):
    """Two convolutions of stride 2 from pixels to tokens, a norm after each (spec 2.2)."""

    def __init__(self, config: VisionGRUConfig) -> None:
        super().__init__()
        half = config.dim // 2
        self.config = config
        self.conv1 = nn.Conv2d(config.num_channels, half, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(half, config.dim, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(half, eps=STEM_EPS)
        self.norm2 = nn.LayerNorm(config.dim, eps=STEM_EPS)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Size]:
        """(B, 3, H, W) -> tokens (B, h w, dim) and (h, w), the sides' quarters rounded up."""
        height, width = pixel_values.shape[2:]
        size = halved(halved((height, width)))
        if torch.is_grad_enabled() or size[0] * size[1] <= self.config.stream_above:
            return self._tokens(pixel_values, (1, 1), (1, 1)), size
        rows = max(1, self.config.stream_tokens // size[1])
        bands = [self._band(pixel_values, top, min(top + rows, size[0])) for top in range(0, size[0], rows)]
        return torch.cat(bands, 1), size

    def _tokens(self, pixels: Tensor, pad1: tuple[int, int], pad2: tuple[int, int]) -> Tensor:
        """pad1 and pad2: rows of zeros above and below the input of either convolution."""
        x = F.conv2d(F.pad(pixels, (1, 1, *pad1)), self.conv1.weight, self.conv1.bias, stride=2)
        x = F.gelu(self.norm1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = F.conv2d(F.pad(x, (1, 1, *pad2)), self.conv2.weight, self.conv2.bias, stride=2)
        return self.norm2(as_tokens(x))

    def _band(self, pixels: Tensor, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom` of the token map, from the image rows that they see and no others."""
        rows, middle_rows = pixels.shape[2], -(-pixels.shape[2] // 2)
        first, last = 2 * top - 1, 2 * bottom - 1  # of the map between the convolutions, inclusive
        pad2 = (int(first < 0), int(last >= middle_rows))
        first, last = max(first, 0), min(last, middle_rows - 1)
        above, below = 2 * first - 1, 2 * last + 1
        pad1 = (int(above < 0), int(below >= rows))
        return self._tokens(pixels[:, :, max(above, 0) : below + 1], pad1, pad2)


class SnakeGRU(nn.Module):
    """The four stages, and the down-sampling between them (spec 2.5)."""

    def __init__(self, config: VisionGRUConfig) -> None:
        super().__init__()
        widths = config.widths
        self.layers = nn.ModuleList(
            nn.ModuleList(Block(width, config) for _ in range(depth))
            for width, depth in zip(widths, config.depths, strict=True)
        )
        for i, width in enumerate(widths[1:], 1):
            self.add_module(f"norm{i}", nn.LayerNorm(width, eps=STEM_EPS))
        for i, (before, width) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, width, 3, stride=2, padding=1))

    def forward(self, x: Tensor, size: Size) -> Iterator[tuple[Tensor, Size]]:
        """Tokens (B, h w, d) after each stage, and the size of their map."""
        for stage, blocks in enumerate(self.layers):
            if stage:
                x = as_tokens(self.get_submodule(f"conv{stage}")(as_map(x, size)))
                x, size = self.get_submodule(f"norm{stage}")(x), halved(size)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, size)
            yield x, size


class VisionGRUPreTrainedModel(PreTrainedModel):
    """What the three models below have in common."""

    config: VisionGRUConfig
    config_class = VisionGRUConfig
    base_model_prefix = "vision_gru"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own type)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # PyTorch's own initialisation everywhere (spec 2.5), not the normal one of transformers.
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class LearnedPositions(nn.Module):
    """A vector for each token of the training size, resampled bilinearly for other sizes."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, side, side))

    def forward(self, size: Size) -> Tensor:
        if self.weight.shape[2:] == size:
            return as_tokens(self.weight)
        return as_tokens(F.interpolate(self.weight, size=size, mode="bilinear", align_corners=False))


def sincos_positions(dim: int, size: Size, like: Tensor) -> Tensor:
    """(1, h w, dim): sines and cosines of the row in one half of the channels, of the column in the other."""
    quarter = -(-dim // 4)
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    parts = []
    for axis, length in enumerate(size):
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        wave = torch.cat([angle.sin(), angle.cos()], 1)
        shape = (size[0], 1, -1) if axis == 0 else (1, size[1], -1)
        parts.append(wave.view(shape).expand(*size, -1))
    return torch.cat(parts, 2)[..., :dim].reshape(1, size[0] * size[1], dim).to(like)


class VisionGRUModel(VisionGRUPreTrainedModel):
    """Stem and stages.

    Example:
        >>> model = VisionGRUModel(VisionGRUConfig())
        >>> model(torch.zeros(1, 3, 224, 320)).last_hidden_state.shape
        torch.Size([1, 576, 7, 10])
    """

    def __init__(self, config: VisionGRUConfig) -> None:
        super().__init__(config)
        self.tokenizer = Stem(config)
        self.snake_gru = SnakeGRU(config)
        self.positions = None
        if config.position_embedding == "learned":
            self.positions = LearnedPositions(config.dim, -(-config.image_size // 4))
        self.post_init()

    def stages(self, pixel_values: Tensor) -> Iterator[tuple[Tensor, Size]]:
        """Tokens (B, h w, d) and (h, w): first the stem's, then those after each of the four stages.

        Raises:
            InputError: no floating images (B, num_channels, H, W) with at least one pixel.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
            raise InputError(
                f"VisionGRU needs floating pixel_values (B, {channels}, H, W), got {tuple(pixel_values.shape)} "
                f"{pixel_values.dtype}."
            )
        if 0 in pixel_values.shape[2:]:
            raise InputError(f"VisionGRU needs images of at least one pixel, got {tuple(pixel_values.shape)}.")
        x, size = self.tokenizer(pixel_values)
        if self.positions is not None:
            x = x + self.positions(size)
        elif self.config.position_embedding == "sincos2d":
            x = x + sincos_positions(self.config.dim, size, x)
        yield x, size
        yield from self.snake_gru(x, size)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Any, ...]:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised with ImageNet's mean and deviation; any sides from one pixel up.
            output_hidden_states: also give the maps of the stem and of each stage.

        Returns:
            last_hidden_state (B, 8 dim, h, w), the last stage's residual stream with no norm after it, and
            pooler_output (B, 8 dim), the mean of its tokens.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps: list[Tensor] = []
        tokens = None
        for tokens, size in self.stages(pixel_values):
            if not wanted:
                maps.clear()
            maps.append(as_map(tokens, size))
        assert tokens is not None
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],  # type: ignore[arg-type]
            pooler_output=tokens.mean(1),
            hidden_states=tuple(maps) if wanted else None,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


class VisionGRUBackbone(BackboneMixin, VisionGRUPreTrainedModel):
    """The feature pyramid: maps of strides 4, 8, 16 and 32, as `AutoBackbone` gives them.

    Example:
        >>> backbone = VisionGRUBackbone(VisionGRUConfig(out_features=["stage1", "stage2", "stage3", "stage4"]))
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 64)).feature_maps]
        [(1, 72, 16, 16), (1, 144, 8, 8), (1, 288, 4, 4), (1, 576, 2, 2)]
    """

    has_attentions = False

    def __init__(self, config: VisionGRUConfig) -> None:
        super().__init__(config)
        self.num_features = [config.dim, *config.widths]  # type: ignore[assignment]
        self.vision_gru = VisionGRUModel(config)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """(B, 3, H, W) -> feature_maps, one (B, d, h, w) for each of `out_features`; there are no attentions."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features, hidden = [], []
        for name, (tokens, size) in zip(self.stage_names, self.vision_gru.stages(pixel_values), strict=True):
            if wanted:
                hidden.append(as_map(tokens, size))
            if name in self.out_features:
                features.append(as_map(tokens, size))
        output = BackboneOutput(feature_maps=tuple(features), hidden_states=tuple(hidden) if wanted else None)
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


class VisionGRUForImageClassification(VisionGRUPreTrainedModel):
    """VisionGRU with the official head: mean of the last stage's tokens, no norm, one linear layer."""

    def __init__(self, config: VisionGRUConfig) -> None:
        super().__init__(config)
        self.vision_gru = VisionGRUModel(config)
        self.fc = nn.Linear(config.widths[-1], config.num_labels or 0)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised.
            labels: class indices (B,), or probabilities (B, K) as mixup and cutmix make them.

        Returns:
            logits (B, K), and the loss where there are labels.
        """
        encoded = self.vision_gru(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.fc(encoded.pooler_output)
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else classification_loss(logits, labels),  # type: ignore[arg-type]
            logits=logits,
            hidden_states=encoded.hidden_states,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


def _as_dict(asked: bool | None, config: VisionGRUConfig) -> bool:
    return bool(config.return_dict if asked is None else asked)


AUTO_CLASSES: dict[str, type[PreTrainedModel]] = {
    "AutoBackbone": VisionGRUBackbone,
    "AutoModelForImageClassification": VisionGRUForImageClassification,
}
"""Further classes of transformers that know the configuration; `foveate.register` tells them."""


def build_upernet(
    config: VisionGRUConfig, num_labels: int = 150, *, dropout: float = 0.1, **settings: Any
) -> UperNetForSemanticSegmentation:
    """transformers' UPerNet on our feature pyramid, with the settings of spec 3.2 (ADE20K).

    Args:
        config: of the backbone; its four stages become the pyramid.
        num_labels: classes.
        dropout: of whole channels before both classifiers, see `add_head_dropout`.
        settings: of `UperNetConfig`, over the defaults hidden_size 512, pool_scales (1, 2, 3, 6), auxiliary head of
            256 channels on stage 3 with loss weight 0.4.
    """
    from foveate.methods import register

    register()
    backbone = VisionGRUConfig.from_dict(
        {**config.to_dict(), "out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": None}
    )
    wanted = {"auxiliary_in_channels": backbone.widths[2], "num_labels": num_labels, **settings}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **wanted))
    add_head_dropout(model, dropout)
    return model


def add_head_dropout(model: UperNetForSemanticSegmentation, probability: float = 0.1) -> None:
    """Dropout of whole channels before both classifiers, which the published training has and transformers' heads lack
    (spec 2.5). It works in training mode only and leaves the keys of the checkpoint alone."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout2d(inputs[0], probability, module.training), *inputs[1:])

    for head in (model.decode_head, model.auxiliary_head):
        if head is not None:
            head.classifier.register_forward_pre_hook(drop)
