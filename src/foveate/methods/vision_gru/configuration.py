"""Hyper-parameters of VisionGRU, validated; the defaults are VisionGRU-Ti's (spec 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

STAGES = 4
MIXERS = ("both", "forward", "local")

VARIANTS: dict[str, dict[str, Any]] = {
    "vision_gru_tiny": {"dim": 72, "depths": [2, 2, 8, 2]},
    "vision_gru_base": {"dim": 104, "depths": [2, 2, 15, 2]},
}
"""The published sizes: 30,216,952 and 86,907,352 parameters with a head of 1000 classes."""


class VisionGRUConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `VisionGRUModel`, `VisionGRUBackbone` and `VisionGRUForImageClassification`.

    Args:
        num_channels: of the input, 3 for RGB.
        dim: width of the first stage, even; stage i = 1..4 is dim * 2^(i-1) wide.
        depths: blocks of the four stages.
        expansion: state of a minGRU / width of its stage; with 1 the unit has no output projection (spec 2.4).
        mlp_ratio: hidden width of a block's feed-forward / width of its stage.
        candidate: "g", the positive candidate of the released code, or "linear", equation 8 of the paper (spec 7.2).
        mixer: what carries information over a block's map (spec 10): "both" runs, of the paper; "forward", one run of
            twice the state from the first pixel on; "local", a feed-forward in their place. All three have the same
            matrices' parameters.
        position_embedding: "none" as in the released code; "sincos2d" or "learned", as the paper's text has it (7.1).
        image_size: side in pixels that training uses; learned positions are resampled for others.
        stream_above: without gradients, maps of more tokens than this are walked in slices, which bounds the memory of
            the wide intermediates (spec 4.3). The result is the same.
        stream_tokens: tokens of a slice.
        out_features / out_indices: stages that `VisionGRUBackbone` gives: "stem", "stage1" .. "stage4".
    """

    model_type = "foveate_vision_gru"

    if TYPE_CHECKING:  # the fields below, and those of every configuration: num_labels, id2label, out_features, ...

        def __init__(self, **kwargs: Any) -> None: ...

    num_channels: int = 3
    dim: int = 72
    depths: list[int] | tuple[int, ...] = (2, 2, 8, 2)
    expansion: float = 2.0
    mlp_ratio: float = 4.0
    candidate: str = "g"
    mixer: str = "both"
    position_embedding: str = "none"
    image_size: int = 224
    stream_above: int = 16384
    stream_tokens: int = 4096
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON has lists only; one kind, whatever the caller gave.
        if isinstance(self.depths, tuple):
            self.depths = list(self.depths)
        self.check()
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, STAGES + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Whether the values can be used.

        Raises:
            ValueError: the sentence names the value.
        """
        for name in ("num_channels", "dim", "image_size", "stream_tokens"):
            if not _is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= 65536:
                raise ValueError(f"{name} must be a whole number from 1 to 65536, not {getattr(self, name)!r}")
        if self.dim % 2:
            raise ValueError(f"dim must be even, for the stem begins with half of it, not {self.dim}")
        if not _is_whole(self.stream_above) or self.stream_above < 0:
            raise ValueError(f"stream_above must be a whole number from 0, not {self.stream_above!r}")
        depths = self.depths
        if not isinstance(depths, list) or len(depths) != STAGES or not all(_is_whole(d) and d > 0 for d in depths):
            raise ValueError(
                f"depths must be the numbers of blocks of {STAGES} stages, such as [2, 2, 8, 2]: {depths!r}"
            )
        for name in ("expansion", "mlp_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / self.dim <= value <= 64:
                raise ValueError(f"{name} must be a number from 1 / dim to 64, not {value!r}")
        for name, known in (
            ("candidate", ("g", "linear")),
            ("mixer", MIXERS),
            ("position_embedding", ("none", "sincos2d", "learned")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def widths(self) -> list[int]:
        """Channels of the four stages."""
        return [self.dim * 2**i for i in range(STAGES)]

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of one image without the head (spec 4.4): linear in the number of pixels."""
        half, h, w = self.dim // 2, -(-height // 2), -(-width // 2)
        total = h * w * half * self.num_channels * 9
        h, w = -(-h // 2), -(-w // 2)
        total += h * w * self.dim * half * 9
        for stage, (d, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                h, w = -(-h // 2), -(-w // 2)
                total += h * w * d * (d // 2) * 9
            state, hidden = int(d * self.expansion), int(d * self.mlp_ratio)
            # One run of twice the state and the feed-forward in their place have as many.
            projections = 2 * (2 * state * d + (state * d if self.expansion != 1 or self.mixer != "both" else 0))
            total += depth * h * w * (projections + 2 * hidden * d + 9 * d)
        return total


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
