"""Linear layers in int8 on a CPU, quantised while they run: `foveate describe --quantize int8`.

    y = scale_row * (round(x / scale_row) @ round(W / scale_column)^T) * scale_column + b

Every row of x (a token) and every output column of W has a scale of its own, its largest absolute value over 63 or 127.
One scale for all tokens, as torch's own dynamic layers have it, would let a single large channel of a single token
drown the rest, and would make a region's answer depend on which others are described with it. Activations keep 7 bits,
because without VNNI a CPU adds pairs of products in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.checkpoints import suggestion
from foveate.errors import InputError

QUANTIZATIONS = ("int8",)
_ACTIVATION_LEVELS, _WEIGHT_LEVELS = 63, 127
_TINY = torch.finfo(torch.float32).tiny
# Smaller layers lose more by quantising rows than their product gains (`benchmarks/describe.py --only linear`), and
# stay as they are. So do those that say where to sample, what the captioner reads and how probable each word is; one
# whose type is asked for; and the text encoder, which reads every word once.
_LEAST_WEIGHTS, _LEAST_LONGER_SIDE = 2**16, 512
_KEPT = frozenset({"offset_mask", "lm_head", "t5_proj", "llm_proj", "attr_text_proj", "text_encoder"})


class Int8Linear(nn.Module):
    """An `nn.Linear` for inference with int8 weights; activations are quantised row by row as they come.

    Args:
        linear: on a CPU; it is not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            weight, bias = linear.weight.float(), linear.bias
            self._scale = weight.abs().amax(dim=1).clamp_min(_TINY) / _WEIGHT_LEVELS
            rounded = (weight / self._scale[:, None]).round().to(torch.int8)
            self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
            self._zeros = torch.zeros(self.out_features, dtype=torch.int64)
            self._bias = torch.zeros(self.out_features) if bias is None else bias.float().clone()

    @property
    def weight(self) -> None:
        """There is no float weight; transformers' T5 asks for its type."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of x. Rows with NaN or infinity stay non-finite."""
        rows = x.reshape(-1, self.in_features).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / _ACTIVATION_LEVELS
        # Unsigned with the zero at 64, as oneDNN's kernels want it; what is cut off after + 0.5 is rounded.
        shifted = (rows * scale.reciprocal()).add_(64.5).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 64, self._packed, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self._bias, product, scale).to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise InputError("a model in int8 cannot be saved, for its float weights are gone; load it without quantize.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def check_quantize(quantize: Any, device: torch.device) -> None:
    """Whether a model can run so on this device.

    Raises:
        InputError: an unknown name, a device that is no CPU, or a torch without oneDNN.
    """
    if quantize not in QUANTIZATIONS:
        near = suggestion(str(quantize), QUANTIZATIONS)
        raise InputError(f"there is no quantisation {quantize!r}{near}; use int8, or leave it out.")
    if device.type != "cpu":
        raise InputError(
            f"int8 layers that quantise while they run are for CPUs, not for {device}: on a GPU leave quantize out, "
            "for bfloat16 is the default there, or give the device cpu."
        )
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        raise InputError("int8 needs oneDNN, which this build of torch lacks; leave quantize out.")


def quantize_linears(model: nn.Module) -> int:
    """Puts an `Int8Linear` in place of the model's linear layers, and says of how many."""
    count = 0
    for name, parent in list(model.named_modules()):
        if _KEPT.intersection(name.split(".")):
            continue
        for child_name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child_name in _KEPT:
                continue
            if child.weight.numel() >= _LEAST_WEIGHTS and max(child.weight.shape) >= _LEAST_LONGER_SIDE:
                setattr(parent, child_name, Int8Linear(child))
                count += 1
    return count
