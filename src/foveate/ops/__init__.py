"""Pure tensor functions that several methods share: boxes, RoIAlign, deformable sampling, the perceptual hash."""

from foveate.ops.boxes import (
    batched_nms,
    box_area,
    box_convert,
    box_giou,
    box_iou,
    clip_boxes,
    validate_boxes,
)
from foveate.ops.deform import deform_conv2d, deform_sample
from foveate.ops.phash import dct_block, hamming, perceptual_hash, to_grey
from foveate.ops.roi_align import roi_align

__all__ = [
    "batched_nms",
    "box_area",
    "box_convert",
    "box_giou",
    "box_iou",
    "clip_boxes",
    "dct_block",
    "deform_conv2d",
    "deform_sample",
    "hamming",
    "perceptual_hash",
    "roi_align",
    "to_grey",
    "validate_boxes",
]
