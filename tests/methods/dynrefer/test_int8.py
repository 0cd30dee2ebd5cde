"""Linear layers in int8 that quantise what they read: the formula, its error, and where they stand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import foveate
from foveate.errors import InputError
from foveate.methods.dynrefer.int8 import Int8Linear, check_quantize, quantize_linears
from foveate.methods.dynrefer.predictor import DynReferPredictor

BOXES = [[20, 10, 50, 30], [50, 40, 95, 75], [5.5, 6.25, 18, 70], [0, 0, 96, 80]]


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


class TestInt8Linear:
    def test_by_hand(self) -> None:
        """Scales 1 and 2 of the columns (largest 127 and 254), 1 and 0.1 of the rows (largest 63 and 6.3)."""
        layer = linear(2, 2)
        layer.weight.copy_(torch.tensor([[127.0, -3.0], [254.0, 5.0]]))
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
        x = torch.tensor([[63.0, 10.2], [-6.3, 0.44]])
        # Rounded: rows [63, 10] and [-63, 4], columns [127, -3] and [127, 2 (2.5 to even)].
        expected = torch.tensor(
            [
                [63 * 127 - 10 * 3 + 0.5, 2 * (63 * 127 + 10 * 2) - 1],
                [0.1 * (-63 * 127 - 4 * 3) + 0.5, 0.2 * (-63 * 127 + 4 * 2) - 1],
            ]
        )
        torch.testing.assert_close(Int8Linear(layer)(x), expected, rtol=1e-5, atol=1e-3)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9), st.booleans(), st.integers(0, 2**16))
    def test_formula(self, inputs: int, outputs: int, rows: int, bias: bool, seed: int) -> None:
        """Against the same integers in float64, for any sizes; within the error that rounding can make."""
        layer = linear(inputs, outputs, seed, bias)
        x = torch.randn(rows, inputs) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
        row, column = x.abs().amax(dim=1, keepdim=True) / 63, layer.weight.abs().amax(dim=1) / 127
        # In float32 as there, for in float64 some value may lie on the other side of a half.
        levels = (x * row.reciprocal() + 64.5).floor() - 64
        whole = levels.double() @ (layer.weight / column[:, None]).round().double().T
        expected = whole * row.double() * column.double() + (0 if layer.bias is None else layer.bias.double())
        found = Int8Linear(layer)(x)
        assert found.shape == (rows, outputs)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(x.abs().sum() + 1))
        exact = layer(x)
        largest = row * layer.weight.abs().sum(dim=1) * 0.51 + column * 0.51 * x.abs().sum(dim=1, keepdim=True)
        assert ((found - exact).abs() <= largest * 1.02 + 1e-5).all()

    def test_rows_do_not_see_each_other(self) -> None:
        """An outlier costs its own row its precision, and no other; alone or with others a row has one answer."""
        quantized = Int8Linear(linear(96, 40))
        x = torch.randn(5, 96)
        wild = x.clone()
        wild[2] *= 1e6
        assert torch.equal(quantized(wild)[[0, 1, 3, 4]], quantized(x)[[0, 1, 3, 4]])
        assert torch.equal(quantized(x[3:4])[0], quantized(x)[3])

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_largest_sums_do_not_saturate(self, sign: float) -> None:
        """All products as large as they get: 16-bit sums of pairs would be cut off with 8 bits of activations."""
        layer = linear(512, 8, bias=False)
        layer.weight.fill_(sign)
        layer.weight[::2] *= -1
        x = torch.ones(3, 512)
        x[1] = -1
        torch.testing.assert_close(Int8Linear(layer)(x), layer(x))

    def test_zeros_shapes_and_types(self) -> None:
        layer = linear(32, 16)
        quantized = Int8Linear(layer)
        torch.testing.assert_close(quantized(torch.zeros(2, 32)), layer.bias.expand(2, -1))
        assert quantized(torch.randn(0, 32)).shape == (0, 16)
        assert quantized(torch.randn(32)).shape == (16,)
        x = torch.randn(2, 3, 32)
        assert torch.equal(quantized(x)[1], quantized(x[1]))
        assert quantized(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(quantized(x.transpose(0, 1)).transpose(0, 1), quantized(x))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_rows_stay_so(self, value: float) -> None:
        quantized, x = Int8Linear(linear(32, 16)), torch.randn(3, 32)
        x[1, 5] = value
        found = quantized(x)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()

    def test_it_is_not_saved(self) -> None:
        model = nn.Sequential(Int8Linear(linear(8, 8)))
        with pytest.raises(InputError, match="in int8 cannot be saved"):
            model.state_dict()


@pytest.fixture(scope="module")
def wide(make_model: Any) -> Any:
    """A tiny model with some layers of a size that int8 is for: 128 x 512 and larger."""
    vision = {"model_type": "blip_2_vision_model", "hidden_size": 128, "intermediate_size": 512}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = make_model(vision_config=vision, align_groups=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith(("vision_tower", "cvem")):
                parameter.mul_(0.3)
    return model


class TestModel:
    def test_which_layers(self, wide: Any) -> None:
        model = copy.deepcopy(wide)
        # Both layers of the MLP of both blocks; attention has 128 x 384, the fusion 384 x 128 weights.
        assert quantize_linears(model) == 4
        blocks = model.vision_tower.model.encoder.layers
        assert all(isinstance(part, Int8Linear) for block in blocks for part in (block.mlp.fc1, block.mlp.fc2))
        assert type(model.t5_proj) is nn.Linear
        assert not any(isinstance(part, Int8Linear) for part in model.text_encoder.modules())
        assert quantize_linears(model) == 0

    def test_answers_change_a_little(self, wide: Any, processor: Any, photo: Image.Image) -> None:
        exact = DynReferPredictor(wide, processor)(photo, boxes=BOXES, tasks="attributes")
        model = copy.deepcopy(wide)
        quantize_linears(model)
        describer = DynReferPredictor(model, processor)
        rough = describer(photo, boxes=BOXES, tasks="attributes")
        differences = [
            abs(a.attribute_scores[name] - b.attribute_scores[name])  # pyright: ignore[reportAttributeAccessIssue]
            for a, b in zip(exact, rough, strict=True)
            for name in a.attribute_scores  # pyright: ignore[reportAttributeAccessIssue]
        ]
        assert 0 < max(differences) < 0.1
        alone: Any = describer(photo, boxes=BOXES[1:2], tasks="attributes")[0]
        together: Any = rough[1]
        assert alone.attribute_scores == pytest.approx(together.attribute_scores, abs=1e-5)

    def test_load(self, wide: Any, processor: Any, tmp_path: Path) -> None:
        wide.save_pretrained(tmp_path / "wide")
        processor.save_pretrained(tmp_path / "wide")
        describer = foveate.load(tmp_path / "wide", device="cpu", quantize="int8")
        assert sum(isinstance(part, Int8Linear) for part in describer.model.modules()) == 4
        with pytest.raises(InputError, match="there is no quantisation 'int4'"):
            foveate.load(tmp_path / "wide", device="cpu", quantize="int4")

    def test_a_gpu_is_told_what_to_do(self) -> None:
        with pytest.raises(InputError, match=r"are for CPUs, not for cuda:0: on a GPU leave quantize out"):
            check_quantize("int8", torch.device("cuda:0"))
        check_quantize("int8", torch.device("cpu"))
