from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.modeling_vit import ViTModel

from foveate.errors import CheckpointError, InputError
from foveate.vision.towers import VisionTower, load_tower

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BUILD = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**{**SIZES, "mlp_ratio": 2})),
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**SIZES)),
}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Every weight random, norms included: a tower that forgets one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1) * 0.5)
    if isinstance(model, Blip2VisionModel):
        model.post_layernorm.eps = 1e-5
    return model.eval()


def pixels(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=BUILD)
def plain(request: pytest.FixtureRequest) -> Any:
    return randomised(BUILD[request.param]())


class TestOutputs:
    def test_every_layer_equals_the_hidden_states(self, plain: Any, tmp_path: Path) -> None:
        plain.save_pretrained(tmp_path)
        tower = load_tower(tmp_path)
        with torch.no_grad():
            expected = plain(pixels(), output_hidden_states=True)
        assert len(expected.hidden_states) == 4
        layers = (2, 0, -1, 1, 3, -2, -4, "last_hidden_state")
        output = tower(pixels(), layers=layers)
        assert output.grid == (4, 4)
        for layer, found in zip(layers, output.layers, strict=True):
            reference = expected.last_hidden_state if isinstance(layer, str) else expected.hidden_states[layer]
            torch.testing.assert_close(found.hidden_states, reference, rtol=1e-6, atol=1e-6)
            first = 0 if isinstance(plain, SiglipVisionModel) else 1
            torch.testing.assert_close(found.patch_tokens, reference[:, first:], rtol=1e-6, atol=1e-6)
            assert found.patch_tokens.shape == (2, 16, 24)
            if first == 0:
                assert found.cls is None
            else:
                assert found.cls is not None
                torch.testing.assert_close(found.cls, reference[:, 0], rtol=1e-6, atol=1e-6)
        default = tower(pixels())
        assert torch.equal(default.patch_tokens, output.layers[2].patch_tokens)
        assert torch.equal(default.hidden_states, output.layers[2].hidden_states)

    def test_shortcuts_refuse_several_layers(self, plain: Any) -> None:
        output = load_tower(plain)(pixels(), layers=(1, 2))
        for name in ("patch_tokens", "cls", "hidden_states"):
            with pytest.raises(InputError, match="2 layers"):
                getattr(output, name)

    def test_blocks_past_the_deepest_layer_do_not_run(self, plain: Any) -> None:
        tower = load_tower(plain)
        ran: list[int] = []
        for index, block in enumerate(tower._family.blocks(plain)):
            block.register_forward_hook(lambda *_, index=index: ran.append(index))
        full = tower(pixels(), layers=(1, 3))
        assert ran == [0, 1, 2]
        ran.clear()
        early = tower(pixels(), layers=(0, 1))
        assert ran == [0]
        assert torch.equal(early.layers[1].hidden_states, full.layers[0].hidden_states)
        ran.clear()
        tower(pixels(), layers=(0,))
        assert ran == []

    def test_interpolation(self, plain: Any) -> None:
        tower = load_tower(plain)
        images = pixels(1, 48, 24)
        kwargs = {} if isinstance(plain, Dinov2Model) else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            expected = plain(images, **kwargs).last_hidden_state
        output = tower(images, layers=("last_hidden_state",), interpolate=True)
        assert output.grid == (6, 3)
        torch.testing.assert_close(output.hidden_states, expected, rtol=1e-6, atol=1e-6)
        native = tower(pixels(), interpolate=True)
        assert torch.equal(native.hidden_states, tower(pixels()).hidden_states)
        with pytest.raises(InputError, match=r"48x24 \(height x width\) but this tower takes 32x32; resize"):
            tower(images)
        with pytest.raises(InputError, match="height 44, which is not a whole number of 8-pixel patches"):
            tower(pixels(1, 44, 24), interpolate=True)
        with pytest.raises(InputError, match="width 0"):
            tower(torch.zeros(1, 3, 32, 0), interpolate=True)

    def test_native_size_with_a_remainder(self) -> None:
        """SigLIP so400m-patch14-384: 384 = 27 * 14 + 6, and the checkpoint cuts the 6 off."""
        plain = randomised(SiglipVisionModel(SiglipVisionConfig(**{**SIZES, "image_size": 30})))
        output = load_tower(plain)(pixels(1, 30, 30), layers=("last_hidden_state",))
        assert output.grid == (3, 3)
        torch.testing.assert_close(output.patch_tokens, plain(pixels(1, 30, 30)).last_hidden_state)

    @pytest.mark.parametrize("layers", [(4,), (-5,), (), -1, "last_hidden_state", (True,), (1.0,), ("last",), (None,)])
    def test_layers_that_do_not_exist(self, layers: Any) -> None:
        with pytest.raises(InputError, match="layer"):
            load_tower(BUILD["vit"]())(pixels(), layers=layers)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(3, 32, 32), r"\(B, 3, H, W\), got \(3, 32, 32\)"),
            (torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\)"),
            (torch.zeros(1, 32, 32, 3), r"got \(1, 32, 32, 3\)"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "must be float.*uint8"),
            (torch.zeros(0, 3, 32, 32), "no image"),
            ([[1.0]], "got list"),
        ],
    )
    def test_bad_pixel_values(self, images: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_tower(BUILD["clip"]())(images)


class TestFreezing:
    class Parent(nn.Module):
        def __init__(self, tower: VisionTower) -> None:
            super().__init__()
            self.tower = tower
            self.head = nn.Linear(24, 1)

    def test_frozen_stays_frozen_under_its_parent(self, tmp_path: Path) -> None:
        dropout = ViTModel(ViTConfig(**SIZES, hidden_dropout_prob=0.5))
        dropout.save_pretrained(tmp_path)
        tower = load_tower(tmp_path)
        parent = self.Parent(tower).train()
        assert parent.training
        assert not any(module.training for module in tower.modules())
        assert not any(parameter.requires_grad for parameter in tower.parameters())
        images = pixels().requires_grad_()
        output = tower(images)
        assert not output.patch_tokens.requires_grad
        assert torch.equal(output.patch_tokens, tower(images).patch_tokens)
        parent.head(output.patch_tokens).sum().backward()
        assert parent.head.weight.grad is not None
        assert images.grad is None

    def test_unfrozen_trains(self, tmp_path: Path) -> None:
        ViTModel(ViTConfig(**SIZES, hidden_dropout_prob=0.5)).save_pretrained(tmp_path)
        tower = load_tower(tmp_path, freeze=False)
        parent = self.Parent(tower).train()
        assert tower.model.training
        output = tower(pixels())
        assert not torch.equal(output.patch_tokens, tower(pixels()).patch_tokens)
        parent.head(output.patch_tokens).sum().backward()
        assert all(block.mlp.fc1.weight.grad is not None for block in tower.model.layers)  # type: ignore[union-attr]
        assert not parent.eval().tower.model.training


class TestLoading:
    def test_attributes(self, plain: Any, tmp_path: Path) -> None:
        plain.save_pretrained(tmp_path)
        tower = load_tower(tmp_path)
        assert (tower.width, tower.num_layers, tower.patch_size, tower.image_size) == (24, 3, 8, 32)
        assert tower.has_cls is not isinstance(plain, SiglipVisionModel)
        assert tower.model.config._attn_implementation == "sdpa"
        assert tower.dtype == torch.float32

    def test_dtype(self, plain: Any, tmp_path: Path) -> None:
        plain.to(torch.bfloat16).save_pretrained(tmp_path)
        stored = load_tower(tmp_path)
        assert stored.dtype == torch.bfloat16
        assert stored(pixels()).patch_tokens.dtype == torch.bfloat16
        assert load_tower(tmp_path, dtype=torch.float32)(pixels()).patch_tokens.dtype == torch.float32
        assert load_tower(plain, dtype=torch.float16).dtype == torch.float16

    @pytest.mark.parametrize("kind", ["clip", "siglip", "blip-2", "vit"])
    def test_whole_checkpoint_gives_its_vision_part(self, kind: str, tmp_path: Path) -> None:
        vision = dict(SIZES)
        whole: Any = {
            "clip": lambda: CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8)),
            "siglip": lambda: SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT)),
            "blip-2": lambda: Blip2ForConditionalGeneration(
                Blip2Config(
                    vision_config=vision,
                    qformer_config={**TEXT, "encoder_hidden_size": 24},
                    text_config={"model_type": "t5", "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
                    | {"d_kv": 8, "vocab_size": 50},
                )
            ),
            "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
        }[kind]()
        part = randomised(whole.vit if kind == "vit" else whole.vision_model)
        whole.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
        expected = part(pixels()).last_hidden_state
        for tower in (load_tower(tmp_path), load_tower(whole)):
            assert type(tower.model) is type(part)
            output = tower(pixels(), layers=("last_hidden_state",))
            torch.testing.assert_close(output.hidden_states, expected, rtol=1e-6, atol=1e-6)

    def test_vision_checkpoint_of_transformers_4(self, tmp_path: Path) -> None:
        """Folders on the hub were saved with a `vision_model.` prefix."""
        plain = randomised(BUILD["clip"]())
        plain.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        expected = plain(pixels()).last_hidden_state
        torch.testing.assert_close(load_tower(tmp_path)(pixels()).hidden_states, expected, rtol=1e-6, atol=1e-6)

    def test_blip2_norm_has_the_eps_it_was_trained_with(self, tmp_path: Path) -> None:
        plain = Blip2VisionModel(Blip2VisionConfig(**SIZES))
        with torch.no_grad():
            plain.embeddings.patch_embedding.weight.mul_(1e-3)
            plain.embeddings.position_embedding.zero_()
        plain.save_pretrained(tmp_path)
        output = load_tower(tmp_path)(pixels() * 1e-2, layers=(-1, "last_hidden_state"))
        raw, normed = (layer.hidden_states for layer in output.layers)
        centred = raw - raw.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        torch.testing.assert_close(normed, centred / (variance + 1e-5).sqrt())
        assert not torch.allclose(normed, centred / (variance + 1e-6).sqrt(), rtol=1e-3)

    def test_normalisation(self, tmp_path: Path) -> None:
        assert load_tower(BUILD["dinov2"]()).mean == (0.485, 0.456, 0.406)
        assert load_tower(BUILD["siglip"]()).std == (0.5, 0.5, 0.5)
        BUILD["clip"]().save_pretrained(tmp_path)
        assert load_tower(tmp_path).mean == (0.48145466, 0.4578275, 0.40821073)
        processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
        assert load_tower(tmp_path).std == (0.4, 0.5, 0.6)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.7, 0.8, 0.9]}))
        assert load_tower(tmp_path).mean == (0.7, 0.8, 0.9)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.7, "x"]}))
        with pytest.raises(CheckpointError, match="image_mean must be three numbers"):
            load_tower(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text("{")
        with pytest.raises(CheckpointError, match="not a valid processor file"):
            load_tower(tmp_path)


class TestRefusals:
    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            load_tower(tmp_path)
        (tmp_path / "config.json").write_text("{nonsense")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_tower(tmp_path)
        with pytest.raises(InputError, match="got int"):
            load_tower(3)  # type: ignore[arg-type]

    def test_another_architecture(self, tmp_path: Path) -> None:
        bert = BertModel(BertConfig(**TEXT))
        bert.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="model_type 'bert'; a tower needs CLIP"):
            load_tower(tmp_path)
        with pytest.raises(CheckpointError, match="BertModel has no vision tower"):
            load_tower(bert)
        with pytest.raises(CheckpointError, match=r"patch_size is .*only square"):
            load_tower(ViTModel(ViTConfig(**{**SIZES, "patch_size": [8, 16]})))

    def test_damaged_weights(self, tmp_path: Path) -> None:
        BUILD["vit"]().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        dropped = next(key for key in tensors if "layernorm.weight" in key)
        save_file({key: value for key, value in tensors.items() if key != dropped}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks 1 tensors of ViTModel .*layernorm\.weight"):
            load_tower(tmp_path)
        save_file({**tensors, dropped: torch.zeros(7)}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"cannot be loaded|another shape"):
            load_tower(tmp_path)
        save_file(tensors, file, metadata={"format": "pt"})
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_tower(tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_tower(tmp_path)
