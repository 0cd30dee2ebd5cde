"""`foveate bench backbone`: measure time and memory of networks on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug
from foveate.errors import InputError
from foveate.processes import keep_freed_memory

app = typer.Typer(
    help="Measure time and memory on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _bench() -> None:
    # With a callback, typer keeps `backbone` a verb of its own although it is the only one.
    pass


@app.command()
def backbone(
    out: Annotated[Path, typer.Option("--out", help="Folder of backbone.json and backbone.png.")] = Path(
        "out/benchmarks"
    ),
    part: Annotated[str, typer.Option("--part", help="scan, networks or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="224, 384 and 512 pixels, and small scans.")] = False,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Sides of the images in pixels, with commas; 224 to 2048 by default.")
    ] = "",
    models: Annotated[
        str,
        typer.Option(
            "--models",
            help="Some of vision_gru, vision_gru_plain (not in slices), vision_gru_logspace (the released code's "
            "scan), vit_sdpa, vit_eager and convnext, with commas; all by default.",
        ),
    ] = "",
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each; the median counts.")] = 3,
    limit: Annotated[float, typer.Option("--limit", help="Processor seconds that one run may take.")] = 60.0,
    train_size: Annotated[int, typer.Option("--train-size", help="Training steps are measured up to this size.")] = 224,
    threads: Annotated[int, typer.Option("--threads", help="Threads of torch.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what backbone.json in the folder has already.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure VisionGRU beside a ViT and a ConvNeXt of its size, and its scan beside other ways to compute it.

    Times are processor seconds, medians; memory is the peak of a forward pass in a process of its own.
    """
    from foveate.methods.vision_gru.cost import MODELS, CostSettings, measure_cost

    settings = CostSettings(
        part=part,
        quick=quick,
        sizes=tuple(_pixels(text) for text in _listed(sizes)),
        models=tuple(_listed(models)) or MODELS,
        repeats=repeats,
        limit=limit,
        train_size=train_size,
        threads=threads,
    )
    keep_freed_memory()  # as `train` and `classify` do; networks are measured in processes of their own, without it
    path = measure_cost(out, settings, resume=resume, say=lambda line: print(line, flush=True))
    print(f"written: {path}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pixels(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--sizes has {text!r}; give pixels with commas between, such as 224,512,1024.")
    return int(text)
