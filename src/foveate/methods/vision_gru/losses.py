"""The objectives of classification and of segmentation (spec 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from foveate.metrics.segmentation import IGNORE


def soft_target_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of KL(targets || softmax(logits)), in nats: cross-entropy less the targets' own entropy.

    Args:
        logits: (B, K).
        targets: (B, K) probabilities; a zero counts nothing.
    """
    return F.kl_div(F.log_softmax(logits.float(), 1), targets.float(), reduction="batchmean")


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class indices (B,), `soft_target_divergence` for probabilities (B, K)."""
    if labels.is_floating_point():
        return soft_target_divergence(logits, labels)
    return F.cross_entropy(logits.float(), labels)


def pixel_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, the mean over the pixels that have a label; 0 where none has (spec 3.2).

    Args:
        logits: (B, K, h, w), resized bilinearly to the labels' size.
        labels: (B, H, W) whole numbers, `IGNORE` for none.
        class_weights: (K,), how much a pixel of each class counts; by default 1.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)
