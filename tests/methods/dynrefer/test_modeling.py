"""The network in miniature: what is frozen, what reaches what, and what a checkpoint must hold."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.conversion import convert_state_dict, load_converted
from foveate.methods.dynrefer.modeling import DynReferModel, PairConv2d, group_maximum
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor, control_text

Build = Callable[..., DynReferModel]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BOXES = torch.tensor(
    [[[0, 0, 56, 56], [10, 12, 40, 50], [20, 22, 33, 40]], [[0, 0, 55, 56], [5, 0, 30, 56], [9, 9, 12, 50]]]
)
BOXES = BOXES.float()


@pytest.fixture
def tokens(tiny_model: DynReferModel) -> Tensor:
    """(R * n, 1 + 16, C) of two regions and three views."""
    with torch.no_grad():
        return tiny_model.encode_views(draw(6, 3, 56, 56))


def batch(model: DynReferModel, processor: DynReferProcessor) -> dict[str, Any]:
    """Everything that `forward` takes, for two regions."""
    control = processor.language_ids([control_text(["red", "car"]), control_text([])])
    caption = processor.language_ids(["red car", "a small striped dog"])
    text = processor.text_ids(["red car", "a small striped dog"])
    return {
        "pixel_values": draw(6, 3, 56, 56, seed=1),
        "region_boxes": BOXES,
        "tag_embeds": model.encode_text(*processor.text_ids(processor.vocabulary.tags)),
        "tag_targets": torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1]]),
        "prompt_embeds": model.encode_text(*processor.text_ids(processor.vocabulary.prompts)),
        "prompt_labels": torch.tensor([[1, 1, 0, 0, -1, -1], [0, 0, 1, 1, 1, 1]]),
        "control_ids": control[0],
        "control_mask": control[1],
        "caption_ids": caption[0],
        "caption_mask": caption[1],
        "caption_text_ids": text[0],
        "caption_text_mask": text[1],
    }


class TestAlign:
    def test_starts_as_its_bias(self, make_model: Build) -> None:
        """All weights are zero, so a context view gives nothing but the bias of the output projection."""
        module = make_model(fresh=True).cvem_align
        assert module.offset_mask.weight.abs().sum() == 0
        with torch.no_grad():
            module.output_proj.bias.copy_(draw(32))
            out = module(draw(2, 32, 4, 4), draw(2, 32, 4, 4, seed=1))
        assert out.shape == (2, 32, 4, 4)
        assert torch.equal(out, module.output_proj.bias[None, :, None, None].expand_as(out))

    def test_shapes_of_the_official_layer(self, tiny_model: DynReferModel) -> None:
        module = tiny_model.cvem_align
        assert module.offset_mask_dw.weight.shape == (32, 2, 3, 3)
        assert module.offset_mask.weight.shape == (112, 32)  # 3 * 4 * 9 = 108, padded to a multiple of 8

    def test_offsets_come_from_both_views(self, tiny_model: DynReferModel) -> None:
        """The first half of the offset channels sees the context view alone, the second half the reference alone."""
        module = tiny_model.cvem_align
        seen: list[Tensor] = []
        handle = module.offset_mask_dw.register_forward_hook(lambda *args: seen.append(args[2]))
        first, second, third = (draw(1, 32, 4, 4, seed=seed) for seed in range(3))
        with torch.no_grad():
            module(first, second)
            module(third, second)
            module(first, third)
        handle.remove()
        assert torch.equal(seen[0][:, :16], seen[1][:, :16])
        assert not torch.equal(seen[0][:, 16:], seen[1][:, 16:])
        assert torch.equal(seen[0][:, 16:], seen[2][:, 16:])
        assert not torch.equal(seen[0][:, :16], seen[2][:, :16])

    @pytest.mark.parametrize("channels", [3, 8])
    def test_pairs_are_convolved_as_groups_of_two(self, channels: int) -> None:
        torch.manual_seed(0)
        module = PairConv2d(2 * channels, channels, 3, padding=1, groups=channels)
        plain = torch.nn.Conv2d(2 * channels, channels, 3, padding=1, groups=channels)
        plain.load_state_dict(module.state_dict())
        x = draw(2, 2 * channels, 5, 4)
        torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)
        for layer in (module, plain):
            layer(x).square().sum().backward()
        torch.testing.assert_close(module.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(module.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-4)  # pyright: ignore

    def test_switched_off_features_pass_as_they_are(self, make_model: Build) -> None:
        features = draw(2, 3, 32, 4, 4)
        model = make_model(align=False)
        assert not any("align" in name for name, _ in model.named_parameters())
        assert model.align_views(features) is features

    def test_the_region_view_is_not_resampled(self, tiny_model: DynReferModel) -> None:
        features = draw(2, 3, 32, 4, 4)
        with torch.no_grad():
            aligned = tiny_model.align_views(features)
            assert torch.equal(aligned[:, 0], features[:, 0])
            for view in (1, 2):
                alone = tiny_model.cvem_align(features[:, 0], features[:, view])
                torch.testing.assert_close(aligned[:, view], alone, rtol=1e-5, atol=1e-5)


class TestRegionEncoder:
    def test_tokens(self, tiny_model: DynReferModel, tokens: Tensor) -> None:
        assert tokens.shape == (6, 17, 32)
        features, cls = tiny_model.region_features(tokens, BOXES)
        assert features.shape == (2, 3, 32, 4, 4)
        assert torch.equal(cls.flatten(0, 1), tokens[:, 0])
        fused: list[Tensor] = []
        handle = tiny_model.cvem_mlp.register_forward_hook(lambda *args: fused.append(args[1][0]))
        with torch.no_grad():
            assert tiny_model.encode_regions(tokens, BOXES).shape == (2, 5, 24)
        handle.remove()
        # One token more than cells: each view keeps its own CLS, views side by side on the channels.
        assert fused[0].shape == (2, 17, 96)
        torch.testing.assert_close(fused[0][:, 0].reshape(2, 3, 32), cls)

    def test_the_region_view_is_no_identity(self, tiny_model: DynReferModel, tokens: Tensor) -> None:
        """RoI-Align without the half-pixel shift blurs even where the box is the whole view (trap 2)."""
        features, _ = tiny_model.region_features(tokens, BOXES)
        cells = tokens[0, 1:].T.reshape(32, 4, 4)
        assert (features[0, 0] - cells).abs().max() > 0.1
        # Samples at 0.25 and 0.75 of a cell: the mean of a cell and its next weighs them 0.5 each on both axes.
        weights = cells[:, :-1, :-1] + cells[:, 1:, :-1] + cells[:, :-1, 1:] + cells[:, 1:, 1:]
        torch.testing.assert_close(features[0, 0, :, :-1, :-1], weights / 4, rtol=1e-5, atol=1e-5)

    def test_the_order_of_context_views_counts(self, tiny_model: DynReferModel, tokens: Tensor) -> None:
        order = torch.tensor([0, 2, 1])
        with torch.no_grad():
            one = tiny_model.encode_regions(tokens, BOXES)
            other = tiny_model.encode_regions(tokens.unflatten(0, (2, 3))[:, order].flatten(0, 1), BOXES[:, order])
        assert (one - other).abs().max() > 1e-2

    def test_every_view_its_own_cls(self, make_model: Build, tokens: Tensor) -> None:
        model = make_model(fresh=True)  # random weights make the attention so sharp that one token in 17 is lost
        with torch.no_grad():
            before = model.encode_regions(tokens, BOXES)
            for view in range(3):
                changed = tokens.clone()
                changed[view, 0] = 5 * draw(32, seed=view)
                after = model.encode_regions(changed, BOXES)
                assert (after[0] - before[0]).abs().max() > 1e-4
                torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)

    def test_batch_equals_single(self, tiny_model: DynReferModel, tokens: Tensor) -> None:
        with torch.no_grad():
            together = tiny_model.encode_regions(tokens, BOXES)
            alone = torch.cat([tiny_model.encode_regions(tokens[3 * k : 3 * k + 3], BOXES[k : k + 1]) for k in (0, 1)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)

    def test_one_view_only(self, make_model: Build) -> None:
        model = make_model(num_views=1)
        with torch.no_grad():
            assert model.encode_regions(draw(2, 17, 32), BOXES[:, :1]).shape == (2, 5, 24)

    def test_norm_of_the_tower(self, tiny_model: DynReferModel, make_model: Build) -> None:
        norm: Any = tiny_model.vision_tower.model.post_layernorm
        assert norm.eps == 1e-5  # ln_vision; transformers builds it with 1e-6 (spec 2.2)
        inner = make_model(vision_layer=1).encode_views(draw(2, 3, 56, 56))
        torch.testing.assert_close(inner.mean(dim=-1), torch.zeros(2, 17), atol=1e-5, rtol=0)
        torch.testing.assert_close(inner.var(dim=-1, unbiased=False), torch.ones(2, 17), atol=1e-3, rtol=0)


class TestDecoders:
    def test_one_normalises_and_one_does_not(self, tiny_model: DynReferModel) -> None:
        """Scaling what a head puts out scales tag logits and leaves text logits as they are (spec 2.7)."""
        model = copy.deepcopy(tiny_model)
        queries, embeds = draw(2, 5, 24), draw(7, 12, seed=1)
        with torch.no_grad():
            tags, texts = model.tag_logits(queries, embeds), model.text_logits(queries, embeds)
            for head in (model.tag_head, model.attr_head):
                last: Any = head.encoder["layer"][-1].output["LayerNorm"]  # pyright: ignore
                last.weight *= 10
                last.bias *= 10
            bias = model.get_parameter("tag_fc.bias")
            torch.testing.assert_close(model.tag_logits(queries, embeds) - bias, 10 * (tags - bias))
            torch.testing.assert_close(model.text_logits(queries, embeds), texts)
        assert tags.shape == texts.shape == (2, 7)

    def test_texts_never_see_each_other(self, tiny_model: DynReferModel, monkeypatch: pytest.MonkeyPatch) -> None:
        queries, embeds = draw(2, 5, 24), draw(7, 12, seed=1)
        with torch.no_grad():
            all_at_once = tiny_model.tag_logits(queries, embeds)
            torch.testing.assert_close(tiny_model.tag_logits(queries, embeds[2:4]), all_at_once[:, 2:4])
            monkeypatch.setattr(type(tiny_model.tag_head), "chunk_size", 2)
            torch.testing.assert_close(tiny_model.tag_logits(queries, embeds), all_at_once)

    def test_temperature_stays_out_of_the_scores(self, tiny_model: DynReferModel) -> None:
        model = copy.deepcopy(tiny_model)
        queries, embeds = draw(2, 5, 24), draw(7, 12, seed=1)
        with torch.no_grad():
            before = model.text_logits(queries, embeds)
            model.attr_t.fill_(1.0)
            model.attr_b.fill_(3.0)
            assert torch.equal(model.text_logits(queries, embeds), before)
            torch.testing.assert_close(model.contrast_logits(before), math.e * before + 3)

    def test_memory_is_added_to_control_words_only(
        self, tiny_model: DynReferModel, processor: DynReferProcessor
    ) -> None:
        ids, mask = processor.language_ids(["red,car|", "|"])
        queries = draw(2, 5, 24)
        with torch.no_grad():
            embeds, attention = tiny_model.language_inputs(queries, ids, mask)
            torch.testing.assert_close(embeds[:, :5], tiny_model.t5_proj(queries))
            words = tiny_model.language_model.get_input_embeddings()(ids) + tiny_model.cem_memory
        torch.testing.assert_close(embeds[:, 5:], words)  # of every control token, </s> and padding too
        assert attention.tolist() == [[1] * 5 + row for row in mask.tolist()]
        assert mask[1].tolist() == [1, 1, 0, 0, 0]

    def test_captions_do_not_feel_their_neighbours(
        self, tiny_model: DynReferModel, processor: DynReferProcessor
    ) -> None:
        """Padding of control words is masked: alone or beside a longer row, the same caption and score."""
        controls = ["|", "red,car,small,striped|", "dog|"]
        queries = draw(3, 5, 24)
        together = tiny_model.generate(queries, *processor.language_ids(controls))
        captions = processor.decode(together.sequences)
        for row, control in enumerate(controls):
            alone = tiny_model.generate(queries[row : row + 1], *processor.language_ids([control]))
            assert processor.decode(alone.sequences) == [captions[row]]
            torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-7)
        other = tiny_model.generate(queries, *processor.language_ids(["blue,dog|"] * 3))
        assert not torch.equal(other.scores, together.scores)

    def test_group_maximum(self) -> None:
        scores = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.4, 0.0]])
        torch.testing.assert_close(group_maximum(scores, [2, 1, 3]), torch.tensor([[0.9, 0.3, 0.4]]))


class TestTraining:
    TRAINABLE = ("cvem_align.", "cvem_mlp.", "cem_memory", "qformer.", "t5_proj.", "tag_", "attr_")

    def test_fresh_values(self, make_model: Build) -> None:
        model = make_model(fresh=True)
        assert model.attr_t.item() == pytest.approx(math.log(10))
        assert model.attr_b.item() == -10
        assert model.cem_memory.abs().sum() == 0
        head = model.get_submodule("tag_head")
        weights = torch.cat([p.flatten() for n, p in head.named_parameters() if n.endswith("dense.weight")])
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)

    def test_gradients_reach_the_trained_parts_only(self, make_model: Build, processor: DynReferProcessor) -> None:
        model = make_model(prompt_loss_weight=0.1).train()
        named = dict(model.named_parameters())
        assert {name for name, p in named.items() if p.requires_grad} == {
            name for name in named if name.startswith(self.TRAINABLE)
        }
        assert not model.query_tokens.requires_grad  # its name matches no trained part (spec 2.5)
        assert not model.vision_tower.training
        assert not model.text_encoder.training
        assert model.language_model.training  # its dropout is active, as in the official code
        assert not model.eval().language_model.training

        output = model(**batch(model, processor))
        assert set(output.losses) == {"caption", "tag", "contrast", "prompt"}
        torch.testing.assert_close(output.loss, sum(output.losses.values()))
        output.loss.backward()
        for name, parameter in named.items():
            if name.startswith(self.TRAINABLE):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
            else:
                assert parameter.grad is None, name
        for name in ("cem_memory", "attr_t", "t5_proj.weight", "cvem_align.offset_mask.weight", "tag_fc.weight"):
            gradient = named[name].grad
            assert gradient is not None
            assert gradient.abs().max() > 0, name

    def test_weights_of_the_objectives(self, make_model: Build, processor: DynReferProcessor) -> None:
        model = make_model(prompt_loss_weight=1.0)
        inputs = batch(model, processor)
        with torch.no_grad():
            base = model(**inputs).losses
            model.config.tag_loss_weight, model.config.contrast_loss_weight = 0.02, 0.25
            model.config.caption_loss_weight, model.config.prompt_loss_weight = 3.0, 0.0
            other = model(**inputs).losses
        assert set(other) == {"caption", "tag", "contrast"}
        torch.testing.assert_close(other["tag"], 2 * base["tag"])
        torch.testing.assert_close(other["contrast"], base["contrast"] / 2)
        torch.testing.assert_close(other["caption"], 3 * base["caption"])
        with torch.no_grad():
            assert model(inputs["pixel_values"], BOXES).loss is None

    def test_shared_views(self, tiny_model: DynReferModel, processor: DynReferProcessor) -> None:
        """Distinct views with an index give what the repeated views give."""
        distinct = draw(4, 3, 56, 56)
        index = torch.tensor([[0, 1, 3], [2, 1, 3]])
        with torch.no_grad():
            shared = tiny_model(distinct, BOXES, view_index=index).query_output
            repeated = tiny_model(distinct[index.flatten()], BOXES).query_output
        torch.testing.assert_close(shared, repeated, rtol=1e-4, atol=1e-5)

    def test_padding_of_captions_costs_nothing(self, tiny_model: DynReferModel, processor: DynReferProcessor) -> None:
        control = processor.language_ids(["|", "|"])
        ids, mask = processor.language_ids(["red car", "a small striped dog"])
        queries = draw(2, 5, 24)
        with torch.no_grad():
            together = tiny_model.caption_loss(queries, *control, ids, mask)
            wider = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
            torch.testing.assert_close(tiny_model.caption_loss(queries, *control, *wider), together)
            # The mean is over tokens, not over captions: 3 tokens of one, 5 of the other.
            parts = [
                tiny_model.caption_loss(
                    queries[k : k + 1], control[0][k : k + 1], control[1][k : k + 1], ids[k : k + 1], mask[k : k + 1]
                )
                for k in (0, 1)
            ]
        assert mask.sum(dim=1).tolist() == [3, 5]
        torch.testing.assert_close(together, (3 * parts[0] + 5 * parts[1]) / 8)


@pytest.fixture
def bases(make_model: Build, processor: DynReferProcessor, tmp_path: Path) -> dict[str, str]:
    """Checkpoints of the three frozen parts, the T5 with an output layer of its own."""
    model = make_model(seed=7)
    folders = {part: str(tmp_path / part) for part in ("vision", "text", "language")}
    model.vision_tower.model.save_pretrained(folders["vision"])
    model.text_encoder.save_pretrained(folders["text"])
    model.language_model.save_pretrained(folders["language"])
    processor.language_tokenizer.save_pretrained(folders["language"])
    processor.text_tokenizer.save_pretrained(folders["text"])
    return folders


def same_weights(one: DynReferModel, other: DynReferModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


class TestCheckpoints:
    def test_round_trip(self, checkpoint: Path, tiny_model: DynReferModel) -> None:
        loaded = DynReferModel.from_pretrained(checkpoint)
        assert same_weights(loaded, tiny_model)
        assert not loaded.training
        assert not torch.equal(loaded.language_model.lm_head.weight, loaded.language_model.shared.weight)
        assert loaded.language_model.config.dense_act_fn == "gelu"
        norm: Any = loaded.vision_tower.model.post_layernorm
        assert norm.eps == 1e-5
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in tiny_model.named_parameters() if p.requires_grad
        }
        assert loaded.config.to_dict()["generation"] == tiny_model.config.generation

    def test_round_trip_without_the_base_models(self, make_model: Build, bases: dict[str, str], tmp_path: Path) -> None:
        source = make_model(seed=7)
        model = make_model(base_models=bases).load_base_models()
        theirs = source.state_dict()
        frozen = ("vision_tower.", "text_encoder.", "language_model.")
        # The embedding too, though a T5 that is built afresh shares it with its output layer.
        for key, value in model.state_dict().items():
            if key not in ("attr_t", "attr_b"):  # alike in all random models
                assert torch.equal(value, theirs[key]) == key.startswith(frozen), key
        model.save_pretrained(tmp_path / "small")
        assert not any(key.startswith(frozen) for key in load_file(tmp_path / "small" / "model.safetensors"))
        assert same_weights(DynReferModel.from_pretrained(tmp_path / "small"), model)
        halved = DynReferModel.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}

    def test_a_fresh_model_takes_its_base_models_whole(self, make_model: Build, bases: dict[str, str]) -> None:
        model = make_model(fresh=True, base_models=bases).load_base_models()
        theirs = make_model(seed=7).language_model
        assert torch.equal(model.language_model.shared.weight, theirs.shared.weight)
        assert torch.equal(model.language_model.lm_head.weight, theirs.lm_head.weight)

    def test_base_models_of_other_sizes(self, make_model: Build, bases: dict[str, str]) -> None:
        text = {**make_model(fresh=True).config.text_config.to_dict(), "hidden_size": 24}
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            make_model(base_models={"text": bases["text"]}, text_config=text, fresh=True).load_base_models()
        with pytest.raises(InputError, match="there is no folder"):
            make_model(base_models={"text": bases["text"] + "/none"}).load_base_models()

    def test_auto_model_after_import_foveate(self, checkpoint: Path, tiny_model: DynReferModel) -> None:
        code = (
            "import sys, foveate\n"
            "from transformers import AutoModel\n"
            "model = AutoModel.from_pretrained(sys.argv[1])\n"
            "print(type(model).__name__, float(sum(p.double().abs().sum() for p in model.parameters())))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        name, total = done.stdout.split()
        assert name == "DynReferModel"
        assert float(total) == pytest.approx(
            sum(p.detach().double().abs().sum().item() for p in tiny_model.parameters())
        )


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.mark.parametrize("load", [DynReferModel.from_pretrained, DynReferPredictor.from_pretrained])
class TestDamagedCheckpoints:
    @pytest.mark.parametrize("cut", [0, 7, 0.01, 0.5, 0.999])
    def test_truncated(self, load: Any, damaged: Path, cut: float) -> None:
        file = damaged / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
        with pytest.raises(CheckpointError, match="cannot load the DynRefer checkpoint"):
            load(damaged)

    def test_corrupt(self, load: Any, damaged: Path) -> None:
        (damaged / "model.safetensors").write_bytes(b"no weights at all" * 100)
        with pytest.raises(CheckpointError, match="cannot load the DynRefer checkpoint"):
            load(damaged)
        (damaged / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no file named model\.safetensors"):
            load(damaged)

    @pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "foveate_dynrefer", "num_views": 0}'])
    def test_config(self, load: Any, damaged: Path, text: str) -> None:
        (damaged / "config.json").write_text(text)
        with pytest.raises(CheckpointError):
            load(damaged)

    def test_missing_extra_and_misshapen_are_listed(self, load: Any, damaged: Path) -> None:
        file = damaged / "model.safetensors"
        weights = load_file(file)
        changed = {key: value for key, value in weights.items() if key not in ("cem_memory", "tag_fc.weight")}
        changed |= {"more.weight": torch.zeros(2), "attr_fc.bias": torch.zeros(3)}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            load(damaged)
        message = str(caught.value)
        assert "2 missing (cem_memory, tag_fc.weight)" in message
        assert "1 unexpected (more.weight)" in message
        assert "1 of another shape" in message
        assert "attr_fc.bias" in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, load: Any, damaged: Path, value: float) -> None:
        file = damaged / "model.safetensors"
        weights = load_file(file)
        for key in ("tag_head.encoder.layer.0.crossattention.self.query.weight", "language_model.shared.weight"):
            weights[key].view(-1)[3] = value
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"2 with values that are not finite \(.*shared.weight.*tag_head"):
            load(damaged)


def test_half_precision_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"overflows in float16 .* use bfloat16 or float32"):
        DynReferPredictor.from_pretrained(checkpoint, dtype=torch.float16)


@pytest.mark.parametrize(
    ("part", "tasks", "message"),
    [
        ("vision_tower.model.post_layernorm.weight", "caption", "region tokens are not finite"),
        ("t5_proj.bias", "caption", "input embeddings .* not finite"),
        ("language_model.lm_head.weight", "caption", "non-finite logits"),
        ("tag_fc.weight", "tags", "tag logits are not finite"),
        ("attr_fc.bias", "attributes", "attribute logits are not finite"),
        ("attr_t", "category", "class logits are not finite"),
    ],
)
def test_numbers_that_go_wrong_are_no_answer(
    tiny_model: DynReferModel, processor: DynReferProcessor, part: str, tasks: str, message: str
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.get_parameter(part).view(-1)[0] = float("nan")
    image = np.full((40, 50, 3), 90, np.uint8)
    with pytest.raises(CheckpointError, match=message):
        DynReferPredictor(model, processor)(image, tasks=tasks)


class TestConversion:
    def test_what_is_not_dynrefers_is_listed(self) -> None:
        with pytest.raises(CheckpointError, match=r"2 keys are not DynRefer's: a\.b, visual\.c"):
            convert_state_dict({"visual.c": torch.zeros(1), "cem_memory": torch.zeros(2), "a.b": torch.zeros(1)})

    def test_in_projection_and_text_projection(self) -> None:
        converted = convert_state_dict(
            {
                "text.transformer.resblocks.3.attn.in_proj_weight": torch.arange(18.0).reshape(9, 2),
                "text.text_projection": torch.arange(6.0).reshape(2, 3),
                "text.logit_scale": torch.zeros(()),
            }
        )
        layer = "text_encoder.text_model.encoder.layers.3.self_attn."
        assert converted[f"{layer}k_proj.weight"].tolist() == [[6, 7], [8, 9], [10, 11]]
        assert converted["text_encoder.text_projection.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert len(converted) == 4

    def test_incomplete_or_misshapen_weights_are_refused(self, make_model: Build) -> None:
        model = make_model(fresh=True)
        state = {key: value for key, value in make_model().state_dict().items() if key != "cvem_mlp.0.bias"}
        with pytest.raises(CheckpointError, match=r"lacks 1 tensors \(cvem_mlp\.0\.bias\)"):
            load_converted(model, state)
        with pytest.raises(CheckpointError, match=r"size mismatch for cvem_mlp\.0\.bias"):
            load_converted(model, state | {"cvem_mlp.0.bias": torch.zeros(5)})
        with pytest.raises(CheckpointError, match=r"1 unknown ones \(more\)"):
            load_converted(model, make_model().state_dict() | {"more": torch.zeros(1)})

    def test_a_tied_t5_takes_embedding_and_output_layer(self, make_model: Build) -> None:
        model, source = make_model(fresh=True), make_model(seed=3)
        assert model.language_model.lm_head.weight is model.language_model.shared.weight
        load_converted(model, source.state_dict())
        assert same_weights(model, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 0}, "num_views must be a whole number from 1 to 65536, not 0"),
        ({"image_size": "56"}, "image_size must be a whole number .*, not '56'"),
        ({"num_query_tokens": True}, "num_query_tokens must be a whole number .*, not True"),
        ({"align_groups": 0}, "align_groups must be a whole number"),
        ({"align": "no"}, "align must be true or false, not 'no'"),
        ({"tag_threshold": float("nan")}, "tag_threshold must be a number from 0 to 1, not nan"),
        ({"tag_threshold": {"*": 0.7, "car": 7}}, "tag_threshold of 'car' must be a number from 0 to 1, not 7"),
        ({"caption_loss_weight": -1}, "caption_loss_weight must be a number"),
        ({"proposer": 5}, "proposer must be the name of a checkpoint, not 5"),
        ({"vision_layer": 3}, "vision_layer must be 'last_hidden_state' or one of the tower's -3 to 2, not 3"),
        ({"vision_layer": "last"}, "not 'last'"),
        ({"calibration": [1]}, r"calibration must be a mapping, not \[1\]"),
        ({"calibration": {"colour": [1.0]}}, "calibration names 'colour'"),
        ({"calibration": {"category": [float("nan")]}}, "calibration of category must be a list of one number above 0"),
        ({"calibration": {"category": [0.0]}}, "one number above 0"),
        ({"calibration": {"tags": [1.0]}}, "calibration of tags must be a list of two finite numbers"),
        ({"calibration": {"attributes": [1.0, float("inf")]}}, "calibration of attributes must be"),
        ({"generation": 5}, "generation must be a mapping, not 5"),
        ({"generation": {"no_such_key": 1}}, "'no_such_key' is not a generation setting; known are max_new_tokens"),
        ({"generation": {"num_beams": -1}}, "num_beams must be an integer from 1 to 64, got -1"),
        ({"view_policy": {"sounds": [0.1, 0.2]}}, "names the task 'sounds'; tasks are attributes"),
        ({"view_policy": {"tags": [0.1, 5]}}, r"view_policy of tags: views are a list of t's .*, not \[0.1, 5\]"),
        ({"view_policy": {"tags": [0.1, 0.2, 0.3]}}, "the first must be 0"),
        ({"base_models": {"text": 5}}, "base_models of text must be the name of a checkpoint, not 5"),
        ({"image_size": 50}, "image_size 50 is not a multiple of the tower's patch size 14"),
        ({"align_groups": 5}, "width 32 is not divisible by align_groups 5"),
        ({"head_size": 10}, "head_size 10 is not divisible by 4 heads"),
        ({"base_models": {"sound": "x"}}, "unknown parts: sound"),
        ({"num_views": 2, "view_policy": {"tags": [0.1, 0.2, 0.3]}}, "gives 3 t's for tags, but 2 views need 1"),
        (
            {
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "image_size": 56,
                    "patch_size": 14,
                }
            },
            "siglip_vision_model tower has no class token",
        ),
    ],
)
def test_configuration_checks_itself(make_model: Build, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(fresh=True, **change)


@pytest.mark.parametrize(
    ("views", "policy"), [(1, {"tags": [], "caption": []}), (2, {"tags": [0.3], "attributes": [0.1]}), (4, {})]
)
def test_the_view_policy_fits_the_number_of_views(
    make_model: Build, processor: DynReferProcessor, views: int, policy: dict[str, list[float]]
) -> None:
    model = make_model(num_views=views)
    assert policy.items() <= model.config.view_policy.items() if policy else model.config.view_policy == {}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    region: Any = DynReferPredictor(model, processor)(image, boxes=[[5, 5, 30, 30]], tasks=("tags", "category"))[0]
    assert {view.t for view in region.views} >= {0.0, *policy.get("tags", [])}
    assert len(region.tag_scores) == len(processor.vocabulary.tags)


def test_configuration_is_plain_json(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "foveate_dynrefer"
    assert config["generation"]["num_beams"] == 2
    assert config["generation"]["repetition_penalty"] == 1.5
    assert config["view_policy"]["caption"] == [0.3, 0.5]
