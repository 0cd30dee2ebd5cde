"""`foveate.load("dynrefer-...")`: images and regions in, descriptions out (spec 4).

Views that regions share are cropped and encoded once, regions of many images run together, and each task looks through
the views that suit it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.checkpoints import warn_of_the_world
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import check_tokenizer
from foveate.language.pretrained import first_line
from foveate.language.words import check_words
from foveate.ops.boxes import validate_boxes
from foveate.vision.box_file import BoxFile
from foveate.vision.images import decode_rle, load_image
from foveate.vision.proposals import (
    FoundRegions,
    Proposer,
    check_fraction,
    drop_repeated_captions,
    find_regions,
    load_proposer,
)

from .attention import Attention, tap_qformer
from .captioners import EncoderDecoder
from .configuration import CANDIDATE_VIEWS, DynReferConfig, find_dynrefer, is_whole, tag_thresholds
from .int8 import check_quantize, quantize_linears
from .modeling import DynReferModel, group_maximum
from .processing import CLASS_TEMPLATE, PROCESSOR_FILE, DynReferProcessor, control_text
from .results import Region, Regions, Report, View, ViewChoice
from .views import ViewBatch, ViewSearch, build_views, pixel_boxes, region_from_mask, resolve_policy, search_views

TASKS = ("caption", "tags", "attributes", "category")
MAX_REGIONS_PER_IMAGE = 100_000
_ALIASES = {
    "captions": "caption",
    "tag": "tags",
    "attribute": "attributes",
    "categories": "category",
    "class": "category",
}

_TEXTS_AT_ONCE = 512
"""Of a tag list that the text encoder reads; thousands at once would need gigabytes."""
_FEW_REGIONS = 32
"""Up to so many go through the region encoder for all groups of tasks at once; more fill it by themselves, and would
only take more memory."""

STAGES = ("proposals", "search", "crops", "tower", "fusion", "heads", "captions")


@dataclass
class _Job:
    """Regions of one image with the t's of each task group."""

    image: Image.Image
    boxes: np.ndarray  # (R, 4)
    found: FoundRegions | None  # where the regions were proposed
    coefficients: list[np.ndarray] = field(default_factory=list)  # per group (R, n)
    searches: list[ViewSearch | None] = field(default_factory=list)  # per group; None where the t's are fixed


class _Meter:
    """Counts and times the work of one call."""

    def __init__(self, device: torch.device) -> None:
        self.crops = self.hashes = 0
        self.milliseconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":  # which works behind the program
            torch.cuda.synchronize(self._device)
        self.milliseconds[name] += 1000 * (time.perf_counter() - started)

    def report(self, jobs: Sequence[_Job], views: int) -> Report:
        """What the call cost so far, for so many `views` of each task group."""
        least = 0
        for job in jobs:
            own = {tuple(box) for box in pixel_boxes(job.boxes, *job.image.size).tolist()}
            least += len(own | {(0, 0, *job.image.size)} if own and views > 1 else own)
        total = 1000 * (time.perf_counter() - self._started)
        stages = {**self.milliseconds, "other": total - sum(self.milliseconds.values())}
        return Report(
            images=len(jobs),
            regions=sum(len(job.boxes) for job in jobs),
            views=sum(len(job.boxes) * len(job.coefficients) * views for job in jobs),
            crops=self.crops,
            least_crops=least,
            hashes=self.hashes,
            milliseconds=stages,
        )


