"""Fine-grained vision-language work: describe any region of an image.

>>> import foveate
>>> describer = foveate.load("dynrefer-world")
>>> regions = describer("street.png", boxes=[[40, 60, 180, 220]])
>>> regions[0].caption

Importing this package is light: torch and transformers are imported by what needs them. A checkpoint folder of ours
loads with `transformers.AutoModel.from_pretrained` after `import foveate`, in whichever order the two are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foveate._auto import register_on_first_use

if TYPE_CHECKING:
    from foveate.errors import CheckpointError, FoveateError, InputError, RecipeError
    from foveate.methods import load, register
    from foveate.methods.dynrefer.results import Region, Regions
    from foveate.methods.hired.dropping import drop_visual_tokens

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "FoveateError",
    "InputError",
    "RecipeError",
    "Region",
    "Regions",
    "__version__",
    "drop_visual_tokens",
    "load",
    "register",
]

_HOMES = {
    "CheckpointError": "foveate.errors",
    "FoveateError": "foveate.errors",
    "InputError": "foveate.errors",
    "RecipeError": "foveate.errors",
    "Region": "foveate.methods.dynrefer.results",
    "Regions": "foveate.methods.dynrefer.results",
    "drop_visual_tokens": "foveate.methods.hired.dropping",
    "load": "foveate.methods",
    "register": "foveate.methods",
}

register_on_first_use()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
