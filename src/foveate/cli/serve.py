"""`foveate serve`: an HTTP API and a page."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, DType
from foveate.errors import InputError

_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
_MIB = 2**20


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="VERB=NAME",
            help="Model of a verb, describe or ask: a shipped one, a folder, or owner/name of the Hugging Face hub; "
            "may be repeated. By default describe=dynrefer-world and ask=mg-llava-world.",
            show_default=False,
        ),
    ] = None,
    proposer: Annotated[
        list[str] | None,
        typer.Option(
            "--proposer",
            metavar="VERB=NAME",
            help="What finds the regions of describe or the objects of ask (proposer-world, an OWLv2, a SAM); may be "
            "repeated. By default the model's own.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the default is reached from here only.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 for a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with a bearer token a line, one of which every request must bring."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everyone in who reaches an address that is not this machine's own.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Regions that run together; 1 for no batching.")] = 64,
    batch_delay: Annotated[
        float, typer.Option("--batch-delay", help="Milliseconds that an idle model waits for others to join a request.")
    ] = 5.0,
    max_queue: Annotated[int, typer.Option("--max-queue", help="Requests that wait or run; another gets 429.")] = 128,
    max_boxes: Annotated[int, typer.Option("--max-boxes", help="Boxes and masks of a request.")] = 5000,
    max_megabytes: Annotated[float, typer.Option("--max-megabytes", help="MiB of a request.")] = 32.0,
    max_megapixels: Annotated[float, typer.Option("--max-megapixels", help="Million pixels of a picture.")] = 16.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = 1024,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", help="Seconds after which an accepted request is given up.")
    ] = 120.0,
    upload_timeout: Annotated[
        float, typer.Option("--upload-timeout", help="Seconds in which a request must have arrived.")
    ] = 30.0,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="cpu, cuda, cuda:1, mps; may be repeated: each has a process with all models."),
    ] = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Serve describe and ask over HTTP, with a page to try them: /docs has the API."""
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise InputError(
            f"serving needs {', '.join(missing)}; install foveate with the extra: pip install foveate[serve]."
        )
    from foveate.serving.server import serve as run
    from foveate.serving.settings import Settings, read_tokens

    run(
        Settings(
            models=_by_verb(model, "--model"),
            proposers=_by_verb(proposer, "--proposer"),
            devices=tuple(device or ()),
            dtype=dtype,
            host=host,
            port=port,
            tokens=() if token_file is None else read_tokens(token_file),
            insecure=insecure,
            max_request_bytes=_whole(max_megabytes * _MIB, "--max-megabytes"),
            max_pixels=_whole(max_megapixels * 1e6, "--max-megapixels"),
            max_boxes=max_boxes,
            max_new_tokens=max_new_tokens,
            max_queue=max_queue,
            batch_size=batch_size,
            batch_delay=batch_delay / 1000,
            request_timeout=request_timeout,
            upload_timeout=upload_timeout,
        )
    )


def _whole(value: float, option: str) -> int:
    if not math.isfinite(value):
        raise InputError(f"{option} must be a number, not {value}.")
    return round(value)


def _by_verb(given: list[str] | None, option: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in given or ():
        verb, _, name = text.partition("=")
        if not name:
            raise InputError(f"{option} is {text!r}; give VERB=NAME, such as describe=dynrefer-world.")
        if verb in named:
            raise InputError(f"{option} names {verb} twice; give it once.")
        named[verb] = name
    return named
