"""A whole MG-LLaVA in miniature: every part real, every weight random."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.methods.mg_llava.configuration import MGLlavaConfig
from foveate.methods.mg_llava.modeling import MGLlavaModel

VOCABULARY = 300
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TRUNK = {
    "model_type": "convnext",
    "hidden_sizes": [8, 8, 12, 16],
    "depths": [1, 1, 1, 1],
    "num_channels": 3,
    "patch_size": 4,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the special tokens of chat models, which are text to the templates."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    return tokenizer


def make_config(**changes: Any) -> MGLlavaConfig:
    settings: dict[str, Any] = {
        "vision_config": dict(VISION),
        "high_res_config": dict(TRUNK),
        "language_config": dict(LLAMA),
        "high_res_size": 64,
        "object_bins": 7,
        "resampler_heads": 4,
        "num_frames": 3,
        "max_text_length": 400,
        "generation": {"max_new_tokens": 8},
    }
    return MGLlavaConfig(**{**settings, **changes})


def make_model(**changes: Any) -> Any:
    """Random weights, none of which is zero: a fresh fusion would hide mistakes behind its zeros."""
    torch.manual_seed(0)
    model = MGLlavaModel(make_config(**changes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("language_model."):
            torch.nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
        elif name.endswith("layer_scale_parameter"):
            torch.nn.init.constant_(parameter, 0.5)
        elif "fusion" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
