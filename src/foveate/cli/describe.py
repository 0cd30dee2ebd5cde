"""`foveate describe`: what is in these regions."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.options import Debug, Device, DType, Progress, Quantize, one_line, progress_bar
from foveate.cli.outputs import check_outputs, free_name, parse_box, picture_files, save_picture, split_words
from foveate.errors import InputError
from foveate.files import ResumableLines, atomic_write
from foveate.processes import hide_weight_bars, keep_freed_memory

if TYPE_CHECKING:
    from foveate import Regions
    from foveate.methods.dynrefer.results import Report

FORMATS = ("text", "json", "jsonl")
# Image, its boxes, annotated picture, picture of the views, picture of the attention.
_Job = tuple[Path, Any, Path | None, Path | None, Path | None]
IMAGES_PER_CALL = 16  # so many images are in memory at once, and so often finished lines reach the file


def describe(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    box: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A region, xyxy pixels; may be repeated; for all images."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes",
            metavar="FILE.json",
            help='Regions, xyxy pixels (not x, y, width, height): {"image name": [[x0, y0, x1, y1], ...]}, or the list '
            "alone when one image is given. Images of one name in two folders are named by their paths.",
        ),
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            metavar="FILE.png",
            help="A region as a mask of the image's size: what is not zero (the index in a palette image); may be "
            "repeated.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Propose the regions, then describe them.")] = False,
    proposer: Annotated[
        str | None,
        typer.Option(
            "--proposer",
            help="What proposes the regions of --everything: proposer-world, a SAM or OWLv2 checkpoint (a folder, or "
            "owner/name of the Hugging Face hub), or FILE.json with a detector's boxes, as --boxes takes it or with "
            'scores: {"image name": {"boxes": [...], "scores": [...]}}. By default the model\'s own.',
        ),
    ] = None,
    proposer_words: Annotated[
        str | None, typer.Option("--proposer-words", help="What OWLv2 looks for, by commas.")
    ] = None,
    max_regions: Annotated[
        int | None, typer.Option("--max-regions", help="With --everything: most regions of an image.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="With --everything: least score of a proposal, 0 to 1.")
    ] = None,
    box_iou: Annotated[
        float | None,
        typer.Option(
            "--box-iou",
            help="With --everything: of two proposals that overlap by a larger IoU, one is described (0.7).",
            show_default=False,
        ),
    ] = None,
    caption_iou: Annotated[
        float | None,
        typer.Option(
            "--caption-iou",
            help="With --everything: of two regions with one caption that overlap by a larger IoU, one stays (0.3).",
            show_default=False,
        ),
    ] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="With --everything: leave out none of these.")
    ] = False,
    tasks: Annotated[str, typer.Option("--tasks", help="What to say, by commas.")] = "caption,tags,attributes,category",
    views: Annotated[
        str,
        typer.Option(
            "--views",
            help="How much context to look at: task (what suits each task), auto or official (searched for each "
            "region), pairwise or median (searched by other rules), or the views' coefficients from 0 (the region) to "
            "1 (the image), such as 0,0.3,0.5.",
        ),
    ] = "task",
    model: Annotated[
        str, typer.Option("--model", help="A shipped model, a folder, or owner/name of the Hugging Face hub.")
    ] = "dynrefer-world",
    classes: Annotated[str | None, typer.Option("--classes", help="Categories to choose from, by commas.")] = None,
    style: Annotated[str, typer.Option("--format", help="text, json, or jsonl (a line per image).")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="File for the result instead of the terminal.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run that wrote jsonl to --out.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Go on after an image that cannot be read or whose boxes are wrong; the error is said on stderr and "
            "stands in the result.",
        ),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            help="Annotated picture to write or replace; a folder when several images are given. By default, the text "
            "of one image comes with IMAGE-described.png in the current folder, or IMAGE-described-2.png and so on "
            "where there is such a file.",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no annotated picture.")] = False,
    show_views: Annotated[
        Path | None,
        typer.Option(
            "--show-views",
            help="Picture of the crops looked at, and of why where they were searched; a folder when several images "
            "are given.",
        ),
    ] = None,
    show_attention: Annotated[
        Path | None,
        typer.Option(
            "--show-attention",
            help="Picture of where in those crops the model read for a region, its category and its best tag; a folder "
            "when several images are given.",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Say what it cost: crops encoded, hashes, milliseconds of each stage."),
    ] = False,
    beams: Annotated[int | None, typer.Option("--beams", help="Beam width of the captions; 1 is greedy.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Regions that run together.")] = 64,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    debug: Debug = False,
) -> None:
    """Describe regions of images: caption, tags, attributes and category, each with its probability.

    Without --box, --boxes, --mask or --everything, the whole image is described.
    """
    from foveate.vision.images import check_image_file, load_mask

    for image in images if not skip_bad else ():
        check_image_file(image)
    if style not in FORMATS:
        from foveate.checkpoints import suggestion

        raise InputError(f"there is no format {style!r}{suggestion(style, FORMATS)}; use one of: {', '.join(FORMATS)}.")
    if resume and (style != "jsonl" or out is None):
        raise InputError("--resume continues a run with --format jsonl and --out FILE; give both.")
    if no_picture and picture is not None:
        raise InputError("--picture and --no-picture contradict each other; leave one out.")
    if picture is None and not no_picture and style == "text" and len(images) == 1:
        picture = free_name(Path(f"{images[0].stem}-described.png"))
    annotated = picture_files(picture, images, "described", "--picture")
    looked_at = picture_files(show_views, images, "views", "--show-views")
    attended = picture_files(show_attention, images, "attention", "--show-attention")
    written = [path for path in (out, *annotated, *looked_at, *attended) if path is not None]
    search = _search(proposer, proposer_words, max_regions, min_score, box_iou, caption_iou, keep_duplicates)
    if search and not everything:
        raise InputError("--proposer and what limits it belong to --everything; give that too, or leave them out.")
    detections = Path(proposer) if proposer is not None and proposer.lower().endswith(".json") else None
    check_outputs(written, [*images, *(mask or []), *(path for path in (boxes, detections) if path)])
    regions = _regions(images, box or [], boxes, mask or [])

    options = {
        "tasks": split_words(tasks),
        "views": _views(views),
        "classes": None if classes is None else split_words(classes),
        "num_beams": beams,
        "everything": everything,
        **search,
    }
    if detections is not None:
        from foveate.vision.box_file import BoxFile

        listed = BoxFile(detections)
        proposed = _digest(listed.entries(images))  # of all images, before the work
    else:
        listed = proposed = None
    pending = list(zip(images, regions, annotated, looked_at, attended, strict=True))
    skipped: list[_Job] = []
    skipped_before = 0
    if style == "jsonl" and out is not None:
        key = json.dumps(
            [[os.fspath(image) for image in images], _digest(regions), options, model, dtype, quantize, proposed]
        )
        lines = ResumableLines(out, key=key, resume=resume)
        pending = pending[len(lines.finished) :]
        skipped_before = sum("error" in json.loads(line) for line in lines.finished)
    else:
        lines = None
    masks = [load_mask(path) for path in mask or []]
    reports: list[Report] = []

    from foveate.checkpoints import find_checkpoint
    from foveate.methods import load

    folder = find_checkpoint(model)
    hide_weight_bars()
    keep_freed_memory()
    describer = load(folder, device=device, dtype=dtype, quantize=quantize)
    if quantize is not None:
        print(
            f"note: {quantize} changes answers a little; `foveate evaluate RECIPE --model {one_line(model)} --quantize "
            f"{quantize}` measures how much.",
            file=sys.stderr,
        )
    with progress_bar("regions" if len(images) == 1 else "images") as progress:
        options["batch_size"] = batch_size  # not before: the lines to resume do not depend on it
        if show_attention is not None:
            options["attention"] = True
        if listed is not None:
            options["proposer"] = listed
        described = _describe(describer, pending, masks, progress, options, skipped if skip_bad else None, reports)
        if lines is not None:
            _write_lines(lines, described)
        elif out is not None:
            with atomic_write(out) as file:
                file.write("".join(_rendered(described, style)))
        elif style == "json":
            print("".join(_rendered(described, style)), end="")
        else:
            for part in _rendered(described, style):
                print(part, end="", flush=True)
    # What was asked for may be piped on; where it went is news for the person.
    news = sys.stdout if style == "text" else sys.stderr
    if report and reports:
        print(sum(reports[1:], reports[0]), file=news)
    not_drawn = {path for job in skipped for path in job[2:]}
    for path in written:
        if path not in not_drawn:
            print(f"written: {path}", file=news)
    if skipped or skipped_before:
        print(f"{len(skipped) + skipped_before} of {len(images)} images skipped.", file=sys.stderr)


# ---------------------------------------------------------------- arguments


def _views(text: str) -> str | list[float]:
    """A number list, or the name of a policy, which the describer checks."""
    if not any(character.isdigit() for character in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--views {text!r} is not task, auto or numbers with commas, such as 0,0.3,0.5.") from None


def _regions(images: Sequence[Path], box: list[str], boxes: Path | None, masks: list[Path]) -> list[Any]:
    """Boxes of each image, or None where the describer looks at the whole image, at masks or at proposals."""
    if masks and len(images) > 1:
        raise InputError(f"--mask belongs to one image, but {len(images)} are given; describe them one by one.")
    common = [parse_box(text) for text in box]
    if boxes is None:
        return [common or None] * len(images)
    from foveate.vision.box_file import BoxFile

    entries = BoxFile(boxes).entries(images)
    for image, entry in zip(images, entries, strict=True):
        if not isinstance(entry, list):
            raise InputError(f"{boxes}: the boxes of {image.name!r} are not a list; write [[x0, y0, x1, y1], ...].")
    return [common + entry for entry in entries]


def _search(
    proposer: str | None,
    words: str | None,
    max_regions: int | None,
    min_score: float | None,
    box_iou: float | None,
    caption_iou: float | None,
    keep_duplicates: bool,
) -> dict[str, Any]:
    """What was said of how regions are found; what was not is the describer's to decide."""
    search: dict[str, Any] = {
        "proposer": proposer,
        "proposer_words": None if words is None else split_words(words),
        "max_regions": max_regions,
        "min_score": min_score,
        "box_iou": box_iou,
        "caption_iou": caption_iou,
    }
    search = {name: value for name, value in search.items() if value is not None}
    if keep_duplicates:
        if "box_iou" in search or "caption_iou" in search:
            raise InputError("--keep-duplicates leaves nothing to --box-iou and --caption-iou; leave one out.")
        search |= {"box_iou": None, "caption_iou": None}
    return search


