"""The network: sizes, shapes, the reach and direction of its state, streaming, precision, transformers' conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

import foveate
from foveate.errors import InputError
from foveate.methods.vision_gru.configuration import VARIANTS, VisionGRUConfig
from foveate.methods.vision_gru.modeling import (
    Block,
    MinGRU,
    VisionGRUBackbone,
    VisionGRUForImageClassification,
    VisionGRUModel,
    build_upernet,
)

PYRAMID = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    foveate.register()


def tiny(**settings: Any) -> VisionGRUConfig:
    return VisionGRUConfig(**{"dim": 8, "depths": [1, 1, 2, 1], "num_labels": 5, **settings})


@pytest.mark.parametrize(
    ("variant", "parameters", "without_head", "gmacs"),
    [("vision_gru_tiny", 30_216_952, 29_639_952, 4.87), ("vision_gru_base", 86_907_352, 86_074_352, 14.90)],
)
def test_published_sizes(variant: str, parameters: int, without_head: int, gmacs: float) -> None:
    config = VisionGRUConfig(num_labels=1000, **VARIANTS[variant])
    with torch.device("meta"):
        model = VisionGRUForImageClassification(config)
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert sum(value.numel() for value in model.vision_gru.parameters()) == without_head
    assert config.macs(224, 224) / 1e9 == pytest.approx(gmacs, abs=0.006)
    assert config.macs(448, 448) == pytest.approx(4 * config.macs(224, 224), rel=1e-6)


def test_norms_have_the_epsilons_of_the_released_code() -> None:
    for name, module in VisionGRUModel(tiny()).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if ".layers." in name else 1e-6), name


@pytest.mark.parametrize("size", [(32, 32), (45, 37), (1, 1), (2, 3), (33, 64), (1, 90)])
def test_any_size_gives_the_pyramid_of_rounded_up_sides(size: tuple[int, int]) -> None:
    backbone = VisionGRUBackbone(tiny(out_features=["stem", *PYRAMID])).eval()
    assert backbone.channels == [8, 8, 16, 32, 64]
    maps = backbone(torch.randn(2, 3, *size)).feature_maps
    sides = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 4, 8, 16, 32)]
    assert [tuple(m.shape) for m in maps] == [
        (2, width, *side) for width, side in zip(backbone.channels, sides, strict=True)
    ]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("expansion", [1.0, 2.0])
@pytest.mark.parametrize("side", [2, 5])
def test_a_block_is_what_its_units_say(side: int, expansion: float) -> None:
    """Fewer tokens than channels, and more: both ways of doing the two runs at once are the runs one by one."""
    block = Block(8, tiny(expansion=expansion)).double()
    x = torch.randn(1, side * side, 8, dtype=torch.float64)
    image = block.norm(x).view(1, side, side, 8).permute(0, 3, 1, 2)
    near = block.dw_conv(image).flatten(2).transpose(1, 2)
    far = x + block.min_gru_1(near)[0] + block.min_gru_2(near, reverse=True)[0]
    wanted = far + block.projection2(nn.functional.gelu(block.projection1(block.norm2(far))))
    assert torch.allclose(block(x, (side, side)), wanted, rtol=0, atol=1e-12)


def test_padding_of_odd_sides_is_zeros_below_and_right() -> None:
    """An image whose sides no stride divides is that image on a larger canvas of zeros, as far as convolutions see."""
    model = VisionGRUModel(tiny()).eval()
    image = torch.randn(1, 3, 13, 10)
    canvas = torch.zeros(1, 3, 16, 12)
    canvas[:, :, :13, :10] = image
    tokens, size = model.tokenizer(image)
    on_canvas, _ = model.tokenizer(canvas)
    assert size == (4, 3)
    inside = on_canvas.view(1, 4, 3, 8)[:, :3, :2]  # the last row and column see where the canvas goes on
    torch.testing.assert_close(tokens.view(1, 4, 3, 8)[:, :3, :2], inside)


def test_state_runs_over_row_ends_through_the_whole_map() -> None:
    config = tiny()
    block = Block(8, config).double().eval()
    nn.init.zeros_(block.dw_conv.weight)
    with torch.no_grad():
        block.dw_conv.weight[:, 0, 1, 1] = 1  # nothing but the scan mixes pixels
    x = torch.randn(1, 3 * 4, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] = torch.randn(8, dtype=torch.float64)  # the last pixel of the first row
    for silent, reached in ((block.min_gru_2, range(3, 12)), (block.min_gru_1, range(4))):
        keep = silent.to_out.weight.detach().clone()  # type: ignore[union-attr]
        nn.init.zeros_(silent.to_out.weight)  # type: ignore[union-attr,arg-type]
        difference = (block(changed, (3, 4)) - block(x, (3, 4))).abs().amax((0, 2))
        assert [k for k in range(12) if difference[k] > 1e-12] == list(reached)
        with torch.no_grad():
            silent.to_out.weight.copy_(keep)  # type: ignore[union-attr]


def test_turning_the_image_swaps_the_directions() -> None:
    block = Block(6, tiny()).eval()
    turned = Block(6, tiny()).eval()
    turned.load_state_dict(block.state_dict())
    turned.min_gru_1.load_state_dict(block.min_gru_2.state_dict())
    turned.min_gru_2.load_state_dict(block.min_gru_1.state_dict())
    with torch.no_grad():
        turned.dw_conv.weight.copy_(block.dw_conv.weight.flip(2, 3))
    x = torch.randn(2, 4 * 7, 6)
    torch.testing.assert_close(turned(x.flip(1), (4, 7)).flip(1), block(x, (4, 7)))


def test_ablations_have_the_same_size_and_another_reach() -> None:
    whole = sum(value.numel() for value in Block(8, tiny()).parameters())
    reached = {}
    for mixer, extra in (("forward", 0), ("local", 7 * 8)):  # the feed-forward has biases, 6 d and d
        block = Block(8, tiny(mixer=mixer)).double().eval()
        assert sum(value.numel() for value in block.parameters()) == whole + extra
        x = torch.randn(1, 5 * 6, 8, dtype=torch.float64)
        changed = x.clone()
        changed[:, 14] = torch.randn(8, dtype=torch.float64)  # row 2, column 2
        difference = (block(changed, (5, 6)) - block(x, (5, 6))).abs().amax((0, 2))
        reached[mixer] = [k for k in range(30) if difference[k] > 1e-12]
    near = [row * 6 + column for row in (1, 2, 3) for column in (1, 2, 3)]
    assert reached == {"local": near, "forward": list(range(7, 30))}


def test_unit_by_hand() -> None:
    unit = MinGRU(1)
    with torch.no_grad():
        unit.to_hidden_and_gate.weight.copy_(torch.tensor([[1.0], [2.0], [0.0], [0.0]]))  # p1, p2, gates 1/2
        unit.to_out.weight.copy_(torch.tensor([[1.0, 10.0]]))  # type: ignore[union-attr]
    y, last = unit(torch.tensor([[[1.0], [2.0]]]))
    # g(1) = 1.5, g(2) = 2.5 and g(4) = 4.5: h = (0.75, 1.25), then (0.375 + 1.25, 0.625 + 2.25)
    assert y.flatten().tolist() == pytest.approx([0.75 + 12.5, 1.625 + 28.75])
    assert last.flatten().tolist() == pytest.approx([1.625, 2.875])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"expansion": 1.0},
        {"candidate": "linear"},
        {"position_embedding": "sincos2d"},
        {"mixer": "forward"},
        {"mixer": "local"},
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (37, 91), (5, 300)])
def test_streaming_is_exact(settings: dict[str, Any], size: tuple[int, int]) -> None:
    model = VisionGRUModel(tiny(**settings)).eval()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole = model(image, output_hidden_states=True).hidden_states
        model.config.stream_above = 0
        for tokens in (1, 7, 50):
            model.config.stream_tokens = tokens
            for streamed, plain in zip(model(image, output_hidden_states=True).hidden_states, whole, strict=True):
                torch.testing.assert_close(streamed, plain, rtol=1e-5, atol=1e-5)
    assert all(part.config is model.config for part in model.modules() if isinstance(part, Block))


def test_streaming_is_not_for_training() -> None:
    model = VisionGRUModel(tiny(stream_above=0))
    model(torch.randn(1, 3, 40, 40)).pooler_output.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = VisionGRUForImageClassification(tiny()).train()
    image, labels = torch.randn(2, 3, 40, 40), torch.tensor([1, 3])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(image, labels=labels).loss.backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_loss_of_soft_labels_is_their_divergence() -> None:
    model = VisionGRUForImageClassification(tiny()).eval()
    image = torch.randn(2, 3, 32, 32)
    logits = model(image).logits
    targets = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    entropy = -(0.5 * torch.tensor(0.5).log() * 2)
    wanted = (-(targets * logits.log_softmax(1)).sum() - entropy) / 2
    torch.testing.assert_close(model(image, labels=targets).loss, wanted)
    hard = -logits.log_softmax(1)[[0, 1], [2, 4]].mean()
    torch.testing.assert_close(model(image, labels=torch.tensor([2, 4])).loss, hard)


def test_half_precision_stays_near() -> None:
    """The log-space form is off by 14 % here; float32 states inside a bfloat16 network are what avoids it (2.6)."""
    model = VisionGRUModel(tiny(dim=24)).eval()
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        wanted = model(image).pooler_output
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(image).pooler_output
        half = model.bfloat16()(image.bfloat16()).pooler_output
    for found in (mixed, half):
        assert ((found.float() - wanted).abs().max() / wanted.abs().max()) < 0.03


def test_transformers_conventions(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 40, 33)
    classifier = VisionGRUForImageClassification(tiny()).eval()
    classifier.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).depths == [1, 1, 2, 1]
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(image).logits, classifier(image).logits)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(body, VisionGRUModel)
    torch.testing.assert_close(body(image).pooler_output, classifier.vision_gru(image).pooler_output)
    # AutoBackbone.from_pretrained of this transformers takes repositories of the hub only.
    assert isinstance(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path)), VisionGRUBackbone)
    backbone = VisionGRUBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage4"]).eval()
    assert backbone.channels == [16, 64]
    hidden = classifier(image, output_hidden_states=True).hidden_states
    for found, wanted in zip(backbone(image).feature_maps, (hidden[2], hidden[4]), strict=True):
        torch.testing.assert_close(found, wanted)
    assert isinstance(classifier(image, return_dict=False), tuple)


def test_initialisation_is_pytorchs() -> None:
    model = VisionGRUForImageClassification(tiny(dim=32))
    weight = model.vision_gru.snake_gru.layers[0][0].projection1.weight  # type: ignore[index,union-attr]
    bound = 1 / 32**0.5  # kaiming-uniform with a = sqrt(5)
    assert isinstance(weight, Tensor)
    assert 0.95 * bound < weight.abs().max() <= bound


def test_upernet_takes_our_backbone(tmp_path: Path) -> None:
    model = build_upernet(tiny(), num_labels=7, hidden_size=16, auxiliary_channels=8).eval()
    assert model.auxiliary_head is not None
    image = torch.randn(2, 3, 50, 70)
    output = model(image, labels=torch.randint(0, 7, (2, 50, 70)))
    assert output.logits.shape == (2, 7, 50, 70)
    assert output.loss.isfinite()
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(image).logits, model(image).logits)
    seen: list[float] = []
    model.decode_head.classifier.register_forward_pre_hook(
        lambda _, inputs: seen.append(float((inputs[0].abs().amax((2, 3)) == 0).float().mean()))
    )
    torch.testing.assert_close(model(image).logits, again(image).logits)
    for module in model.modules():  # dropout alone, without the statistics of the batch
        module.training = not isinstance(module, nn.BatchNorm2d)
    many = [model(image) and seen[-1] for _ in range(20)]
    assert 0.03 < sum(many) / 20 - seen[0] < 0.2


def test_published_segmentor_has_its_size() -> None:
    with torch.device("meta"):
        model = build_upernet(VisionGRUConfig())
    head = sum(value.numel() for value in model.decode_head.parameters())
    assert head == pytest.approx(30.13e6, rel=1e-3)
    body = sum(value.numel() for value in model.backbone.parameters())
    assert (head + body) / 1e6 == pytest.approx(59.8, abs=0.1)


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (torch.zeros(1, 4, 8, 8), r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 0, 8), "at least one pixel"),
    ],
)
def test_bad_images(pixels: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        VisionGRUModel(tiny())(pixels)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dim": 7}, "dim must be even"),
        ({"dim": True}, "dim must be a whole number"),
        ({"depths": [1, 2, 3]}, "depths must be"),
        ({"depths": [1, 0, 1, 1]}, "depths must be"),
        ({"expansion": 0}, "expansion must be"),
        ({"candidate": "tanh"}, "candidate must be one of g, linear"),
        ({"position_embedding": "rope"}, "position_embedding must be"),
        ({"stream_tokens": 0}, "stream_tokens must be"),
        ({"out_features": ["stage9"]}, "out_features"),
    ],
)
def test_bad_configurations(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny(**settings)