class DynReferPredictor:
    """Describes regions. Thread-safe to call; nothing is changed by a call but a cache of text embeddings.

    Args:
        model: in eval mode, on its device.
        processor: saved beside it.
        proposer: for `everything=True`: what `foveate.vision.proposals.load_proposer` takes or gives, or any function
            of a PIL image that gives (R, 4) xyxy boxes and (R,) scores; by default what the configuration names.
    """

    def __init__(
        self,
        model: DynReferModel,
        processor: DynReferProcessor,
        *,
        proposer: str | Path | Proposer | BoxFile | None = None,
        name: str = "",
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self._proposer = proposer
        self.name = name
        self._loaded: dict[tuple[str, tuple[str, ...]], Proposer | BoxFile] = {}
        self._embeds: dict[tuple[str, ...], Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        proposer: str | Path | Proposer | BoxFile | None = None,
    ) -> DynReferPredictor:
        """Load a folder written by training or conversion.

        Args:
            device: default CUDA if there is one, else CPU.
            dtype: default bfloat16 on a GPU that computes in it, else float32. float16 is for decoder-only captioners.
            quantize: "int8" for linear layers in int8 on a CPU, which is faster where they are wide, takes a quarter of
                the memory, and changes the answers a little.
            proposer: as the class takes it; a name is loaded when it is first needed.

        Raises:
            InputError: there is no such model, it is of another kind, the dtype is float16 and its captioner a T5, or
                int8 cannot run here.
            CheckpointError: a file of it is damaged or does not fit the others; the sentence names the file.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or default_dtype(device)
        if quantize is not None:
            check_quantize(quantize, device)
        folder = find_dynrefer(folder)
        if dtype == torch.float16 and DynReferConfig.from_pretrained(folder).captioner is EncoderDecoder:
            raise InputError("DynRefer's T5 overflows in float16 and gives broken captions; use bfloat16 or float32")
        try:
            model = DynReferModel.from_pretrained(folder, dtype=dtype).to(device)
        except CheckpointError:
            raise
        except Exception as error:  # safetensors and transformers raise many types on a damaged file
            raise CheckpointError(f"cannot load the DynRefer checkpoint {str(folder)!r}: {error}") from error
        if quantize is not None:
            quantize_linears(model)
        config = model.config
        processor = DynReferProcessor.from_pretrained(folder, base_models=config.base_models)
        for part, tokenizer, entries in (
            ("text", processor.text_tokenizer, config.text_config.vocab_size),
            ("language", processor.language_tokenizer, config.language_config.vocab_size),
        ):
            check_tokenizer(tokenizer, entries, f"the {part} tokenizer of {folder}")
        if processor.captioner is not config.captioner:
            raise CheckpointError(
                f"{folder / PROCESSOR_FILE} has decoder_only {str(processor.decoder_only).lower()}, but the language "
                f"model of config.json is a {config.language_config.model_type!r}; copy both again."
            )
        warn_of_the_world(folder, "convert the official DynRefer weights or train on photographs by a recipe")
        return cls(model, processor, proposer=proposer, name=folder.name)

    # ---------------------------------------------------------------- public call

    def __call__(
        self,
        images: Any,
        boxes: Any = None,
        masks: Any = None,
        *,
        tasks: Sequence[str] = TASKS,
        views: Any = None,
        classes: Sequence[str] | None = None,
        controls: Sequence[str] = (),
        num_beams: int | None = None,
        batch_size: int = 64,
        attention: bool = False,
        everything: bool = False,
        proposer: str | Path | Proposer | BoxFile | None = None,
        proposer_words: Sequence[str] | None = None,
        max_regions: int | None = None,
        min_score: float = 0.0,
        box_iou: float | None = 0.7,
        caption_iou: float | None = 0.3,
        progress: Callable[[int, int], None] | None = None,
    ) -> Regions | list[Regions]:
        """Describe regions of one image or of many.

        Args:
            images: a path, bytes, PIL image or uint8 array, or a list of them.
            boxes: xyxy pixels, (R, 4) for one image, a list of such for many. Neither boxes nor masks: the whole image.
            masks: bool H x W masks, or COCO RLE, in the same nesting as boxes; each adds a region.
            tasks: of "caption", "tags", "attributes", "category".
            views: None or "task" for the model's views per task; "auto" (or "official"), "pairwise" or "median" for a
                search of each region; a list of t's; or a mapping of tasks to any of these.
            classes: category names to choose from; default the model's own.
            controls: words that the caption should use.
            num_beams: beam width of the captioner; 1 is greedy.
            batch_size: regions that run together.
            attention: whether regions say where the model read (`Region.attention`, `Regions.plot_attention`); all
                else that they say stays the same.
            everything: propose the regions; the surest proposal is described first.
            proposer: another proposer than that of the predictor, in the forms that the class takes.
            proposer_words: what an OWLv2 proposer that is given by its name looks for.
            max_regions: so many of the surest proposals are described.
            min_score: proposals below it are left out.
            box_iou: of two proposals that overlap by a larger IoU, the one of higher score is described; None for both.
            caption_iou: of two regions with the same caption whose boxes overlap by a larger IoU, the one of higher
                proposal score stays; None for both.
            progress: called with (regions done, regions in all).
        Returns:
            `Regions` for one image, a list of them for a list; `report` of any of them is what the call cost.
        Raises:
            InputError: an image, box, mask or option is wrong; the sentence says which.
            CheckpointError: the model gives non-finite numbers.
        """
        meter = _Meter(self.model.device)
        single = not isinstance(images, list | tuple)
        sources = [images] if single else list(images)
        tasks = self._check_tasks(tasks)
        if not is_whole(batch_size) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        if num_beams is not None and (not is_whole(num_beams) or not 1 <= num_beams <= 64):
            raise InputError(f"num_beams must be a whole number from 1 to 64, not {num_beams!r}")
        class_names = self._check_classes(classes)
        vocabulary = self.processor.vocabulary
        lists = {"tags": vocabulary.tags, "attributes": vocabulary.attributes, "category": class_names}
        for task, words in lists.items():
            if task in tasks and not words:
                hint = "give classes" if task == "category" else f"leave {task!r} out of tasks"
                raise InputError(f"this model brings no list of words for {task!r}; {hint}")
        controls = check_words(controls, "controls")
        # What a tokenizer cuts off would be left out without a word.
        if controls:
            text = {"the controls": control_text(tuple(dict.fromkeys(controls)))}
            _check_lengths(self.processor.control_lengths, self.processor.max_text_tokens, text)
        if classes is not None:
            prompts = {f"the class {name!r}": CLASS_TEMPLATE.format(name.lower()) for name in class_names}
            _check_lengths(self.processor.text_lengths, self.processor.max_prompt_tokens, prompts)
        groups = self._group_tasks(tasks, views)
        nested = [
            self._pick(value, index, len(sources), single, name)
            for name, value in (("boxes", boxes), ("masks", masks))
            for index in range(len(sources))
        ]
        chosen = {"proposer": proposer, "proposer_words": proposer_words, "max_regions": max_regions}
        if not everything and any(value is not None for value in chosen.values()):
            given = next(name for name, value in chosen.items() if value is not None)
            raise InputError(f"{given} belongs to everything=True, which finds the regions; give both or neither")
        check_fraction(caption_iou, "caption_iou", optional=True)
        if everything and any(value is not None for value in nested):
            raise InputError("everything=True finds the regions by itself; leave out boxes and masks")
        proposers = self._proposers(proposer, proposer_words, sources) if everything else [None] * len(sources)
        limits = {"max_regions": max_regions, "min_score": min_score, "box_iou": box_iou}
        jobs = []
        for index, source in enumerate(sources):
            image = load_image(source)
            propose, found = proposers[index], None
            if propose is None:
                job_boxes = self._regions_of(image, nested[index], nested[len(sources) + index])
            else:
                with meter.stage("proposals"):
                    found = find_regions(propose, image, **limits)
                job_boxes = found.boxes
            jobs.append(_Job(image, job_boxes, found))
        with meter.stage("search"):
            self._choose_views(jobs, groups, meter)
        total = sum(len(job.boxes) for job in jobs)
        described: list[list[Region]] = [[] for _ in jobs]
        done = 0
        with torch.inference_mode():
            for chunk in self._chunks(jobs, batch_size):
                asked = (class_names, controls, num_beams, bool(attention))
                for job_index, region in self._describe(jobs, chunk, groups, *asked, meter):
                    described[job_index].append(region)
                    done += 1
                if progress is not None:
                    progress(done, total)
        report = meter.report(jobs, self.model.config.num_views)
        results = [
            Regions(job.image, _as_found(job, regions, caption_iou), report)
            for job, regions in zip(jobs, described, strict=True)
        ]
        return results[0] if single else results

    def propose(
        self,
        image: Any,
        *,
        proposer: str | Path | Proposer | BoxFile | None = None,
        proposer_words: Sequence[str] | None = None,
        max_regions: int | None = None,
        min_score: float = 0.0,
        box_iou: float | None = 0.7,
    ) -> FoundRegions:
        """The regions that a call with `everything=True` describes, the surest first.

        Args:
            image: a path, bytes, PIL image or uint8 array.
            proposer, proposer_words, max_regions, min_score, box_iou: as a call takes them.

        Raises:
            InputError: the image or an option is wrong, or there is no proposer.
            CheckpointError: the proposer gives non-finite numbers.
        """
        propose = self._proposers(proposer, proposer_words, [image])[0]
        limits = {"max_regions": max_regions, "min_score": min_score, "box_iou": box_iou}
        return find_regions(propose, load_image(image), **limits)

    # ---------------------------------------------------------------- arguments

    def _check_tasks(self, tasks: Any) -> tuple[str, ...]:
        if isinstance(tasks, str):
            tasks = (tasks,)
        named = [_ALIASES.get(task, task) for task in check_words(tasks, "tasks")]
        for task in named:
            if task not in TASKS:
                import difflib

                near = difflib.get_close_matches(str(task), TASKS, n=1)
                raise InputError(
                    f"unknown task {task!r}" + (f", did you mean {near[0]!r}?" if near else f"; use {', '.join(TASKS)}")
                )
        if not named:
            raise InputError(f"no task given; use one or more of {', '.join(TASKS)}")
        return tuple(task for task in TASKS if task in named)

    def _check_classes(self, classes: Any) -> tuple[str, ...]:
        names = self.processor.vocabulary.classes if classes is None else check_words(classes, "classes")
        if classes is not None and not names:
            raise InputError("the class list is empty; give at least one class name, or leave it out")
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise InputError(f"the class list has {twice!r} twice; name every class once")
        return tuple(names)

    def _group_tasks(self, tasks: Sequence[str], views: Any) -> list[tuple[np.ndarray | str, tuple[str, ...]]]:
        """Tasks that look through the same views, together."""
        config = self.model.config
        groups: dict[Any, tuple[Any, list[str]]] = {}
        for task in tasks:
            policy = resolve_policy(views, task, config.num_views, config.view_policy)
            key = policy if isinstance(policy, str) else tuple(policy)
            groups.setdefault(key, (policy, []))[1].append(task)
        return [(policy, tuple(members)) for policy, members in groups.values()]

    @staticmethod
    def _pick(value: Any, index: int, count: int, single: bool, name: str) -> Any:
        if value is None or single:
            return value
        if not isinstance(value, list | tuple) or len(value) != count:
            given = len(value) if isinstance(value, list | tuple) else type(value).__name__
            raise InputError(f"{count} images need {count} lists of {name}, one per image, not {given}")
        return value[index]

    def _proposers(
        self, chosen: str | Path | Proposer | BoxFile | None, words: Sequence[str] | None, sources: list[Any]
    ) -> list[Proposer]:
        """A proposer for each image; one that is named is loaded when it is first needed."""
        if chosen is None:
            chosen = self._proposer if self._proposer is not None else self.model.config.proposer
        if chosen is None:
            raise InputError("this model has no region proposer; give one, or boxes or masks")
        if isinstance(chosen, str | Path):
            key = (str(chosen), check_words(words or (), "proposer_words"))
            with self._lock:
                if key not in self._loaded:
                    self._loaded[key] = load_proposer(chosen, words=key[1], device=self.model.device)
                chosen = self._loaded[key]
        elif words is not None:
            raise InputError("proposer_words are for a proposer that is given by its name; this one is loaded already")
        if isinstance(chosen, BoxFile):
            return [*chosen.proposers(sources)]
        if not callable(chosen):
            raise InputError(f"proposer must be a name or a function of an image, not a {type(chosen).__name__}")
        return [chosen] * len(sources)

    def _regions_of(self, image: Image.Image, boxes: Any, masks: Any) -> np.ndarray:
        """Boxes (R, 4) of one image, from boxes, masks, or the whole image."""
        width, height = image.size
        if boxes is None and masks is None:
            return np.array([[0, 0, width, height]], dtype=np.float32)
        parts = []
        if boxes is not None:
            parts.append(self._checked_boxes(boxes, width, height))
        if masks is not None:
            parts.append(self._mask_boxes(masks, width, height))
        regions = np.concatenate(parts)
        if len(regions) > MAX_REGIONS_PER_IMAGE:
            raise InputError(
                f"{len(regions)} regions of one image are more than the {MAX_REGIONS_PER_IMAGE} allowed; split them"
            )
        return regions

    @staticmethod
    def _checked_boxes(boxes: Any, width: int, height: int) -> np.ndarray:
        try:
            plain = boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes
            return validate_boxes(plain, image_size=(height, width)).numpy().astype(np.float32)
        except (RuntimeError, TypeError) as error:  # sparse, nested, without values: torch has many kinds of tensors
            reason = first_line(error).rstrip(".")
            raise InputError(f"boxes cannot be read ({reason}); give numbers, an array or a dense tensor") from None

    @staticmethod
    def _mask_boxes(masks: Any, width: int, height: int) -> np.ndarray:
        if isinstance(masks, Tensor | np.ndarray):
            masks = _mask_pixels(masks)
        if isinstance(masks, dict) or (isinstance(masks, np.ndarray) and masks.ndim == 2):
            masks = [masks]
        if not isinstance(masks, np.ndarray | list | tuple):
            raise InputError(f"masks must be a list of H x W arrays or COCO RLEs, not {type(masks).__name__}")
        boxes = []
        for mask in masks:
            pixels = decode_rle(mask, size=(height, width)) if isinstance(mask, dict) else _mask_pixels(mask)
            if pixels.shape != (height, width):
                raise InputError(
                    f"a mask has shape {pixels.shape}, but the image is {height} x {width}; they must agree"
                )
            if pixels.dtype.kind not in "bui":
                raise InputError(f"a mask must be of bools or whole numbers, not {pixels.dtype}; give mask > threshold")
            # Half-open like every box of ours; the official code drops the last row and column (spec 2.1).
            boxes.append(region_from_mask(pixels) + np.array([0, 0, 1, 1]))
        return np.array(boxes, dtype=np.float32).reshape(-1, 4)

    def _choose_views(
        self, jobs: Sequence[_Job], groups: Sequence[tuple[np.ndarray | str, tuple[str, ...]]], meter: _Meter
    ) -> None:
        """The t's of every region for each task group; searches run over all images together."""
        count = min(self.model.config.num_views - 1, len(CANDIDATE_VIEWS))
        images, boxes = [job.image for job in jobs], [job.boxes for job in jobs]
        for policy, _ in groups:
            if isinstance(policy, str):
                meter.hashes += (1 + len(CANDIDATE_VIEWS)) * sum(map(len, boxes))
                for job, search in zip(jobs, search_views(images, boxes, count, selection=policy), strict=True):
                    job.coefficients.append(search.coefficients)
                    job.searches.append(search)
            else:
                for job in jobs:
                    job.coefficients.append(np.broadcast_to(policy, (len(job.boxes), len(policy))))
                    job.searches.append(None)

    # ---------------------------------------------------------------- the work

    @staticmethod
    def _chunks(jobs: list[_Job], batch_size: int) -> Iterator[list[tuple[int, slice]]]:
        """Runs of at most `batch_size` regions, crossing images: (job, slice of its regions)."""
        chunk: list[tuple[int, slice]] = []
        room = batch_size
        for index, job in enumerate(jobs):
            start = 0
            while start < len(job.boxes):
                stop = min(len(job.boxes), start + room)
                chunk.append((index, slice(start, stop)))
                room -= stop - start
                start = stop
                if room == 0:
                    yield chunk
                    chunk, room = [], batch_size
        if chunk:
            yield chunk

    def _describe(
        self,
        jobs: list[_Job],
        chunk: list[tuple[int, slice]],
        groups: list[tuple[np.ndarray | str, tuple[str, ...]]],
        classes: tuple[str, ...],
        controls: tuple[str, ...],
        num_beams: int | None,
        attention: bool,
        meter: _Meter,
    ) -> Iterator[tuple[int, Region]]:
        config = self.model.config
        with meter.stage("crops"):
            batches = [
                build_views(
                    jobs[index].image,
                    jobs[index].boxes[rows],
                    np.concatenate([t[rows] for t in jobs[index].coefficients], axis=1),
                    config.image_size,
                    exact=config.exact_box_rounding,
                    threads=torch.get_num_threads(),  # who limits torch limits these
                )
                for index, rows in chunk
            ]
        crops = np.concatenate([batch.crops for batch in batches])
        meter.crops += len(crops)
        with meter.stage("tower"):
            tokens = self._encode(crops)
        offsets = np.cumsum([0, *(len(batch.crops) for batch in batches[:-1])])
        view_index = np.concatenate([batch.view_index + offset for batch, offset in zip(batches, offsets, strict=True)])
        region_boxes = np.concatenate([batch.region_boxes for batch in batches])
        with meter.stage("fusion"):
            query_outputs, readings = self._region_tokens(tokens, view_index, region_boxes, attention)
        answers: dict[str, list[dict[str, Any]]] = {}
        for query_output, (_, members) in zip(query_outputs, groups, strict=True):
            answers |= self._answer(query_output, members, classes, controls, num_beams, meter)
        read = [
            self._read(query_outputs[group], reading, groups[group][1], classes, answers)
            for group, reading in enumerate(readings)
        ]
        rows_in_chunk = 0
        for (job_index, rows), batch in zip(chunk, batches, strict=True):
            job = jobs[job_index]
            for local, row in enumerate(range(rows.start, rows.stop)):
                fields: dict[str, Any] = {}
                for answer in answers.values():
                    fields |= answer[rows_in_chunk + local]
                score = None if job.found is None else float(job.found.scores[row])
                region = Region(
                    box=tuple(float(value) for value in job.boxes[row]),  # pyright: ignore[reportArgumentType]
                    score=score,
                    views=self._views(job.image, batch, local, groups),
                    choices=self._choices(job, row, groups),
                    attention=self._attention(batch, local, rows_in_chunk + local, groups, read),
                )
                yield job_index, replace(region, **fields)
            rows_in_chunk += rows.stop - rows.start

    def _region_tokens(
        self, tokens: Tensor, view_index: np.ndarray, region_boxes: np.ndarray, attention: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Region tokens (R, Q, H) of each task group; few regions go through the encoder for all groups at once.

        With `attention` also what the Q-Former's queries attended to, (R, Q, 1 + g*g) of each group.

        Args:
            tokens: (U, 1 + g*g, C) of the distinct views.
            view_index, region_boxes: (R, groups * n) rows of `tokens`, (R, groups * n, 4), groups side by side.
        """
        n = self.model.config.num_views
        regions, columns = view_index.shape
        groups = columns // n
        index = torch.from_numpy(view_index).to(tokens.device).view(regions, groups, n).transpose(0, 1).flatten(0, 1)
        boxes = torch.from_numpy(region_boxes).to(tokens.device)
        boxes = boxes.view(regions, groups, n, 4).transpose(0, 1).flatten(0, 1)
        together = len(index) if len(index) <= _FEW_REGIONS else regions
        pieces, read = [], []
        with tap_qformer(self.model.qformer) if attention else nullcontext() as tapped:
            for own, own_boxes in zip(index.split(together), boxes.split(together), strict=True):
                pieces.append(self.model.encode_regions(tokens[own.flatten()], own_boxes))
                if tapped is not None:
                    read.append(tapped.take())
        query_output = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if not torch.isfinite(query_output).all():
            raise CheckpointError(
                f"the region tokens are not finite in {query_output.dtype} on {query_output.device}; load with "
                "dtype=torch.float32 and check that the checkpoint is intact"
            )
        return list(query_output.split(regions)), list(torch.cat(read).split(regions)) if read else []

    def _read(
        self,
        query_output: Tensor,
        reading: Tensor,
        tasks: tuple[str, ...],
        classes: tuple[str, ...],
        answers: dict[str, list[dict[str, Any]]],
    ) -> list[tuple[str, list[str | None], np.ndarray]]:
        """What a group's queries attended to: (query, its word of each region, (R, 1 + g*g) shares), see `attention`.

        Args:
            reading: (R, Q, 1 + g*g).
            answers: of the heads.
        """
        found: list[tuple[str, list[str | None], np.ndarray]] = [
            ("region", [None] * len(reading), reading.mean(dim=1).cpu().numpy())
        ]
        # The best word of each region, the list that it is of, and its query's way through its head.
        asked: list[tuple[str, list[str], Tensor, tuple[str, ...], Callable[[Tensor, Tensor], Tensor]]] = []
        if "category" in tasks:
            prompts = tuple(CLASS_TEMPLATE.format(name.lower()) for name in classes)
            best = [fields["category"] for fields in answers["category"]]
            asked.append(("category", best, self._text_embeds(prompts), classes, self.model.text_attention))
        if "tags" in tasks:
            names = self.processor.vocabulary.tags
            best = [
                fields["tags"][0] if fields["tags"] else max(fields["tag_scores"], key=fields["tag_scores"].__getitem__)
                for fields in answers["tags"]
            ]
            asked.append(("tag", best, self._text_embeds(names), names, self.model.tag_attention))
        for query, best, embeds, names, attend in asked:
            places = {name: place for place, name in enumerate(names)}
            weights = attend(query_output, embeds[[places[word] for word in best]])
            shares = torch.einsum("rq,rqk->rk", weights, reading)
            found.append((query, [*best], shares.cpu().numpy()))
        return found

    def _attention(
        self,
        batch: ViewBatch,
        local: int,
        row: int,
        groups: Sequence[tuple[Any, tuple[str, ...]]],
        read: Sequence[list[tuple[str, list[str | None], np.ndarray]]],
    ) -> tuple[Attention, ...]:
        """Of the region in row `local` of the batch and `row` of what `_read` gave for each group."""
        config = self.model.config
        n, side = config.num_views, config.grid_size
        found = []
        for group, queries in enumerate(read):
            columns = slice(group * n, (group + 1) * n)
            boxes = batch.crop_boxes[batch.view_index[local, columns]].tolist()
            in_patches = batch.region_boxes[local, columns] * np.float32(1 / config.vision_config.patch_size)
            for query, words, shares in queries:
                found.append(
                    Attention(
                        tasks=groups[group][1],
                        query=query,
                        word=words[row],
                        cells=shares[row, 1:].reshape(side, side).copy(),  # lest a region keeps the shares of all
                        whole=float(shares[row, 0]),
                        coefficients=tuple(batch.coefficients[local, columns].tolist()),
                        boxes=tuple(map(tuple, boxes)),
                        _in_patches=in_patches,
                    )
                )
        return tuple(found)

    def _views(
        self, image: Image.Image, batch: Any, row: int, groups: Sequence[tuple[Any, tuple[str, ...]]]
    ) -> tuple[View, ...]:
        n = self.model.config.num_views
        seen: dict[tuple[float, tuple[int, ...]], list[str]] = {}
        for number, (_, members) in enumerate(groups):
            for column in range(number * n, (number + 1) * n):
                box = tuple(int(v) for v in batch.crop_boxes[batch.view_index[row, column]])
                served = seen.setdefault((float(batch.coefficients[row, column]), box), [])
                served.extend(task for task in members if task not in served)
        return tuple(View(t, box, tuple(tasks), image) for (t, box), tasks in sorted(seen.items()))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def _choices(
        job: _Job, row: int, groups: Sequence[tuple[np.ndarray | str, tuple[str, ...]]]
    ) -> tuple[ViewChoice, ...]:
        choices = []
        for (policy, members), t, search in zip(groups, job.coefficients, job.searches, strict=True):
            distances = (
                {} if search is None else dict(zip(CANDIDATE_VIEWS, search.distances[row].tolist(), strict=True))
            )
            selection = policy if isinstance(policy, str) else "fixed"
            choices.append(ViewChoice(members, tuple(t[row].tolist()), selection, distances))
        return tuple(choices)

    def _encode(self, crops: np.ndarray) -> Tensor:
        """(U, s, s, 3) crops -> (U, 1 + g*g, C) tokens."""
        weight = self.model.query_tokens
        size = self._views_together(weight.device)
        pieces = [
            self.model.encode_views(
                self.processor.pixel_values(crops[start : start + size], weight.device).to(weight.dtype)
            )
            for start in range(0, len(crops), size)
        ]
        return torch.cat(pieces)

    def _views_together(self, device: torch.device) -> int:
        """Views that the tower encodes at once: on a CPU as many as keep a layer's activations (tokens x 4 C) in its
        cache, for there the tower is half as fast again with 32 of the small world's views as with 256."""
        if device.type != "cpu":
            return 256
        config = self.model.config
        return max(1, 2**20 // ((1 + config.grid_size**2) * 4 * config.vision_config.hidden_size))

    def _answer(
        self,
        query_output: Tensor,
        tasks: tuple[str, ...],
        classes: tuple[str, ...],
        controls: tuple[str, ...],
        num_beams: int | None,
        meter: _Meter,
    ) -> dict[str, list[dict[str, Any]]]:
        """task -> one dict of `Region` fields per region."""
        with meter.stage("heads"):
            out, tag_lists = self._answer_heads(query_output, tasks, classes)
        if "caption" in tasks:
            with meter.stage("captions"):
                out["caption"] = self._answer_caption(query_output, tag_lists, controls, num_beams)
        return out

    def _answer_heads(
        self, query_output: Tensor, tasks: tuple[str, ...], classes: tuple[str, ...]
    ) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[str, ...]]]:
        """The answers of the tag and contrast heads, and the tags of each region that steer its caption."""
        model, vocabulary = self.model, self.processor.vocabulary
        count = len(query_output)
        out: dict[str, list[dict[str, Any]]] = {}
        tag_lists: list[tuple[str, ...]] = [()] * count
        # The caption is steered by the caller's words and the predicted tags (spec 4.1 step 7).
        if vocabulary.tags and ("tags" in tasks or "caption" in tasks):
            logits = _finite(model.tag_logits(query_output, self._text_embeds(vocabulary.tags)), "tag")
            raw = torch.sigmoid(logits)
            shown = self._probability("tags", logits)
            order = raw.argsort(dim=1, descending=True).cpu().numpy()
            above = (raw > self._tag_thresholds(raw)).cpu().numpy()
            tag_lists = [tuple(vocabulary.tags[k] for k in order[r] if above[r, k]) for r in range(count)]
            if "tags" in tasks:
                scores = shown.cpu().numpy()
                out["tags"] = [
                    {"tags": tag_lists[r], "tag_scores": dict(zip(vocabulary.tags, scores[r].tolist(), strict=True))}
                    for r in range(count)
                ]
        prompts = tuple(vocabulary.prompts) if "attributes" in tasks else ()
        class_prompts = tuple(CLASS_TEMPLATE.format(name.lower()) for name in classes) if "category" in tasks else ()
        attribute_logits, class_logits = self._contrast_logits(query_output, prompts, class_prompts)
        if prompts:
            best = group_maximum(_finite(attribute_logits, "attribute"), vocabulary.group_sizes)
            scores = self._probability("attributes", best).cpu().numpy()
            names = [attribute.name for attribute in vocabulary.attributes]
            out["attributes"] = []
            for row in scores:
                listed = [k for k in np.argsort(-row, kind="stable") if row[k] > model.config.attribute_threshold]
                out["attributes"].append(
                    {
                        "attributes": tuple(names[k] for k in listed),
                        "attribute_scores": dict(zip(names, row.tolist(), strict=True)),
                    }
                )
        if class_prompts:
            logits = _finite(class_logits, "class")
            scale = model.config.calibration.get("category", (1.0,))[0]
            scores = torch.softmax(scale * logits, dim=1).cpu().numpy()
            out["category"] = [
                {
                    "category": classes[int(row.argmax())],
                    "category_score": float(row.max()),
                    "category_scores": dict(zip(classes, row.tolist(), strict=True)),
                    "category_logits": dict(zip(classes, raw.tolist(), strict=True)),
                }
                for row, raw in zip(scores, logits.cpu().numpy(), strict=True)
            ]
        return out, tag_lists

    def _contrast_logits(self, query_output: Tensor, *texts: tuple[str, ...]) -> Sequence[Tensor]:
        """(R, V) logits of each list of texts, from one pass over all of them."""
        counts = [len(own) for own in texts]
        if not any(counts):
            return [query_output.new_zeros(len(query_output), 0)] * len(texts)
        embeds = torch.cat([self._text_embeds(own) for own in texts if own])
        similarity = self.model.text_logits(query_output, embeds).float()
        return self.model.contrast_logits(similarity).split(counts, dim=1)

    def _answer_caption(
        self, query_output: Tensor, tag_lists: list[tuple[str, ...]], controls: tuple[str, ...], num_beams: int | None
    ) -> list[dict[str, Any]]:
        words = [tuple(dict.fromkeys((*controls, *tags))) for tags in tag_lists]
        ids, mask = self.processor.language_ids([control_text(item) for item in words])
        settings = {} if num_beams is None else {"num_beams": num_beams}
        device = query_output.device
        generated = self.model.generate(query_output, ids.to(device), mask.to(device), **settings)
        captions = self.processor.decode(generated.sequences)
        return [
            {"caption": caption, "caption_score": float(score)}
            for caption, score in zip(captions, generated.scores.tolist(), strict=True)
        ]

    def _tag_thresholds(self, scores: Tensor) -> float | Tensor:
        """One number, or (V,) numbers beside the scores (R, V)."""
        threshold = self.model.config.tag_threshold
        if not isinstance(threshold, dict):
            return threshold
        return scores.new_tensor(tag_thresholds(threshold, self.processor.vocabulary.tags))

    def _probability(self, task: str, logits: Tensor) -> Tensor:
        scale, bias = self.model.config.calibration.get(task, (1.0, 0.0))
        return torch.sigmoid(scale * logits + bias)

    def _text_embeds(self, texts: tuple[str, ...]) -> Tensor:
        """(V, D) embeddings of a list of texts; constant per list, so encoded once."""
        with self._lock:
            if texts not in self._embeds:
                if len(self._embeds) >= 64:
                    self._embeds.pop(next(iter(self._embeds)))
                device = self.model.device
                parts = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
                encoded = [self.processor.text_ids(part) for part in parts]
                self._embeds[texts] = torch.cat(
                    [self.model.encode_text(ids.to(device), mask.to(device)) for ids, mask in encoded]
                )
            return self._embeds[texts]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, whose range is float32's, on a GPU that computes in it; else float32, never float16."""
    halved = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if halved else torch.float32


def _as_found(job: _Job, regions: list[Region], caption_iou: float | None) -> list[Region]:
    """Proposed regions get their masks, and those go whose caption is said already of the same place."""
    if job.found is None:
        return regions
    if job.found.masks is not None:
        regions = [replace(region, mask=mask) for region, mask in zip(regions, job.found.masks, strict=True)]
    captions = [region.caption for region in regions if region.caption is not None]
    if caption_iou is None or len(captions) < len(regions):  # captions were not asked for
        return regions
    rows = drop_repeated_captions(job.boxes, job.found.scores.tolist(), captions, caption_iou)
    return [regions[row] for row in rows]


def _finite(logits: Tensor, what: str) -> Tensor:
    """The logits in float32, if all are numbers."""
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"the {what} logits are not finite in {logits.dtype} on {logits.device}; load with dtype=torch.float32 and "
            "check that the checkpoint is intact"
        )
    return logits.float()


def _mask_pixels(mask: Any) -> np.ndarray:
    """The mask as an array; its size and type are the caller's to check."""
    try:
        return np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    except (RuntimeError, TypeError, ValueError) as error:  # ragged rows, or a tensor that is sparse or has no values
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"a mask cannot be read ({reason}); give H rows of W values, an array or a dense tensor"
        ) from None


def _check_lengths(count: Callable[[Sequence[str]], list[int]], limit: int, texts: dict[str, str]) -> None:
    """Refuses texts (by what they are) of more tokens than a model reads."""
    for what, tokens in zip(texts, count(list(texts.values())), strict=True):
        if tokens > limit:
            shown = what if len(what) <= 80 else f"{what[:77]}..."
            raise InputError(
                f"{shown}: {tokens} tokens are more than the {limit} that this model reads; use fewer words"
            )