def _digest(regions: Any) -> str:
    return hashlib.sha256(json.dumps(regions).encode()).hexdigest()


# ---------------------------------------------------------------- work and results


def _describe(
    describer: Any,
    pending: Sequence[_Job],
    masks: list[Any],
    progress: Progress,
    options: dict[str, Any],
    skipped: list[_Job] | None,
    reports: list[Report],
) -> Iterator[tuple[Path, Regions | InputError]]:
    """Describes a few images at a time, writes their pictures, and gives them on.

    Args:
        reports: gets what each call cost.
        skipped: gets the images whose own fault stopped a call, and they are given on with it; None to stop there.
    """

    def call(part: Sequence[_Job]) -> list[Any]:
        if len(pending) == 1:
            return [describer(part[0][0], part[0][1], masks or None, progress=progress, **options)]
        boxes = [job[1] for job in part]
        return describer([job[0] for job in part], None if boxes[0] is None else boxes, **options)

    for start in range(0, len(pending), IMAGES_PER_CALL):
        part = pending[start : start + IMAGES_PER_CALL]
        results = _call_each(call, part, skip=skipped is not None)
        # One call described all of them, and each has its report.
        costs = (found.report for found in results if not isinstance(found, InputError))
        reports.extend([cost for cost in costs if cost is not None][:1])
        for job, regions in zip(part, results, strict=True):
            image, _, *pictures = job
            if isinstance(regions, InputError):
                print(f"skipped: {one_line(str(regions))}", file=sys.stderr)
                assert skipped is not None
                skipped.append(job)
            else:
                if options.get("everything") and not len(regions):
                    print(f"note: the proposer found nothing in {one_line(str(image))}.", file=sys.stderr)
                _draw(regions, *pictures, dense=bool(options.get("everything")))
            yield image, regions
        if len(pending) > 1:
            progress(start + len(part), len(pending))


