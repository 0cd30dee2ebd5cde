"""What a server is told: its models, its address, who may use it, and how much of it."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from foveate.errors import InputError
from foveate.vision.images import MAX_PIXELS

VERBS: dict[str, str] = {"describe": "dynrefer-world", "ask": "mg-llava-world"}
"""Verbs of the API, and the model that each has unless another is given."""

_LEAST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server runs.

    Attributes:
        models: verb -> name or folder of its model, for those that are not `VERBS`' own.
        proposers: verb -> what finds the regions of "describe" or the objects of "ask"; else the model's own.
        devices: each with a worker process that has its own copy of the models; () for the best one there is.
        dtype: of all models, as `foveate.load` takes it.
        host, port: where the server listens.
        tokens: bearer tokens, one of which every request of the API must bring; empty for none.
        insecure: whether an address that others reach may go without tokens.
        max_request_bytes: most bytes of a request's body.
        max_pixels: most pixels of a picture.
        max_boxes: most boxes and masks of a request.
        max_text: most characters of a request's texts together.
        max_values: most values of a request's JSON, and most characters or runs of its masks, together.
        max_new_tokens: most tokens of an answer.
        max_view_regions: most regions of a request whose views or attention are wanted as pictures.
        max_queue: most requests that wait or run; another gets 429.
        max_queue_regions: most regions that wait or run; a request with which they would be more gets 429, unless
            nothing waits.
        batch_size: regions that run together; 1 for no batching.
        batch_questions: questions that run together.
        batch_delay: seconds that an idle model waits for others to join a request.
        request_timeout: seconds after which an accepted request is given up.
        upload_timeout: seconds in which a request's head, and its body, must have arrived.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    proposers: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    max_request_bytes: int = 32 * 2**20
    max_pixels: int = 16_000_000
    max_boxes: int = 5000
    max_text: int = 20_000
    max_values: int = 1_000_000
    max_new_tokens: int = 1024
    max_view_regions: int = 100
    max_queue: int = 128
    max_queue_regions: int = 20_000
    batch_size: int = 64
    batch_questions: int = 8
    batch_delay: float = 0.005
    request_timeout: float = 120.0
    upload_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, named in (("model", self.models), ("proposer", self.proposers)):
            for verb in named:
                if verb not in VERBS:
                    raise InputError(f"--{name} is for {' or '.join(VERBS)}, not {verb!r}.")
        for name in (
            "max_request_bytes",
            "max_pixels",
            "max_boxes",
            "max_text",
            "max_values",
            "max_new_tokens",
            "max_view_regions",
            "max_queue",
            "max_queue_regions",
            "batch_size",
            "batch_questions",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_pixels > MAX_PIXELS:
            raise InputError(
                f"max_pixels is {self.max_pixels}, but no picture of more than {MAX_PIXELS} is read; give less."
            )
        for name in ("request_timeout", "upload_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of seconds above 0, not {getattr(self, name)}.")
        if not 0 <= self.batch_delay <= 10:
            raise InputError(f"batch_delay must be from 0 to 10 seconds, not {self.batch_delay}.")
        if not 0 <= self.port <= 65535:
            raise InputError(f"there is no port {self.port}; give one from 0 to 65535.")
        if not self.tokens and not self.insecure and not is_loopback(self.host):
            raise InputError(
                f"others reach {self.host}, so requests need bearer tokens; give --token-file FILE, or --insecure to "
                "let everyone in."
            )

    @property
    def local_only(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_tokens(path: str | Path) -> tuple[str, ...]:
    """Bearer tokens of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        InputError: the file cannot be read, has no token, or one that is short or not of letters, digits and -._~+/=.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(
            f"the tokens of {path} cannot be read ({reason}); give a text file with a token a line."
        ) from None
    tokens = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise InputError(f"{path} has no token; write one a line, such as `openssl rand -hex 32` gives.")
    for number, token in enumerate(tokens, start=1):  # which are not said: errors end in logs
        if len(token) < _LEAST_TOKEN:
            raise InputError(
                f"token {number} of {path} has {len(token)} characters; give at least {_LEAST_TOKEN}, such as "
                "`openssl rand -hex 32` does."
            )
        if not all(character.isascii() and (character.isalnum() or character in "-._~+/=") for character in token):
            raise InputError(f"token {number} of {path} has other characters than letters, digits and -._~+/=.")
    return tuple(dict.fromkeys(tokens))
