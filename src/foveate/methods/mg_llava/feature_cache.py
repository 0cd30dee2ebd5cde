"""What the frozen towers see of the pictures of a dataset, computed once and kept on disk.

The towers get no gradient in either stage and pictures are not augmented, so that a picture has the same features in
every epoch, stage and ablation. They are kept as float16 in files of `CHUNK` entries that appear whole: a run that was
killed goes on where it stopped, and a network with fewer parts reads what a larger one had written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foveate.errors import InputError, RecipeError
from foveate.files import atomic_write
from foveate.vision.images import load_image
from foveate.vision.video import load_video

from .modeling import MGLlavaModel, TowerFeatures
from .processing import MGLlavaProcessor, Picture, stack_pictures

log = logging.getLogger(__name__)

CHUNK = 128
"""Entries of one file."""
_BATCH = 16
"""Pictures that the towers see at once."""


@dataclass(frozen=True)
class Entry:
    """A picture or a video of the dataset with its boxes.

    Attributes:
        path: of the file.
        video: whether it is one; it then has `num_frames` pictures.
        records: boxes of each picture as `BoxRecord.parse` takes them; of no entries where there are no boxes.
    """

    path: Path
    video: bool
    records: tuple[Any, ...]


class FeatureCache:
    """Features of a dataset's entries, by their number.

    Args:
        folder: holds the features of any number of datasets and towers.
        entries: what there is to see.
        model, processor: with which features are made, as far as they are not there yet.

    Raises:
        InputError: a picture cannot be read, or the folder cannot be used.
        RecipeError: the model's features are not the same each time, or too large for float16.
    """

    def __init__(
        self, folder: Path, entries: Sequence[Entry], model: MGLlavaModel, processor: MGLlavaProcessor
    ) -> None:
        if model.config.legacy_tower_train_mode:
            raise RecipeError(
                "data.cache_features keeps what the towers see, which legacy_tower_train_mode changes at every step; "
                "turn one of them off"
            )
        self.entries = list(entries)
        self.processor = processor
        self.frames = [processor.config.num_frames if entry.video else 1 for entry in self.entries]
        keys = _keys(self.entries, model, processor)
        self.folders = {kind: folder / f"{kind}-{key}" for kind, key in keys.items()}
        self._files: dict[Path, Any] = {}
        self._fill(model)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a process that loads data opens the files by itself

    def read(self, number: int, text_length: int = 0) -> TowerFeatures:
        """Features of an entry's pictures, with as many objects as a text of this length leaves room for (spec 2.4).

        Raises:
            InputError: a file of the cache is missing or damaged.
        """
        start = number // CHUNK * CHUNK
        first = sum(self.frames[start:number])
        pictures = slice(first, first + self.frames[number])
        tensors: dict[str, Tensor] = {"counts": torch.zeros(0, dtype=torch.long)}
        for kind, folder in self.folders.items():
            path = folder / f"{start:09d}.safetensors"
            try:
                if path not in self._files:
                    self._files[path] = safe_open(path, framework="pt")
                file = self._files[path]
                if kind == "objects":
                    tensors |= self._objects(file, pictures, number, text_length)
                else:
                    tensors |= {name: file.get_slice(name)[pictures] for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, KeyError) as error:
                raise InputError(
                    f"the cached features {path} cannot be used ({error}); delete that file, and it is made anew."
                ) from None
        return TowerFeatures.of(tensors)

    def _objects(self, file: Any, pictures: slice, number: int, text_length: int) -> dict[str, Tensor]:
        counts = file.get_tensor("counts")
        rows = slice(int(counts[: pictures.start].sum()), int(counts[: pictures.stop].sum()))
        levels = {name: file.get_slice(name)[rows] for name in file.keys() if name.startswith("levels.")}  # noqa: SIM118
        entry = self.entries[number]
        if not entry.video and entry.records:
            size = tuple(file.get_slice("sizes")[pictures][0].tolist())
            left = self.processor.prepare_boxes(entry.records[0], size, text_length=text_length).sources
            known = file.get_slice("sources")[rows].tolist()
            if left and list(left) != known:
                kept = [known.index(source) for source in left]
                return {name: level[kept] for name, level in levels.items()} | {"counts": torch.tensor([len(kept)])}
        return levels | {"counts": counts[pictures]}

    # ---------------------------------------------------------------- making them

    def _fill(self, model: MGLlavaModel) -> None:
        starts = range(0, len(self.entries), CHUNK)
        missing = {start: kinds for start in starts if (kinds := self._missing(start))}
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            # Of the processes of one machine the first makes them; should that fail, its launcher ends the others.
            while any(self._missing(start) for start in missing):
                time.sleep(0.2)
            return
        if not missing:
            return
        total = sum(self.frames[index] for start in missing for index in self._chunk(start))
        log.info("the towers look at %d pictures once; what they see is kept under %s", total, self._parent())
        where = model.device
        if where.type == "cpu" and torch.cuda.is_available():
            model.to("cuda")
        done, said = 0, time.monotonic()
        for start, kinds in missing.items():
            chunk = self._look(model, start)
            for kind in kinds:
                with atomic_write(self.folders[kind] / f"{start:09d}.safetensors", "wb") as file:
                    file.write(save(chunk[kind]))
            done += sum(self.frames[index] for index in self._chunk(start))
            if time.monotonic() - said > 15:
                log.info("%d of %d pictures", done, total)
                said = time.monotonic()
        model.to(where)

    def _parent(self) -> Path:
        return next(iter(self.folders.values())).parent

    def _chunk(self, start: int) -> range:
        return range(start, min(start + CHUNK, len(self.entries)))

    def _missing(self, start: int) -> list[str]:
        return [kind for kind, folder in self.folders.items() if not (folder / f"{start:09d}.safetensors").is_file()]

    @torch.no_grad()
    def _look(self, model: MGLlavaModel, start: int) -> dict[str, dict[str, Tensor]]:
        """Features of the entries of one file, by kind and name."""
        pictures: list[Picture] = []
        sizes: list[tuple[int, int]] = []
        seen: list[TowerFeatures] = []
        sources: list[int] = []

        def flush() -> None:
            batch = {name: value.to(model.device) for name, value in stack_pictures(pictures).items()}
            high = batch["pixel_values_aux"] if model.config.sees_high_res else None
            found = model.look(batch["pixel_values"], high, [picture.boxes for picture in pictures])
            seen.append(TowerFeatures.of({name: value.cpu() for name, value in found.tensors().items()}))
            for picture in pictures:
                sources.extend(picture.box_sources or [-1] * len(picture.boxes))
            pictures.clear()

        for index in self._chunk(start):
            for picture, size in self._pictures(self.entries[index]):
                pictures.append(picture)
                sizes.append(size)
                if len(pictures) == _BATCH:
                    flush()
        if pictures:
            flush()
        whole = TowerFeatures.join(seen)
        named = {name: _halved(value, name) for name, value in whole.tensors().items()}
        chunk = {
            "low": {"low": named["low"]},
            "maps": {name: value for name, value in named.items() if name.startswith("maps.")},
            "objects": {name: value for name, value in named.items() if name.startswith(("levels.", "counts"))},
        }
        chunk["objects"] |= {"sources": torch.tensor(sources), "sizes": torch.tensor(sizes)}
        return chunk

    def _pictures(self, entry: Entry) -> list[tuple[Picture, tuple[int, int]]]:
        if not entry.video:
            image = load_image(entry.path)
            return [(self.processor.picture(image, entry.records[0] if entry.records else None), image.size)]
        frames = load_video(entry.path, self.processor.config.num_frames).frames
        pictures = self.processor.video(frames, list(entry.records) or None)
        return [(picture, (0, 0)) for picture in pictures]  # no text is too long for a video's boxes


def _halved(value: Tensor, name: str) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.half().contiguous()
    if not torch.isfinite(half).all():
        raise RecipeError(
            f"the towers' features ({name}) go up to {value.abs().max():.3g}, beyond what float16 holds; turn "
            "data.cache_features off"
        )
    return half


def _keys(entries: Sequence[Entry], model: MGLlavaModel, processor: MGLlavaProcessor) -> dict[str, str]:
    """A name for each kind of features that the model uses, of all that they depend on."""
    config = model.config
    files = hashlib.sha256()
    for entry in entries:
        try:
            state = entry.path.stat()
            changed: Any = (state.st_size, state.st_mtime_ns)
        except OSError:
            changed = None  # is missed when it is read
        files.update(repr((str(entry.path.resolve()), entry.video, changed)).encode())
    shown = [config.low_res_size, config.high_res_size, config.pad_to_square, config.num_frames]
    shown += [processor.image_mean, processor.image_std]

    def key(tower: Any, *settings: Any) -> str:
        digest = files.copy()
        digest.update(repr([*shown, *settings]).encode())
        for name, value in tower.state_dict().items():
            digest.update(f"{name} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    keys = {"low": key(model.vision_tower, config.vision_layer)}
    if config.fusion != "none":
        every_map = config.fusion == "patch_info_mining" and config.patch_info_stages == "all"
        keys["maps"] = key(model.high_res_tower, every_map)
    if config.objects != "none":
        limits = [config.box_iou, config.box_limit, config.box_limit_mode, config.hard_cap, config.box_canvas]
        given = json.dumps([entry.records for entry in entries])
        keys["objects"] = key(model.high_res_tower, limits, config.object_levels, config.object_bins, given)
    return keys
