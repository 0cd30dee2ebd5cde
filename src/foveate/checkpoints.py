"""One door from a model's name to its folder: shipped weights, a folder of the user, or a Hugging Face repository."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.errors import CheckpointError, InputError

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the shipped models, one sub-folder each; all of them are trained on the rendered world only."""

_PART = 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def shipped_models() -> list[str]:
    """Names of the models that come with the package, sorted: "clip-world", "dynrefer-world", ..."""
    if not WEIGHTS.is_dir():
        return []
    # Names with a dot in front are those of folders that are being written.
    folders = (folder for folder in WEIGHTS.iterdir() if not folder.name.startswith("."))
    return sorted(folder.name for folder in folders if (folder / "config.json").is_file())


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """The local folder of a model.

    Args:
        name: a shipped model ("dynrefer-world"), a folder with a `config.json`, or a repository "owner/name" of the
            Hugging Face hub, which is downloaded once and then found in its cache.

    Raises:
        InputError: nothing of this name exists, or it is no name at all; the sentence suggests the nearest shipped
            name.
        CheckpointError: the folder holds no `config.json`, or the repository cannot be downloaded.
    """
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{reprlib.repr(name)} is not the name of a model; {_known()}.")
    if text in shipped_models():
        return WEIGHTS / text
    # pathlib's own expanduser raises for a user whom the system does not know.
    folder = Path(os.path.expanduser(text))  # noqa: PTH111
    try:
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"{folder} has no config.json; give the folder that save_pretrained wrote.")
            return folder
        if folder.exists():
            raise InputError(f"{folder} is a file; give the folder that holds it together with its config.json.")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise InputError(f"{reprlib.repr(text)} cannot be opened ({error.strerror}); {_known()}.") from None
    # "out/checkpoint" looks like a repository too; where its parent is a folder here, a folder was meant.
    if _HUB_ID.fullmatch(text) and not folder.parent.is_dir():
        return _download(text)
    if len(folder.parts) > 1:
        raise InputError(f"there is no folder {folder}; {_known()}.")
    raise InputError(f"there is no model {text!r}{suggestion(text, shipped_models())}; {_known()}.")


def warn_of_the_world(folder: Path, instead: str) -> None:
    """Warns the caller's caller where a model ships with the package; `instead` says what to do for photographs."""
    if folder.parent == WEIGHTS:
        text = f"{folder.name} knows the rendered world only, nothing of photographs; for those, {instead}"
        warnings.warn(text, stacklevel=3)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        CheckpointError: it is missing, cannot be read, is not JSON, or not an object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; give the folder that save_pretrained wrote.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object; copy the checkpoint again.")
    return config


def fingerprint(folder: Path) -> str:
    """What tells a model folder from others, also from itself after another training: a digest of its small files, and
    of the size, the first and the last megabyte of its large ones, which are too large to be read for this.

    Hidden files do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(_PART))
            file.seek(max(_PART, size - _PART))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def suggestion(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _known() -> str:
    shipped = ", ".join(shipped_models()) or "none in this installation"
    return f"give a shipped model ({shipped}), a folder with a config.json, or an owner/name of the Hugging Face hub"


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"])
        )
    except GatedRepoError:
        raise CheckpointError(
            f"the repository {repository} asks for its terms to be accepted; do so on its page and run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"the Hugging Face hub has no repository {repository}{suggestion(repository, shipped_models())}, "
            "or it is private; check the name or run `hf auth login`."
        ) from None
    except HFValidationError as error:
        raise InputError(f"{repository!r} is not the name of a repository ({error}); {_known()}.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{repository} is not in the local cache and could not be downloaded ({reason}); connect to the network, "
            "or download it elsewhere and give its folder."
        ) from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the repository {repository} has no config.json, so it is not a model that loads here.")
    return folder
