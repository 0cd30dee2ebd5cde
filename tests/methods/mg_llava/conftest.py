"""Fixtures of a whole MG-LLaVA in miniature; `parts.py` makes it, which tests import as `mg_llava_parts`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from foveate.methods.mg_llava.processing import MGLlavaProcessor

_spec = importlib.util.spec_from_file_location("mg_llava_parts", Path(__file__).with_name("parts.py"))
assert _spec is not None
assert _spec.loader is not None
parts: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = parts
_spec.loader.exec_module(parts)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return parts.make_tokenizer()


@pytest.fixture
def model() -> Any:
    return parts.make_model()


@pytest.fixture
def processor(model: Any, tokenizer: PreTrainedTokenizerFast) -> MGLlavaProcessor:
    return MGLlavaProcessor(tokenizer, model.config)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved model; do not write into it."""
    path = tmp_path_factory.mktemp("mg_llava") / "tiny"
    model = parts.make_model()
    model.save_pretrained(path)
    MGLlavaProcessor(tokenizer, model.config).save_pretrained(path)
    return path


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Noise with a bright square, the same for the same seed."""

    def make(seed: int = 0, width: int = 60, height: int = 40) -> Image.Image:
        draw = np.random.default_rng(seed)
        pixels = draw.integers(0, 120, (height, width, 3), dtype=np.uint8)
        x, y = draw.integers(0, width - 12), draw.integers(0, height - 12)
        pixels[y : y + 10, x : x + 10] = draw.integers(180, 255, 3)
        return Image.fromarray(pixels)

    return make
