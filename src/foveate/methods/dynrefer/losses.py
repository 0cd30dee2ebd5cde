"""The objectives of DynRefer (paper section 3.3, spec 3): L = L_llm + 0.01 L_tag + 0.5 L_rtc."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def asymmetric_loss(
    logits: Tensor, targets: Tensor, *, gamma_negative: float = 7.0, gamma_positive: float = 0.0, clip: float = 0.05
) -> Tensor:
    """Asymmetric multi-label loss, summed over everything (spec 3, L_tag; Ben-Baruch et al. 2021, equations 4 to 7).

    With p = sigmoid(logits) and q = min(1 - p + clip, 1):
    - sum[y log p (1 - p)^gamma_positive + (1 - y) log q (1 - q)^gamma_negative]; logs are clamped at 1e-8 and no
    gradient flows through the focal factors.

    Args:
        logits: (..., V).
        targets: same shape, 1 for present and 0 for absent.
    """
    probability = torch.sigmoid(logits)
    absent = (1 - probability + clip).clamp(max=1) if clip > 0 else 1 - probability
    targets = targets.to(logits.dtype)
    log_likelihood = targets * probability.clamp(min=1e-8).log() + (1 - targets) * absent.clamp(min=1e-8).log()
    with torch.no_grad():
        certainty = probability * targets + absent * (1 - targets)
        gamma = gamma_positive * targets + gamma_negative * (1 - targets)
        focus = (1 - certainty).pow(gamma)
    return -(focus * log_likelihood).sum()


def region_text_contrast(
    text_to_region: Tensor, region_to_text: Tensor, scale: Tensor, bias: Tensor, *, offset: int = 0
) -> Tensor:
    """Sigmoid contrast of regions and captions in both directions (spec 3, L_rtc; SigLIP, Zhai et al. 2023).

    Args:
        text_to_region: (b, B) similarity of this process's b captions with all B regions.
        region_to_text: (b, B) similarity of this process's b regions with all B captions.
        scale: scalar, the logarithm of the temperature.
        bias: scalar.
        offset: column of the first matching pair, rank * b.
    Returns:
        scalar: the mean over the two directions of - sum log sigmoid(label (e^scale s + bias)) / b.
    """
    rows, columns = text_to_region.shape
    label = -torch.ones(rows, columns, device=text_to_region.device, dtype=text_to_region.dtype)
    index = torch.arange(rows, device=label.device)
    label[index, index + offset] = 1
    losses = [
        -F.logsigmoid(label * (scale.exp() * similarity + bias)).sum() / rows
        for similarity in (text_to_region, region_to_text)
    ]
    return (losses[0] + losses[1]) / 2


def prompt_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid loss on attribute and class prompts whose truth is known; sum over prompts, mean over regions.

    An extension for data with explicit negatives (the rendered world, OVAD-style labels); the paper has no such term.

    Args:
        logits: (R, P), already scaled by the contrast head's temperature and bias.
        labels: (R, P), 1 holds, 0 does not hold, -1 unknown (ignored).
    """
    known = labels >= 0
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    return (losses * known).sum() / max(1, labels.shape[0])
