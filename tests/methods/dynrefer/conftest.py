"""A whole DynRefer in miniature: every part real, every weight random, built once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foveate.methods.dynrefer.configuration import DynReferConfig
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor, Vocabulary

TAGS = ("car", "red", "dog", "striped", "left of", "Hat", "small")
ATTRIBUTES = ("red", "striped", "small")
CLASSES = ("car", "dog", "Hat", "tree")
WORDS = ["<pad>", "</s>", "<unk>", "<s>", ",", "|", "the", "is", "of", "a", "left", "blue"]
WORDS += sorted({word for phrase in (*TAGS, *CLASSES) for word in phrase.lower().split()})


def make_tokenizer(*, start: bool) -> PreTrainedTokenizerFast:
    """Words of this folder; texts end with </s>, and begin with <s> if asked."""
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    raw.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def tiny_config(**overrides: Any) -> DynReferConfig:
    """n = 3 views of 56 x 56, 4 x 4 patches, width 32."""
    settings: dict[str, Any] = {
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        "text_config": {
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "projection_dim": 12,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 3,
        },
        "qformer_config": {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "language_config": {
            "model_type": "t5",
            "vocab_size": len(WORDS),
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        "num_views": 3,
        "image_size": 56,
        "num_query_tokens": 5,
        "head_size": 16,
        "tag_threshold": 0.5,
        "generation": {"max_new_tokens": 6},
    }
    return DynReferConfig(**{**settings, **overrides})


def randomise(model: DynReferModel, seed: int = 0) -> DynReferModel:
    """Random values everywhere, so that nothing hides behind a zero or a one; the output layer of the T5 its own."""
    from foveate.language.lm import untie_lm_head

    untie_lm_head(model.language_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("attr_t", "attr_b"):
                continue
            spread = 0.3 if parameter.ndim > 1 else 0.2
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + norm)
    return model.eval()


@pytest.fixture(scope="session")
def official_files() -> Any:
    """The module official_files.py of this folder."""
    path = Path(__file__).with_name("official_files.py")
    spec = importlib.util.spec_from_file_location("foveate_official_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DynReferModel]:
    """Builds a random model; keywords override the configuration, `fresh=True` keeps the initial weights."""

    def build(*, fresh: bool = False, seed: int = 0, **overrides: Any) -> DynReferModel:
        torch.manual_seed(seed)
        model = DynReferModel(tiny_config(**overrides)).eval()
        return model if fresh else randomise(model, seed)

    return build


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., DynReferModel]) -> DynReferModel:
    """Shared by all tests: copy it before changing it."""
    return make_model()


@pytest.fixture(scope="session")
def processor() -> DynReferProcessor:
    vocabulary = Vocabulary.from_words(TAGS, ATTRIBUTES, CLASSES, "the tests")
    return DynReferProcessor(vocabulary, make_tokenizer(start=True), make_tokenizer(start=False), max_text_tokens=12)


@pytest.fixture(scope="session")
def predictor(tiny_model: DynReferModel, processor: DynReferProcessor) -> DynReferPredictor:
    return DynReferPredictor(tiny_model, processor, name="tiny")


@pytest.fixture(scope="session")
def checkpoint(
    tiny_model: DynReferModel, processor: DynReferProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model saved whole; do not write into it."""
    folder = tmp_path_factory.mktemp("dynrefer") / "tiny"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """96 x 80: colours that vary smoothly, with a dark and a striped patch."""
    y, x = np.mgrid[0:80, 0:96]
    pixels = np.stack([2 * x, 3 * y, 255 - x - y], axis=-1).clip(0, 255).astype(np.uint8)
    pixels[10:30, 20:50] = 30
    pixels[45:70:4, 55:90] = 240
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def wide_photo(photo: Image.Image) -> Image.Image:
    """A second image of another size: 120 x 64."""
    return photo.transpose(Image.Transpose.ROTATE_90).resize((120, 64))
