"""Official layouts in miniature: released file, DeepSpeed folder, open_clip and timm trunks, CLIP, base model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mg_llava_parts as shared  # pyright: ignore[reportMissingImports] (conftest.py loads it)
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import foveate
from foveate.cli import main
from foveate.errors import CheckpointError, InputError
from foveate.methods.mg_llava.conversion import convert_checkpoint, convert_state_dict
from foveate.methods.mg_llava.modeling import MGLlavaModel

TRUNK_KEYS = (
    ("embeddings.patch_embeddings.", "stem.0."),
    ("embeddings.layernorm.", "stem.1."),
    ("encoder.", ""),
    ("layers.", "blocks."),
    ("downsampling_layer.", "downsample."),
    ("dwconv.", "conv_dw."),
    (".layernorm.", ".norm."),
    ("pwconv1.", "mlp.fc1."),
    ("pwconv2.", "mlp.fc2."),
    ("layer_scale_parameter", "gamma"),
)


class Files:
    """The files that a release is converted from, and the model that they were taken from."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = shared.make_model()
        state = self.model.state_dict()
        self.trunk: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        for key, value in state.items():
            if key.startswith("high_res_tower.model."):
                name = key.removeprefix("high_res_tower.model.")
                for ours, theirs in TRUNK_KEYS:
                    name = name.replace(ours, theirs)
                self.trunk[name] = value.clone()
            elif not key.startswith("vision_tower."):
                for ours, theirs in (
                    ("fusion.", "fuse_module."),
                    ("image_projector.", "projector.model."),
                    ("box_projector.", "bbox_projector.model."),
                    ("language_model.", "llm."),
                ):
                    if key.startswith(ours):
                        self.trained[theirs + key.removeprefix(ours)] = value.clone()
        self.release = folder / "Tiny-7B"
        self.release.mkdir()
        self.file = self.release / "iter_21000.pth"
        self.clip, self.llm = folder / "clip", folder / "llm"
        tower = CLIPVisionModel(CLIPVisionConfig(**shared.VISION))
        tower.load_state_dict(self.model.vision_tower.model.state_dict())
        tower.save_pretrained(self.clip)
        language = LlamaForCausalLM(LlamaConfig(**shared.LLAMA))
        language.save_pretrained(self.llm)
        shared.make_tokenizer().save_pretrained(self.llm)
        self.convnext = folder / "convnext.bin"
        torch.save({f"visual.trunk.{key}": value for key, value in self.trunk.items()} | self.extras(), self.convnext)
        self.save(self.trained)

    @staticmethod
    def extras() -> dict[str, Tensor]:
        """What a whole open_clip model has beside the trunk."""
        return {
            "visual.trunk.head.norm.weight": torch.ones(16),
            "visual.head.mlp.fc1.weight": torch.ones(2, 16),
            "transformer.resblocks.0.ln_1.weight": torch.ones(4),
            "token_embedding.weight": torch.ones(8, 4),
            "positional_embedding": torch.ones(3, 4),
            "logit_scale": torch.tensor(1.0),
        }

    def save(self, content: Any) -> None:
        torch.save(content, self.file)

    @property
    def sources(self) -> dict[str, Any]:
        return {"llm": self.llm, "clip": self.clip, "convnext": self.convnext, "template": "vicuna"}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def same(folder: Path, model: MGLlavaModel) -> None:
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded, MGLlavaModel)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_release_becomes_a_folder_that_loads(files: Files, tmp_path: Path) -> None:
    result = convert_checkpoint(files.release, out=tmp_path / "out", **files.sources)
    same(tmp_path / "out", files.model)
    assert result.config.fusion == "conv_gate"
    assert result.config.objects == "concat"
    assert result.config.high_res_size == 64
    assert set(result.unused["convnext"]) == set(files.extras())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["unused"]["convnext"] == sorted(files.extras())
    assert sum(part.tensors for part in result.parts) == len(files.model.state_dict())
    answer = foveate.load(tmp_path / "out", device="cpu").ask(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), "What?")
    assert isinstance(answer.text, str)


@pytest.mark.parametrize("wrap", ["state_dict", "module"])
def test_wrapped_state_dicts_and_wrapped_modules(files: Files, tmp_path: Path, wrap: str) -> None:
    trained = {
        key.replace("llm.model.", "llm.model._checkpoint_wrapped_module."): v for key, v in files.trained.items()
    }
    files.save({wrap: trained, "epoch": 1})
    convert_checkpoint(files.file, out=tmp_path / "out", **files.sources)
    same(tmp_path / "out", files.model)


def test_a_deepspeed_folder(files: Files, tmp_path: Path) -> None:
    shard = files.release / "iter_21000.pth.d" / "mp_rank_00_model_states.pt"
    shard.parent.mkdir()
    files.file.rename(shard)
    convert_checkpoint(files.release, out=tmp_path / "out", **files.sources)
    same(tmp_path / "out", files.model)


