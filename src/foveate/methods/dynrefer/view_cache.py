"""The frozen tower's tokens of every view that training can draw, computed once.

The tower gets no gradient and views are not augmented, so each (region, t) has the same tokens in every epoch: with
eleven t's, a few epochs pay for all of them. Kept as float16 in one memory-mapped file that processes share.
"""

from __future__ import annotations

import hashlib
import logging
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.data.dataset import SampleDataset
from foveate.errors import RecipeError
from foveate.files import atomic_folder
from foveate.vision.images import load_image

from .configuration import CANDIDATE_VIEWS
from .modeling import DynReferModel
from .processing import DynReferProcessor
from .views import build_views

log = logging.getLogger(__name__)

COEFFICIENTS = (0.0, *CANDIDATE_VIEWS)
_CROPS_AT_ONCE = 256


class ViewCache:
    """Tokens and region boxes of the views of described regions.

    Attributes:
        tokens: (R, 11, 1 + g*g, C) float16, what `DynReferModel.encode_views` gives for t = 0, 0.1, ..., 1.
        region_boxes: (R, 11, 4) float32, the region in pixels of each view.
    """

    def __init__(self, folder: Path) -> None:
        self.tokens: np.ndarray = np.load(folder / "tokens.npy", mmap_mode="r")
        self.region_boxes: np.ndarray = np.load(folder / "region_boxes.npy")

    @classmethod
    def open(
        cls,
        folder: Path,
        dataset: SampleDataset,
        index: list[tuple[int, int]],
        model: DynReferModel,
        processor: DynReferProcessor,
    ) -> ViewCache:
        """The cache of these regions under this tower in `folder`, filled first if it is not there.

        Args:
            folder: holds one cache for each tower, view size and list of regions.
            index: (image, region) pairs of the dataset, sorted by image.
        """
        path = folder / _key(dataset, index, model)
        if not path.is_dir():
            size = len(index) * len(COEFFICIENTS) * (1 + model.config.grid_size**2) * 2
            size *= model.config.vision_config.hidden_size
            log.info("the tokens of %d views take %.1f GB in %s", len(index) * len(COEFFICIENTS), size / 1e9, path)
            with atomic_folder(path, overwrite=True) as partial:
                _fill(partial, dataset, index, model, processor)
        return cls(path)

    def views(self, row: int, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, 1 + g*g, C) and region boxes (n, 4) of one region's views.

        Raises:
            RecipeError: a t is none of the candidates.
        """
        columns = np.rint(coefficients * 10).astype(int)
        if not np.allclose(columns / 10, coefficients):
            raise RecipeError(f"cached views are those of t = 0, 0.1, ..., 1; data.views asks for {coefficients}")
        return self.tokens[row, columns], self.region_boxes[row, columns]


def _key(dataset: SampleDataset, index: list[tuple[int, int]], model: DynReferModel) -> str:
    digest = hashlib.sha256(f"{model.config.image_size} {model.config.vision_layer} {index}".encode())
    digest.update(f"{model.config.exact_box_rounding} {dataset.root.resolve()}".encode())
    manifest = dataset.root / "dataset.json"
    digest.update(manifest.read_bytes() if manifest.is_file() else b"")
    for name, value in model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fill(
    folder: Path,
    dataset: SampleDataset,
    index: list[tuple[int, int]],
    model: DynReferModel,
    processor: DynReferProcessor,
) -> None:
    config: Any = model.config
    count, tokens = len(COEFFICIENTS), 1 + config.grid_size**2
    shape = (len(index), count, tokens, config.vision_config.hidden_size)
    out = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.float16, shape=shape)
    boxes = np.zeros((len(index), count, 4), np.float32)
    device = next(model.parameters()).device
    waiting: list[tuple[int, np.ndarray, np.ndarray]] = []  # first row, crops, (R, 11) crop of each view
    said = start = time.monotonic()

    def encode() -> None:
        pixels = processor.pixel_values(np.concatenate([crops for _, crops, _ in waiting])).to(device)
        with torch.inference_mode():
            encoded = model.encode_views(pixels).half().cpu().numpy()
        first_crop = 0
        for first, crops, which in waiting:
            out[first : first + len(which)] = encoded[first_crop + which]
            first_crop += len(crops)
        waiting.clear()

    row = 0
    for image_index, pairs in groupby(index, key=lambda pair: pair[0]):
        regions = np.array([dataset[image_index].regions[number].box for _, number in pairs])
        image = load_image(dataset[image_index].path)
        batch = build_views(image, regions, np.array(COEFFICIENTS), config.image_size, exact=config.exact_box_rounding)
        boxes[row : row + len(regions)] = batch.region_boxes
        waiting.append((row, batch.crops, batch.view_index))
        row += len(regions)
        if sum(len(crops) for _, crops, _ in waiting) >= _CROPS_AT_ONCE:
            encode()
        if time.monotonic() - said > 20:
            said = time.monotonic()
            log.info("encoded the views of %d of %d regions, %.0f a second", row, len(index), row / (said - start))
    if waiting:
        encode()
    out.flush()
    np.save(folder / "region_boxes.npy", boxes)
