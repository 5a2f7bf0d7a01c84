"""Teach mergekit the method ``snrf`` as soon as it loads its registry of merge methods.

torch calls ``autoload`` at the end of ``import torch`` (entry point group ``torch.backends``). It imports nothing
but the standard library, and costs one entry in ``sys.meta_path`` until mergekit is imported, if ever.
It never raises: a broken installation of mergekit-snrf must not break torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "mergekit.merge_methods.registry"


def autoload() -> None:
    """Install the plugin into mergekit now if its registry is loaded, else when it will be."""
    try:
        when_imported(_REGISTRY, _install)
    except Exception as error:
        _warn(error)


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` now if a module is in ``sys.modules``, else as soon as it has been executed; once."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


def _install(registry: ModuleType) -> None:
    try:
        from mergekit_snrf.merge import install

        install()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    message = (
        f"mergekit-snrf could not be loaded ({type(error).__name__}: {error}), so mergekit lacks the merge method "
        f"'snrf'; reinstall it with 'pip install --force-reinstall mergekit-snrf' or remove it with "
        f"'pip uninstall mergekit-snrf'"
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        # Where warnings are errors, this one would break torch or mergekit.
        import logging

        logging.getLogger(__name__).warning(message)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; waits for one module and wraps its loader."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then calls the finder's action."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Later readers of __loader__ and __spec__ should find the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            # The import may be tried again, say after a missing dependency was installed.
            sys.meta_path.insert(0, self._finder)
            raise
        self._finder.action(module)
