"""Teach mergekit the method ``snrf`` as soon as it loads its registry of merge methods.

torch calls ``autoload`` at the end of ``import torch`` (entry point group ``torch.backends``). It imports nothing
but the standard library, and costs one entry in ``sys.meta_path`` until mergekit is imported, if ever.
It never raises: a broken installation of mergekit-snrf must not break torch.
"""

import importlib.abc
import importlib.util
import sys
import warnings

_REGISTRY = "mergekit.merge_methods.registry"


def autoload():
    """Install the plugin into mergekit now if its registry is loaded, else when it will be."""
    try:
        if _REGISTRY in sys.modules:
            _install()
        elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegistryFinder())
    except Exception as error:
        _warn(error)


def _install():
    try:
        from mergekit_snrf.merge import install

        install()
    except Exception as error:
        _warn(error)


def _warn(error):
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


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; waits for mergekit's registry and wraps its loader."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _REGISTRY:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader)
        return spec


class _InstallingLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then installs the plugin."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # Later readers of __loader__ and __spec__ should find the real loader.
        module.__loader__ = self._loader
        module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            # The import may be tried again, say after a missing dependency was installed.
            sys.meta_path.insert(0, _RegistryFinder())
            raise
        _install()
