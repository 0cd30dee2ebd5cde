"""Pictures as the vision stand-ins take them: CLIP's normalisation, by which both towers of a model can share one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixel_values(pictures: Sequence[np.ndarray]) -> Tensor:
    """(h, w, 3) uint8 pictures of one size -> (B, 3, h, w) float32."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def save_image_processor(folder: Path, size: int) -> None:
    """Writes the `preprocessor_config.json` that resizes to size x size pixels and normalises."""
    side = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size=side, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD))
    processor.save_pretrained(folder)
