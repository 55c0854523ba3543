"""Registers lowbit with transformers when transformers is imported, whichever of the two comes first.

transformers has no entry points for quantization methods: one is known once its module was imported. Importing
transformers here would cost seconds, so a finder waits for the modules that need to know and registers right after.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]


def _register_config() -> None:
    from lowbit.compiler.io.hf_config import register

    register()


def _register_quantizer() -> None:
    from lowbit.compiler.io.hf import register

    register()


_TRIGGERS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.modeling_utils": _register_quantizer,
}
"""What is done after a module of transformers has been loaded: the first reads config.json, the second weights."""


def install() -> None:
    """Register what is already loaded now, the rest when it is; does nothing the second time."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    for name, action in _TRIGGERS.items():
        if name in sys.modules:
            action()
        else:
            finder.waiting[name] = action
    sys.meta_path.insert(0, finder)


class _Finder(MetaPathFinder):
    """Finds a module as everyone else does, and asks to be told when it has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.waiting.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, action)
        return spec


class _Loader(Loader):
    """The module's own loader, followed by the registration."""

    def __init__(self, inner: Loader, action: Callable[[], None]) -> None:
        self._inner, self._action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner  # inspect and pickle look at the loader later
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._action()
