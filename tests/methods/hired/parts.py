"""LLaVA-1.5 and LLaVA-NeXT of transformers in miniature, with processors: every part real, every weight random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

SIDE, PATCH = 24, 4
"""Pixels of a partition and of a patch: 6 x 6 tokens, which 1, 2 and 3 tiles divide."""
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
IMAGE_ID = 259
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% else %} ASSISTANT: {{ message.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and four special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<image>"]) == [256, 257, 258, IMAGE_ID]
    return tokenizer


def _peaked(model: Any) -> Any:
    """Random weights whose attention is far from even, so that a choice by another score is another choice."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5)
        if "vision_tower" in name and ("q_proj" in name or "k_proj" in name) and parameter.ndim > 1:
            parameter.data *= 2
    model.generation_config.pad_token_id = 258
    return model.eval()


def make_llava_next(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vision_config": dict(VISION),
        "text_config": dict(TEXT),
        "image_token_index": IMAGE_ID,
        "image_grid_pinpoints": [list(pair) for pair in PINPOINTS],
        "vision_feature_layer": -2,
    }
    return _peaked(LlavaNextForConditionalGeneration(LlavaNextConfig(**{**settings, **changes})))


def make_llava(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vision_config": dict(VISION),
        "text_config": dict(TEXT),
        "image_token_index": IMAGE_ID,
        "vision_feature_layer": -2,
    }
    return _peaked(LlavaForConditionalGeneration(LlavaConfig(**{**settings, **changes})))


def make_next_processor() -> Any:
    side = {"shortest_edge": SIDE}
    pictures = LlavaNextImageProcessorPil(
        size=side, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=[list(pair) for pair in PINPOINTS]
    )
    return _processor(LlavaNextProcessor, pictures)


def make_processor() -> Any:
    side = {"shortest_edge": SIDE}
    return _processor(LlavaProcessor, CLIPImageProcessorPil(size=side, crop_size={"height": SIDE, "width": SIDE}))


def _processor(kind: Any, pictures: Any) -> Any:
    return kind(
        image_processor=pictures,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with a bright square."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 120, (height, width, 3), dtype=np.uint8)
    x, y = draw.integers(0, max(1, width - 12)), draw.integers(0, max(1, height - 12))
    pixels[y : y + 10, x : x + 10] = draw.integers(180, 255, 3)
    return Image.fromarray(pixels)
