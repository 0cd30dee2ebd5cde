"""Runs a server until it is told to end."""

from __future__ import annotations

import uvicorn

from .app import create_app
from .settings import Settings


def serve(settings: Settings) -> None:
    """Listens and answers until SIGTERM or Ctrl-C.

    Raises:
        InputError: a model does not exist.
        CheckpointError: its folder holds none.
    """
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, log_level="info", server_header=False)
