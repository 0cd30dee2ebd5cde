"""Pure tensor functions that several methods share: boxes, RoIAlign, deformable sampling, the perceptual hash,
linear recurrences."""

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
from foveate.ops.scan import linear_scan, mingru_scan, scan_backend_in_use, use_scan_backend

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
    "linear_scan",
    "mingru_scan",
    "perceptual_hash",
    "roi_align",
    "scan_backend_in_use",
    "to_grey",
    "use_scan_backend",
    "validate_boxes",
]
