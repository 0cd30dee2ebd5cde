"""`describe` as it was first committed, to measure how much faster it has become since.

It was batched already, and shared equal views between regions and tasks. What has changed since is undone here:

- captions by transformers' `generate`, which carries every beam of every caption to the end of the longest one;
- the align module: its convolution in groups of two channels, its sampling by a small product a cell; RoI-Align map by
  map;
- a pass of the region encoder for each group of tasks, a pass of the contrast head for each task;
- crops cut one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from foveate.methods.dynrefer import modeling, predictor, views
from foveate.ops import deform
from foveate.ops.roi_align import roi_align


def _map_by_map(maps: torch.Tensor, boxes: torch.Tensor, **options: Any) -> torch.Tensor:
    return roi_align(maps, boxes, **options, batch_index=torch.arange(len(boxes)))


_ANSWER_HEADS = predictor.DynReferPredictor._answer_heads


def _task_by_task(describer: Any, query_output: torch.Tensor, tasks: tuple[str, ...], classes: Any) -> Any:
    """The contrast head for one task after the other; tags and caption have always shared their pass."""
    out, tag_lists = {}, [()] * len(query_output)
    contrast = [(task,) for task in tasks if task in ("attributes", "category")]
    rest = tuple(task for task in tasks if task in ("tags", "caption"))
    for part in [*contrast, rest] if rest else contrast:
        found, tag_lists = _ANSWER_HEADS(describer, query_output, part, classes)
        out |= found
    return out, tag_lists


@contextmanager
def first_version() -> Iterator[None]:
    """Within it every describer works as the first version did."""
    with ExitStack() as stack:
        for target, name, value in (
            (modeling, "roi_align", _map_by_map),
            (modeling.PairConv2d, "forward", torch.nn.Conv2d.forward),
            (deform, "_FEW_CELLS", 0),
            (predictor, "_FEW_REGIONS", 0),
            (predictor, "build_views", _one_thread),
            (predictor.DynReferPredictor, "_answer_heads", _task_by_task),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch("foveate.language.generation.can_search", lambda model: False))
        yield


def _one_thread(*arguments: Any, threads: int, **options: Any) -> Any:
    return views.build_views(*arguments, **options, threads=1)
