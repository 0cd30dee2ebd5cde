"""Lets transformers' Auto classes find our checkpoints after `import foveate`, without importing transformers now.

`AutoModel.from_pretrained(folder)` asks `AutoConfig.from_pretrained` first, whatever the folder. So the first call of
that method (and of `AutoProcessor`'s, which may come before it) is the moment to register our classes: late enough
that no module of ours is half imported, early enough for the call itself. If transformers is loaded already, the two
methods are wrapped at once; otherwise a finder on `sys.meta_path` waits for their modules. It looks at two names and
leaves every other import alone. The wrapper takes itself away with its first call.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_DOORS = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
}


def register_on_first_use() -> None:
    """Arranges for `foveate.register()` to run at the first `from_pretrained` of an Auto class."""
    for name in _DOORS:
        if name in sys.modules:
            _wrap(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _DOORS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_wrap(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = execute_then_wrap
        return spec


def _wrap(module: ModuleType) -> None:
    auto_class: Any = getattr(module, _DOORS[module.__name__])
    original = vars(auto_class)["from_pretrained"]

    @classmethod
    @functools.wraps(original.__func__)
    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        _register()
        return original.__get__(None, cls)(*args, **kwargs)

    auto_class.from_pretrained = from_pretrained


def _register() -> None:
    from foveate.methods import register

    try:
        register()
    except Exception as error:  # a fault of ours must not stop somebody who loads a model of another library
        warnings.warn(f"foveate could not register its models with transformers: {error!r}", stacklevel=3)
