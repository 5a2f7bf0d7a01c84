"""The door to mergekit: install, planner adapter, merge method."""

from __future__ import annotations

import functools
import sys
import threading

_lock = threading.Lock()


def install() -> None:
    """Register the merge method ``snrf`` and wrap mergekit's ``get_architecture_info``; harmless when repeated.

    Works in the middle of mergekit's own import: it needs no more than the registry and the architecture package.
    """
    import mergekit.architecture as architecture
    from mergekit.merge_methods import registry

    from mergekit_snrf.merge.method import METHOD

    with _lock:
        if METHOD.spec.name not in registry._METHODS:
            registry.register(METHOD)
        original = architecture.get_architecture_info
        if getattr(original, "__snrf__", False):
            return

        @functools.wraps(original)
        def get_architecture_info(config, options):  # type: ignore[no-untyped-def]
            if config.merge_method != METHOD.spec.name:
                return original(config, options)
            from mergekit_snrf.merge.adapter import architecture_of_merge

            return architecture_of_merge(config, options)

        get_architecture_info.__snrf__ = True  # type: ignore[attr-defined]
        architecture.get_architecture_info = get_architecture_info
        # mergekit.merge binds the function by name, and may do so before its registry is loaded.
        merge = sys.modules.get("mergekit.merge")
        if merge is not None and getattr(merge, "get_architecture_info", None) is original:
            merge.get_architecture_info = get_architecture_info  # type: ignore[attr-defined]


# Whoever imports a module of this package before mergekit starts the autoload in the middle of that module's own
# imports, where it would find the module half done. Loaded from here, mergekit's registry finds `install` above.
import mergekit.merge_methods.registry  # noqa: E402, F401
