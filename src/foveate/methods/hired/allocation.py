"""How many tokens each partition may keep (spec 2.3, 2.6). Pure functions.

Symbols: T the budget in tokens, alpha the full picture's share of it, N tokens of a partition, k sub-images, s their
scores, A the class token's attention to the full picture in an early layer, summed over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .partitions import Partitions


def token_budget(candidates: int, rate: float) -> int:
    """T: the whole part of the floating-point product, which of 2880 tokens at 0.7 is 2015, not 2016 (spec 2.3)."""
    return int(candidates * rate)


def sub_image_scores(
    attention: Tensor,
    layout: Partitions,
    allocation: str,
    *,
    alpha: float = 0.5,
    top_cells: int | None = None,
    geometry: bool = False,
) -> Tensor:
    """s: how much content each sub-image has, by the full picture's map (spec 2.3).

    Args:
        attention: (N,) A.
        allocation: "mass", the sum of A over the sub-image's block (Eq. 1 of the paper); "count", how many of the K
            cells with the highest A lie in the block (the accepted code); "legacy_chunks", how many of the
            int(N * (1 - alpha)) highest lie in one of k equal runs of the raster (the code of 2024); "even", 1.
        top_cells: K, by default 100 of 576 cells and in proportion.
        geometry: blocks are the parts of the picture that the sub-images truly show.

    Returns:
        (k,) scores, k >= 1.
    """
    sub_images, cells, side = layout.count - 1, layout.cells, layout.side
    if allocation == "even":
        return torch.ones(sub_images, device=attention.device)
    if allocation == "mass":
        amounts = attention
    else:
        most = (
            int(cells * (1 - alpha)) if allocation == "legacy_chunks" else top_cells or max(1, round(100 * cells / 576))
        )
        amounts = torch.zeros_like(attention)
        amounts[attention.topk(min(most, cells)).indices] = 1
    if allocation == "legacy_chunks":
        bounds = [number * cells // sub_images for number in range(sub_images + 1)]
        return torch.stack([amounts[first:end].sum() for first, end in pairwise(bounds)])
    rows, columns = layout.grid
    if not geometry and side % rows == 0 and side % columns == 0:
        return amounts.view(rows, side // rows, columns, side // columns).sum(dim=(1, 3)).flatten()
    across, down = layout.weights(padded=geometry)
    amounts = amounts.view(side, side).double()
    return (across.to(amounts.device) @ amounts @ down.to(amounts.device).T).flatten().float()


def allocate(scores: Tensor, budget: int, alpha: float, caps: Sequence[int]) -> list[int]:
    """Tokens of each partition as the official code counts them: at most the budget (spec 2.3).

    What the truncation leaves and what exceeds a cap is not given to others. Where all scores are 0 (the official code
    divides by zero there) they count as even.

    Args:
        scores: (k,) s; empty for the full picture alone.
        budget: T.
        caps: 1 + k most tokens of each partition.
    """
    full = min(int(budget * alpha), caps[0]) if len(scores) else min(budget, caps[0])
    rest = min(budget - full, sum(caps[1:]))
    # In single precision: the published numbers have its truncation (53 of 100 parts of 100 tokens is 52).
    scores = scores.float() if scores.any() else torch.ones_like(scores, dtype=torch.float32)
    shares = (scores / scores.sum() * rest).long().tolist()
    return [full, *(min(share, cap) for share, cap in zip(shares, caps[1:], strict=True))]


def allocate_exactly(scores: Sequence[float], budget: int, alpha: float, caps: Sequence[int]) -> list[int]:
    """Tokens of each partition whose sum is min(T, sum of caps) (spec 2.6, `exact_budget`).

    Sub-images get the whole parts of their shares, again and again of what is left; where all of these are 0, one token
    each by the size of the share; what none of them can take goes to the full picture, then to sub-images in order.

    Args:
        scores, budget, alpha, caps: as in `allocate`.
    """
    counts = [min(int(alpha * budget), caps[0]), *([0] * len(scores))]
    left = min(budget, sum(caps)) - counts[0]
    while left > 0:
        open_ = [i for i, score in enumerate(scores, start=1) if counts[i] < caps[i] and score > 0]
        total = sum(scores[i - 1] for i in open_)
        if not open_ or total <= 0:
            break
        shares = {i: left * scores[i - 1] / total for i in open_}
        given = {i: min(int(share), caps[i] - counts[i]) for i, share in shares.items()}
        if not any(given.values()):
            first = sorted(open_, key=lambda i: (-shares[i], i))[:left]
            given = dict.fromkeys(first, 1)
        for i, tokens in given.items():
            counts[i] += tokens
            left -= tokens
    for i, cap in enumerate(caps):
        more = min(left, cap - counts[i])
        counts[i] += more
        left -= more
    return counts


def keep_highest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """(P, N) bool: of each partition the so many cells with the highest scores (spec 2.4, Eq. 2).

    All partitions at once; equal scores go by the lower number, and scores of -inf are never kept.

    Args:
        scores: (P, N).
        counts: P numbers of at most N.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    return (rank < torch.tensor(counts, device=scores.device)[:, None]) & (scores != -torch.inf)
