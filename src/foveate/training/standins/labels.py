"""What is true of the objects of rendered scenes, as rows of numbers: the targets of dense objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.training.standins.rendered import RenderedScenes
from foveate.world.scenes import Instance
from foveate.world.vocabulary import attribute_vocabulary, category_names, colour_names, relation_predicates


def background_row() -> np.ndarray:
    """The row of what is no object: category 0, everything else unknown."""
    return np.array([0, *[-1] * len(attribute_vocabulary()), -1, -1, -1])


def label_row(item: Instance, instances: Sequence[Instance]) -> np.ndarray:
    """The row of one of a scene's instances.

    Returns:
        integers: category + 1, then for each attribute 1 (holds), 0 (does not) or -1 (unknown), then predicate + 1
        (0: relates to nothing, -1: unknown), related category and related colour (-1: none).
    """
    attributes = {name: k for k, name in enumerate(attribute_vocabulary())}
    known = np.full(len(attributes), -1)
    known[[attributes[name] for name in item.negative_attributes]] = 0
    known[[attributes[name] for name in item.positive_attributes]] = 1
    relation = [0, -1, -1] if item.describable else [-1, -1, -1]
    if item.relations:
        other = instances[item.relations[0].object_index]
        predicate = relation_predicates().index(item.relations[0].predicate)
        related = category_names().index(other.category)
        relation = [predicate + 1, related, colour_names().index(other.attributes["colour"])]
    return np.array([category_names().index(item.category) + 1, *known, *relation])


def label_table(scenes: RenderedScenes) -> tuple[Tensor, np.ndarray]:
    """One row per object, after row 0 for the background; and the row before the first object of each scene."""
    rows, offsets = [background_row()], []
    for instances in scenes.instances:
        offsets.append(len(rows) - 1)
        rows += [label_row(item, instances) for item in instances]
    return torch.from_numpy(np.stack(rows)), np.array(offsets)


def attribute_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over what is known (0 or 1) of `wanted`, which is -1 elsewhere."""
    known = wanted >= 0
    each = F.binary_cross_entropy_with_logits(logits, wanted.clamp(min=0).float(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def asked_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of (N, classes), the mean over what is asked: where `wanted` (N,) is not -1; 0 if nothing is."""
    return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum") / (wanted >= 0).sum().clamp(min=1)
