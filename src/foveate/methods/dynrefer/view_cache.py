"""The frozen tower's tokens of the views that training draws, computed once.

The tower gets no gradient and views are not augmented, so a region's view at one t has the same tokens in every epoch.
They are kept as float16 in a memory-mapped file, filled as they are met, so that short runs wait for nothing and later
runs on the same data start with it. A killed run leaves a cache that is whole as far as it goes.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np

from foveate.data.dataset import SampleDataset
from foveate.errors import InputError, RecipeError
from foveate.files import atomic_folder

from .configuration import CANDIDATE_VIEWS
from .modeling import DynReferModel

COEFFICIENTS = (0.0, *CANDIDATE_VIEWS)


class ViewCache:
    """Tokens of the views of described regions.

    Attributes:
        tokens: (R, 11, 1 + g*g, C) float16, what `DynReferModel.encode_views` gives for t = 0, 0.1, ..., 1; zeros where
            nothing is known yet.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.tokens: np.ndarray = np.load(path, mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:  # the last two: not numpy's, or a part of its header
            raise InputError(
                f"the cache of views {path} cannot be used ({error}); delete its folder, and it is filled anew."
            ) from None

    @classmethod
    def open(
        cls, folder: Path, dataset: SampleDataset, index: list[tuple[int, int]], model: DynReferModel
    ) -> ViewCache:
        """The cache of these regions under this tower.

        Args:
            folder: holds one cache for each tower, view size and list of regions.
            index: (image, region) pairs of the dataset.

        Raises:
            InputError: the cache cannot be made or is damaged.
        """
        path = folder / _key(dataset, index, model)
        if not path.is_dir():
            config = model.config
            shape = (len(index), len(COEFFICIENTS), 1 + config.grid_size**2, config.vision_config.hidden_size)
            # A process beside this one may be making the same: whoever comes second opens the first one's.
            with suppress(InputError, OSError), atomic_folder(path) as partial:
                # A sparse file: the disk holds what has been written.
                np.lib.format.open_memmap(partial / "tokens.npy", mode="w+", dtype=np.float16, shape=shape)
        return cls(path / "tokens.npy")

    @staticmethod
    def columns(coefficients: np.ndarray) -> np.ndarray:
        """Which of the eleven views t's are.

        Raises:
            RecipeError: a t is none of the candidates.
        """
        columns = np.rint(coefficients * 10).astype(int)
        if not np.allclose(columns / 10, coefficients):
            raise RecipeError(f"cached views are those of t = 0, 0.1, ..., 1; data.views asks for {coefficients}")
        return columns

    def known(self, row: int, columns: np.ndarray) -> np.ndarray:
        """Which views (n,) of a region have tokens."""
        # Layer-normalised tokens are never all zero. The last one is looked at, as it is written last.
        return np.asarray(self.tokens[row, columns, -1].any(axis=1))


def _key(dataset: SampleDataset, index: list[tuple[int, int]], model: DynReferModel) -> str:
    config = model.config
    digest = hashlib.sha256(f"{config.image_size} {config.vision_layer} {dataset.root.resolve()}".encode())
    manifest = dataset.root / "dataset.json"
    digest.update(manifest.read_bytes() if manifest.is_file() else b"")
    for image, pairs in groupby(index, key=lambda pair: pair[0]):
        sample = dataset[image]
        digest.update(str(sample.path).encode())
        digest.update(np.array([sample.regions[number].box for _, number in pairs], np.float64).tobytes())
    for name, value in model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
