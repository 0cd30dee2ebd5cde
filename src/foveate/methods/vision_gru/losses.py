"""The objective of classification (spec 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
