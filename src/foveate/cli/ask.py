"""`foveate ask`: questions about pictures and videos, answered at once or in a conversation."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.box_options import BoxChoice, Cache, Labels, NoCache, Tagger, Threshold, Vocabulary, draw_found
from foveate.cli.chat import chat
from foveate.cli.options import Debug, Device, DType, Quantize, one_line, progress_bar
from foveate.cli.outputs import check_outputs, draw_kept, parse_box, picture_files
from foveate.errors import InputError
from foveate.processes import hide_weight_bars, keep_freed_memory

if TYPE_CHECKING:
    from foveate.methods.mg_llava.predictor import Answer


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURE... [QUESTION]",
            help="Images or videos (a file, or a folder of frames), and what is asked about each of them. Without a "
            "question, a conversation about one picture.",
            show_default=False,
        ),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", help="A question about every picture; may be repeated. Then PICTURE are all pictures."
        ),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            "--boxes",
            help="Objects to look at one by one: a JSON file, as `foveate boxes` and `describe --boxes` have it; what "
            "finds them (proposer-world, an OWLv2, a SAM); or none. By default proposer-world for a shipped model.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="An object, xyxy pixels; may be repeated; in all pictures."),
    ] = None,
    tagger: Tagger = None,
    vocabulary: Vocabulary = None,
    labels: Labels = None,
    threshold: Threshold = 0.2,
    cache: Cache = None,
    no_cache: NoCache = False,
    model: Annotated[
        str, typer.Option("--model", help="A shipped model, a folder, or owner/name of the Hugging Face hub.")
    ] = "mg-llava-world",
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy; higher answers vary more.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws of a temperature above 0.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answers with the boxes used, the fusion's gate and times, as JSON.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Picture with the boxes used, to write or replace; a folder for several."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Share of a picture's tokens that is read, such as 0.2: HiRED chooses them."),
    ] = None,
    show_tokens: Annotated[
        Path | None,
        typer.Option("--show-tokens", help="Picture of the tokens kept, to write or replace; a folder for several."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Questions that run together.")] = 8,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    debug: Debug = False,
) -> None:
    """Ask about pictures: what is there, what colour, how many, where, what a sign says."""
    from foveate.checkpoints import find_checkpoint
    from foveate.methods import load
    from foveate.vision.images import check_image_file
    from foveate.vision.video import is_video

    pictures, questions = _split(words, question or [])
    for path in pictures:
        if not is_video(path):
            check_image_file(path)
    if not questions and (as_json or picture is not None or show_tokens is not None):
        raise InputError(
            "--json, --picture and --show-tokens belong to questions; in a conversation, /boxes and /keep draw."
        )
    if show_tokens is not None and keep is None:
        raise InputError("--show-tokens shows what --keep keeps; say --keep 0.2, too.")
    if boxes is not None and box:
        raise InputError("--boxes and --box contradict each other; leave one out.")
    find_checkpoint(model)  # before anything else is loaded
    drawings = picture_files(picture, pictures, "boxes", "--picture")
    overlays = picture_files(show_tokens, pictures, "tokens", "--show-tokens")
    if show_tokens is not None and any(is_video(path) for path in pictures):
        raise InputError("--show-tokens draws on images; leave it out for a video, --json names the tokens.")
    written = [path for path in (*drawings, *overlays) if path is not None]
    choice = BoxChoice.of(model, boxes, [parse_box(text) for text in box or []])
    check_outputs(written, [path for path in (*pictures, choice.file) if path is not None and not path.is_dir()])
    records = choice.records(pictures)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    generation = {name: value for name, value in settings.items() if value is not None}

    hide_weight_bars()
    keep_freed_memory()
    proposer = choice.proposer(
        tagger=tagger,
        vocabulary=vocabulary,
        labels=labels,
        threshold=threshold,
        cache=cache,
        no_cache=no_cache,
        device=device,
    )
    predictor = _load(load, model, proposer=proposer, device=device, dtype=dtype, quantize=quantize, keep_tokens=keep)
    if not questions:
        chat(predictor, pictures[0], records[0], choice, generation)
        return
    rows = [(k, text) for k in range(len(pictures)) for text in questions]
    with progress_bar("questions") as progress:
        answers = predictor.ask(
            [pictures[k] for k, _ in rows],
            [text for _, text in rows],
            boxes=[records[k] for k, _ in rows],
            batch_size=batch_size,
            progress=progress,
            **generation,
        )
    _print([(pictures[k], text, answer) for (k, text), answer in zip(rows, answers, strict=True)], as_json)
    of_picture = {k: answer for (k, _), answer in zip(rows, answers, strict=True)}
    for k, drawing in enumerate(drawings):
        if drawing is not None:
            frames = zip(of_picture[k].boxes, of_picture[k].labels, strict=True)
            draw_found(pictures[k], [(own, names, None) for own, names in frames], drawing)
            print(f"written: {drawing}", file=sys.stderr)
    for k, overlay in enumerate(overlays):
        if overlay is not None:
            draw_kept(pictures[k], of_picture[k].kept, overlay)
            print(f"written: {overlay}", file=sys.stderr)


def _split(words: list[str], questions: list[str]) -> tuple[list[Path], list[str]]:
    """Pictures and questions. Without --question the last of several words is one, unless there is such a file."""
    if not questions and len(words) > 1:
        if os.path.exists(words[-1]):  # noqa: PTH110 (a long question is a name that pathlib raises on)
            raise InputError(
                f"{words[-1]} is a file, so there is no question about the {len(words)} pictures; end with a question, "
                "or give one picture for a conversation about it."
            )
        words, questions = words[:-1], words[-1:]
    return [Path(word) for word in words], questions


def _load(load: Any, model: str, **options: Any) -> Any:
    predictor = load(model, **options)
    if not hasattr(predictor, "conversation"):
        raise InputError(f"{model} does not answer questions; give an MG-LLaVA or a LLaVA.")
    return predictor


def _print(rows: list[tuple[Path, str, Answer]], as_json: bool) -> None:
    if as_json:
        listed = [{"picture": os.fspath(path), "question": text, **answer.to_dict()} for path, text, answer in rows]
        print(json.dumps(listed, indent=2))
    elif len(rows) == 1:
        print(rows[0][2].text)
    else:
        for path, text, answer in rows:
            print(f"{one_line(str(path))}  {one_line(text)}")
            print("".join(f"    {line}\n" for line in answer.text.splitlines() or [""]), end="")
    cut = [answer.tokens for _, _, answer in rows if answer.finish == "length"]
    if cut:
        print(
            f"note: {len(cut)} of {len(rows)} answers end at {max(cut)} tokens; --max-new-tokens N lets them go on.",
            file=sys.stderr,
        )
