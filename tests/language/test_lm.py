from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from foveate.errors import CheckpointError, InputError
from foveate.language.lm import load_language_model, load_text_encoder, untie_lm_head

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "car"]


def save_tokenizer(folder: Path) -> None:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def t5(**overrides: Any) -> T5ForConditionalGeneration:
    settings: dict[str, Any] = {
        "vocab_size": 20,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**{**settings, **overrides})).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 4, 5]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits.float()


class TestLoad:
    @pytest.mark.parametrize("build", [t5, llama])
    def test_config_decides_the_class(self, build: Any, tmp_path: Path) -> None:
        plain = build()
        plain.save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        model, tokenizer = load_language_model(tmp_path, dtype=torch.float32)
        assert type(model) is type(plain)
        assert not model.training
        assert torch.equal(logits(model), logits(plain))
        assert tokenizer("a red car").input_ids[:3] == [3, 4, 5]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_of_a_decoder_only_model(self, dtype: torch.dtype, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        assert load_language_model(tmp_path, dtype=dtype)[0].dtype == dtype
        assert load_language_model(tmp_path)[0].dtype == torch.float32

    def test_t5_is_never_fp16(self, tmp_path: Path) -> None:
        t5().save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert load_language_model(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
            assert load_language_model(tmp_path)[0].dtype == torch.float32
        with pytest.warns(RuntimeWarning, match="t5 overflows in fp16.*loaded in fp32"):
            model, _ = load_language_model(tmp_path, dtype=torch.float16)
        assert torch.equal(logits(model), logits(t5()))  # not rounded through fp16 on the way
        t5().half().save_pretrained(tmp_path)
        with pytest.warns(RuntimeWarning, match="loaded in fp32"):
            model, _ = load_language_model(tmp_path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_feed_forward_activation(self, tmp_path: Path) -> None:
        plain = t5()
        plain.save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        stored, _ = load_language_model(tmp_path)
        exact, _ = load_language_model(tmp_path, feed_forward_activation="gelu")
        assert torch.equal(logits(stored), logits(plain))
        expected = t5()
        for stack in (expected.encoder, expected.decoder):
            for block in stack.block:
                block.layer[-1].DenseReluDense.act = torch.nn.GELU(approximate="none")  # type: ignore[union-attr]
        assert not torch.equal(logits(expected), logits(plain))
        torch.testing.assert_close(logits(exact), logits(expected))
        with pytest.raises(InputError, match="'gelux' is unknown"):
            load_language_model(tmp_path, feed_forward_activation="gelux")

    def test_activation_is_for_t5_only(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        with pytest.raises(InputError, match="T5-class models only, this one is 'llama'"):
            load_language_model(tmp_path, feed_forward_activation="gelu")

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="dtype must be"):
            load_language_model(tmp_path, dtype=torch.int8)
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            load_language_model(tmp_path)
        model = t5()
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="no usable tokenizer"):
            load_language_model(tmp_path)
        save_tokenizer(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        key = "decoder.final_layer_norm.weight"
        save_file({name: value for name, value in tensors.items() if name != key}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensors of T5ForConditionalGeneration .*{key}"):
            load_language_model(tmp_path)
        file.write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_language_model(tmp_path)
        (tmp_path / "config.json").write_text("[")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_language_model(tmp_path)


class TestUntie:
    def test_both_matrices_survive_loading(self, tmp_path: Path) -> None:
        model = t5()
        assert model.lm_head.weight is model.shared.weight, "the trap is gone; untie_lm_head may go too"
        before = logits(model)
        assert untie_lm_head(model)
        assert torch.equal(logits(model), before)
        assert not untie_lm_head(model)
        state = model.state_dict()
        state["lm_head.weight"] = state["lm_head.weight"] * 2 + 1
        shared = state["shared.weight"].clone()
        model.load_state_dict(state)
        model.tie_weights()
        assert torch.equal(model.shared.weight, shared)
        assert torch.equal(model.lm_head.weight, shared * 2 + 1)
        model.save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        loaded: Any = load_language_model(tmp_path)[0]
        assert torch.equal(loaded.lm_head.weight, shared * 2 + 1)
        assert torch.equal(loaded.shared.weight, shared)
        assert torch.equal(logits(loaded), logits(model))

    def test_no_head(self) -> None:
        config = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
        )
        with pytest.raises(InputError, match="BertModel has no lm_head"):
            untie_lm_head(BertModel(config))


class TestTextEncoder:
    @staticmethod
    def clip() -> CLIPModel:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {**sizes, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 0}
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()

    def test_whole_and_part(self, tmp_path: Path) -> None:
        clip = self.clip()
        ids = torch.tensor([[0, 5, 19, 0], [0, 7, 8, 19]])
        with torch.no_grad():
            expected: Any = clip.get_text_features(input_ids=ids)
        clip.save_pretrained(tmp_path / "whole")
        encoder = load_text_encoder(tmp_path / "whole")
        assert not encoder.training
        encoder.save_pretrained(tmp_path / "part")
        for model in (encoder, load_text_encoder(tmp_path / "part", dtype=torch.float32)):
            with torch.no_grad():
                embeds = model(input_ids=ids).text_embeds
            torch.testing.assert_close(embeds, getattr(expected, "pooler_output", expected))

    def test_refusals(self, tmp_path: Path) -> None:
        t5().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="model_type 't5'; a text encoder needs a CLIP"):
            load_text_encoder(tmp_path)
        with pytest.raises(InputError, match="dtype must be"):
            load_text_encoder(tmp_path, dtype=torch.float64)
