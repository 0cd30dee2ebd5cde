"""From a model's name to its folder, and the sentences when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import checkpoints
from foveate.checkpoints import find_checkpoint, read_config, shipped_models, suggestion
from foveate.errors import CheckpointError, InputError
from foveate.methods import METHODS, get_method, load, method_module


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shipped models: a method's and a part's."""
    folder = tmp_path / "weights"
    for name, model_type in (("dynrefer-world", METHODS["dynrefer"].model_type), ("clip-world", "clip")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    (folder / "unfinished").mkdir()
    (folder / ".clip-world.0123456789ab.partial").mkdir()
    (folder / ".clip-world.0123456789ab.partial" / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoints, "WEIGHTS", folder)
    return folder


def test_shipped_models_are_found_by_name(weights: Path) -> None:
    assert shipped_models() == ["clip-world", "dynrefer-world"]
    assert find_checkpoint("clip-world") == weights / "clip-world"


def test_folders_are_found(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(weights / "clip-world") == weights / "clip-world"
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("weights/clip-world") == Path("weights/clip-world"), "a folder goes before a repository"


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dynrefer-wrld", "did you mean 'dynrefer-world'"),
        ("DynRefer_World", "did you mean 'dynrefer-world'"),
        ("zzz", "give a shipped model \\(clip-world, dynrefer-world\\)"),
        ("", "is not the name of a model"),
        ("a\0b", "is not the name of a model"),
        ("./nowhere/at/all", "there is no folder nowhere/at/all"),
        ("~nobody-of-this-name/model", "there is no folder ~nobody-of-this-name/model"),
        ("x" * 5000, r"^'xxx.{20,40}' cannot be opened \(File name too long\); give a shipped model"),
        (None, "None is not the name of a model"),
        (5, "5 is not the name of a model"),
        (b"clip-world", "b'clip-world' is not the name of a model"),
    ],
)
def test_an_unknown_name_suggests(name: Any, sentence: str) -> None:
    for door in (find_checkpoint, load):
        with pytest.raises(InputError, match=sentence):
            door(name)


def test_a_path_below_an_existing_folder_is_not_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    with pytest.raises(InputError, match="there is no folder out/checkpoint"):
        find_checkpoint("out/checkpoint")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is a file; give the folder"):
        find_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_checkpoint(tmp_path)


def test_offline_a_repository_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub.\nA second line of advice.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="owner/name is not in the local cache") as caught:
        find_checkpoint("owner/name")
    assert "\n" not in str(caught.value)
    assert "Cannot reach the hub);" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json .*copy the checkpoint again"):
        read_config(tmp_path)


def test_load_refuses_a_part(weights: Path) -> None:
    with pytest.raises(InputError, match=r"'clip' model, a part .* give a model of: dynrefer-world"):
        load("clip-world")
    (weights / "clip-world" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say its model_type"):
        load("clip-world")


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("device", ["gpu0", "meta", "hpu", "privateuseone", "", [], torch.device("meta")])
def test_load_checks_the_device(device: Any) -> None:
    with pytest.raises(InputError, match=r"there is no device '.*' here; use one of: cpu"):
        load("dynrefer-world", device=device)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        ("bfloat", r"no dtype 'bfloat' \(did you mean 'bfloat16'\?\)"),
        ([], r"no dtype \[\]; use one of: float32"),
        (torch.int8, r"no dtype torch\.int8"),
    ],
)
def test_load_checks_the_dtype(dtype: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load("dynrefer-world", dtype=dtype)


@pytest.mark.usefixtures("weights")
def test_load_takes_the_dtypes_of_torch() -> None:
    # As far as the model, which has no weights here: the advice of other sentences is dtype=torch.float32.
    with pytest.raises(CheckpointError, match="cannot load the DynRefer checkpoint"):
        load("dynrefer-world", device=torch.device("cpu"), dtype=torch.float32)


def test_registry() -> None:
    assert get_method("dynrefer").config.model_type == METHODS["dynrefer"].model_type
    with pytest.raises(InputError, match=r"no method 'dynrefr' \(did you mean 'dynrefer'\?\)"):
        get_method("dynrefr")
    with pytest.raises(InputError, match="the method 'dynrefer' has no synthesis"):
        method_module("dynrefer", "synthesis")


def test_suggestion_is_silent_when_nothing_is_near() -> None:
    assert suggestion("coco", ["coc", "voc"]) == " (did you mean 'coc'?)"
    assert suggestion("zzzz", ["coco", "voc"]) == ""


def test_a_config_that_cannot_be_read_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Is a directory\)"):
        read_config(tmp_path)
