"""User functions that an option names: ``package.module:name`` or ``path/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, first_line


def find_attribute(reference: str) -> Any:
    """Return what ``package.module:name`` or ``path/file.py:name`` means. It is imported, with the user's rights."""
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        module = _module_at(reference, Path(where).expanduser())
    else:
        module = imported(reference, lambda: importlib.import_module(where))
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            shown = ", ".join(sorted(public)) or "nothing that can be called"
            raise SnrfError(reference, f"has no attribute {attribute!r}", f"there is {shown}")
        found = getattr(found, name)
    return found


def imported(reference: str, load: Callable[[], Any]) -> Any:
    """Return what ``load`` imports; ``SnrfError``: it fails, in whatever way."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        what = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise SnrfError(reference, what, "-vv shows where") from error


def _module_at(reference: str, path: Path) -> Any:
    if not os.path.isfile(path):
        raise SnrfError(reference, f"there is no file {path}", "correct the path")
    name = f"_mergekit_snrf_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name while it is being executed.
    sys.modules[name] = module
    imported(reference, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module
