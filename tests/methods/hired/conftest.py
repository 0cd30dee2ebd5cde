"""Fixtures of small LLaVAs; `parts.py` makes them, which tests import as `hired_parts`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("hired_parts", Path(__file__).with_name("parts.py"))
assert _spec is not None
assert _spec.loader is not None
parts: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = parts
_spec.loader.exec_module(parts)


@pytest.fixture(scope="session")
def next_model() -> Any:
    """Leave it as it is: remove what you attach."""
    return parts.make_llava_next()


@pytest.fixture(scope="session")
def next_processor() -> Any:
    return parts.make_next_processor()


@pytest.fixture(scope="session")
def llava_model() -> Any:
    """Leave it as it is: remove what you attach."""
    return parts.make_llava()


@pytest.fixture(scope="session")
def llava_processor() -> Any:
    return parts.make_processor()