def _call_each(
    call: Callable[[Sequence[_Job]], list[Regions]], part: Sequence[_Job], *, skip: bool
) -> Sequence[Regions | InputError]:
    """The regions of each image. Where the call fails, its sentence does not say which image it is about: they are
    looked at one by one, and with `skip` the good ones are described after all."""
    try:
        return call(part)
    except InputError:
        faults = [_fault(image, boxes) for image, boxes, *_ in part]
        known = [fault for fault in faults if fault is not None]
        if not known:
            raise
        if not skip:
            raise known[0] from None
    good = [job for job, fault in zip(part, faults, strict=True) if fault is None]
    described = iter(call(good) if good else [])
    return [next(described) if fault is None else fault for fault in faults]


def _fault(image: Path, boxes: Any) -> InputError | None:
    """What is wrong with an image file or its boxes."""
    from foveate.ops.boxes import validate_boxes
    from foveate.vision.images import load_image

    try:
        width, height = load_image(image).size
    except InputError as error:
        return error
    try:
        validate_boxes([] if boxes is None else boxes, (height, width))
    except InputError as error:
        return InputError(f"{image}: {error}")
    return None


def _draw(
    regions: Regions, annotated: Path | None, looked_at: Path | None, attended: Path | None, *, dense: bool
) -> None:
    if annotated is not None:
        save_picture(regions.plot_dense() if dense else regions.plot(), annotated)
    if looked_at is not None:
        save_picture(regions.plot_views(explain=regions.searched), looked_at)
    if attended is not None:
        save_picture(regions.plot_attention(), attended)


