"""`import foveate` is light, and arranges for transformers to know our checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, *arguments: str) -> str:
    """stdout of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "{'torch', 'transformers', 'numpy', 'PIL', 'rich', 'pydantic', 'sklearn'} & set(sys.modules)"


@pytest.mark.parametrize(
    "statement",
    [
        "import foveate",
        "import foveate; foveate.load; foveate.InputError; foveate.register; dir(foveate)",
        "import foveate.methods; foveate.methods.METHODS['dynrefer']",
        "import foveate.cli",
    ],
)
def test_import_is_light(statement: str) -> None:
    assert python(f"{statement}; import sys; print({HEAVY})") == "set()"


def test_every_public_name_is_there() -> None:
    assert python("import foveate; print(all(hasattr(foveate, name) for name in foveate.__all__))") == "True"
    with pytest.raises(AssertionError, match="module 'foveate' has no attribute 'lod'"):
        python("import foveate; foveate.lod")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder whose `config.json` names our model type."""
    python(
        "import sys; from foveate.methods import METHODS; METHODS['dynrefer'].config().save_pretrained(sys.argv[1])",
        str(tmp_path),
    )
    return tmp_path


@pytest.mark.parametrize(
    "order",
    [
        "import foveate; from transformers import AutoConfig",
        "from transformers import AutoConfig; import foveate",
        "import foveate; from foveate.methods.dynrefer import modeling; from transformers import AutoConfig",
    ],
    ids=["foveate first", "transformers first", "through our modules"],
)
def test_auto_classes_know_our_checkpoints(checkpoint: Path, order: str) -> None:
    code = (
        f"import sys; {order}\n"
        "before = AutoConfig.__dict__['from_pretrained']\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "from transformers import AutoModel\n"
        "print(type(config).__name__, AutoModel._model_mapping[type(config)].__name__)\n"
        "assert AutoConfig.__dict__['from_pretrained'] is not before, 'the wrapper takes itself away'\n"
        "assert type(AutoConfig.from_pretrained(sys.argv[1])) is type(config)\n"
    )
    assert python(code, str(checkpoint)) == "DynReferConfig DynReferModel"