class Bomb:
    """Leaves a mark where it is unpickled for what it is."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_code_in_a_file_does_not_run_and_settings_are_passed_over(files: Files, tmp_path: Path) -> None:
    settings = argparse.Namespace(lr=1e-3, betas=[1, 2])
    mark = tmp_path / "mark"
    files.save({"state_dict": files.trained, "args": settings, "hook": Bomb(mark), "list": [Bomb(mark)]})
    convert_checkpoint(files.file, out=tmp_path / "out", **files.sources)
    same(tmp_path / "out", files.model)
    assert not mark.exists()
    files.save({"state_dict": {**files.trained, "more": Bomb(mark)}})
    with pytest.raises(CheckpointError, match="1 entries that are not named tensors \\(more\\)"):
        convert_checkpoint(files.file, out=tmp_path / "other", **files.sources)
    assert not mark.exists()


def test_trunks_of_timm_and_1x1_convolutions(files: Files, tmp_path: Path) -> None:
    trunk = {
        key: value[..., None, None] if "mlp.fc" in key and value.ndim == 2 else value
        for key, value in files.trunk.items()
    }
    save_file(trunk | {"head.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    result = convert_checkpoint(
        files.file, out=tmp_path / "out", **{**files.sources, "convnext": tmp_path / "model.safetensors"}
    )
    same(tmp_path / "out", files.model)
    assert result.unused["convnext"] == ("head.norm.weight",)


def test_a_file_of_stage_1_takes_the_base_language_model(files: Files, tmp_path: Path) -> None:
    files.save({key: value for key, value in files.trained.items() if not key.startswith("llm.")})
    convert_checkpoint(files.file, out=tmp_path / "out", **files.sources)
    loaded: Any = AutoModel.from_pretrained(tmp_path / "out")
    base = LlamaForCausalLM.from_pretrained(files.llm)
    assert torch.equal(loaded.language_model.lm_head.weight, base.lm_head.weight)
    assert torch.equal(loaded.fusion.slow_conv.weight, files.model.fusion.slow_conv.weight)


def test_everything_that_is_wrong_is_one_error(files: Files) -> None:
    trained = dict(files.trained)
    del trained["fuse_module.gate.0.bias"]
    trained["projector.model.2.bias"] = torch.zeros(5)
    trained["llm.more"] = torch.zeros(2)
    trained["strange.key"] = torch.zeros(2)
    trained["llm.model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    files.save(trained)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(files.file, out=None, **files.sources)
    for part in (
        "1 missing (fuse_module.gate.0.bias)",
        "2 unknown (llm.more, strange.key)",
        "projector.model.2.bias (5,) for (32,)",
        "llm.model.norm.weight torch.int64",
    ):
        assert part in str(error.value)


def test_values_that_are_not_finite_are_refused(files: Files, tmp_path: Path) -> None:
    files.trained["llm.lm_head.weight"][3, 4] = float("nan")
    files.save(files.trained)
    with pytest.raises(CheckpointError, match=r"not finite \(llm.lm_head.weight\)"):
        convert_checkpoint(files.file, out=tmp_path / "out", **files.sources)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(files: Files, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Tiny-7B.*--llm"):
        convert_checkpoint(files.file, out=None, clip=files.clip, convnext=files.convnext)
    (files.release / "iter_1.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"iter_1\.pth, iter_21000\.pth"):
        convert_checkpoint(files.release, out=None, **files.sources)
    with pytest.raises(InputError, match="there is no file or folder"):
        convert_checkpoint(tmp_path / "nothing", out=None, **files.sources)
    with pytest.raises(InputError, match="did you mean 'vicuna'"):
        convert_checkpoint(files.file, out=None, **{**files.sources, "template": "vicunna"})


def test_keys_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"2 keys are not MG-LLaVA's: query_tokens, t5_proj.bias"):
        convert_state_dict({"query_tokens": torch.ones(1), "t5_proj.bias": torch.ones(1)})


def test_the_command_line(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--llm", str(files.llm), "--clip", str(files.clip), "--convnext", str(files.convnext)]
    with pytest.raises(SystemExit) as ended:
        main(
            ["convert", "mg_llava", str(files.release), *options, "--template", "vicuna", "--out", str(tmp_path / "o")]
        )
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "conv_gate, objects concat, 4 tokens an image, 16 and 64 px, template vicuna" in out
    assert "not used of convnext: 6 tensors" in out
    same(tmp_path / "o", files.model)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "mg_llava", str(files.release), *options])
    assert ended.value.code == 2
    assert "--out is missing" in capsys.readouterr().err
