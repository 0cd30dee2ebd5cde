"""From a model's name to its folder, and the sentences when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    ],
)
def test_an_unknown_name_suggests(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find_checkpoint(name)


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
def test_load_checks_device_and_dtype() -> None:
    with pytest.raises(InputError, match="there is no device 'gpu0' here; use one of: cpu"):
        load("dynrefer-world", device="gpu0")
    with pytest.raises(InputError, match=r"no dtype 'bfloat' \(did you mean 'bfloat16'\?\)"):
        load("dynrefer-world", dtype="bfloat")


def test_registry() -> None:
    assert get_method("dynrefer").config.model_type == METHODS["dynrefer"].model_type
    with pytest.raises(InputError, match=r"no method 'dynrefr' \(did you mean 'dynrefer'\?\)"):
        get_method("dynrefr")
    with pytest.raises(InputError, match="the method 'dynrefer' has no synthesis"):
        method_module("dynrefer", "synthesis")


def test_suggestion_is_silent_when_nothing_is_near() -> None:
    assert suggestion("coco", ["coc", "voc"]) == " (did you mean 'coc'?)"
    assert suggestion("zzzz", ["coco", "voc"]) == ""