def _write_lines(lines: ResumableLines, described: Iterator[tuple[Path, Regions | InputError]]) -> None:
    try:
        with lines:
            for image, regions in described:
                lines.append(json.dumps(_record(image, regions)))
    finally:
        if lines.partial.exists():
            print(f"finished lines are kept in {lines.partial}; --resume continues from there.", file=sys.stderr)


def _rendered(described: Iterator[tuple[Path, Regions | InputError]], style: str) -> Iterator[str]:
    if style == "json":
        yield json.dumps([_record(image, regions) for image, regions in described], indent=2) + "\n"
    for image, regions in described:
        yield json.dumps(_record(image, regions)) + "\n" if style == "jsonl" else _text(image, regions)


def _record(image: Path, regions: Regions | InputError) -> dict[str, Any]:
    found = {"error": str(regions)} if isinstance(regions, InputError) else regions.to_dict()
    return {"image": os.fspath(image), **found}


def _text(image: Path, regions: Regions | InputError) -> str:
    if isinstance(regions, InputError):
        return f"{image}  skipped: {one_line(str(regions))}\n"
    lines = [f"{image}  {len(regions)} region{'s' * (len(regions) != 1)}"]
    for number, region in enumerate(regions, start=1):
        box = ", ".join(f"{value:g}" for value in region.box)
        caption = "" if region.caption is None else f"  {region.caption}  ({region.caption_score:.2f})"
        lines.append(f"{number:>3}  [{box}]{caption}")
        if region.score is not None:
            joint = "" if region.joint_score is None else f", with the caption {region.joint_score:.2f}"
            lines.append(f"     proposal    {region.score:.2f}{joint}")
        if region.category is not None:
            lines.append(f"     category    {region.category} {region.category_score:.2f}")
        for name, words, scores in (
            ("attributes", region.attributes, region.attribute_scores),
            ("tags", region.tags, region.tag_scores),
        ):
            if scores:
                listed = ", ".join(f"{word} {scores[word]:.2f}" for word in words) or "none is likely enough"
                lines.append(f"     {name:<12}{listed}")
    return "\n".join(lines) + "\n"
