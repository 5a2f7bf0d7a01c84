"""The door to mergekit: ``install`` registers the merge method and wraps ``run_merge``."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from mergekit_snrf_autoload import when_imported

_SCRIPTS = ("mergekit.scripts.run_yaml", "mergekit.scripts.multimerge")


def install() -> None:
    """Register the merge method ``snrf`` and wrap mergekit's ``run_merge``; harmless when repeated.

    Works in the middle of mergekit's own import: it needs no more than the registry of methods.
    """
    # It registers itself; where its own import led here, as soon as it is complete.
    import mergekit_snrf.merge.method  # noqa: F401

    when_imported("mergekit.merge", _wrap)
    for script in _SCRIPTS:
        when_imported(script, _guard)


def _guard(script: ModuleType) -> None:
    from mergekit_snrf.merge.guard import GuardedYaml, open_recipe

    script.yaml, script.open = GuardedYaml(), open_recipe  # type: ignore[attr-defined]


class _MergeModule(ModuleType):
    """``mergekit.merge`` with ``run_merge`` wrapped, even where the module is still being executed."""

    @property
    def run_merge(self) -> Any:
        """mergekit's function, which leaves configurations with ``merge_method: snrf`` to a session."""
        return _with_sessions(self.__dict__["run_merge"])

    @run_merge.setter
    def run_merge(self, function: Any) -> None:
        self.__dict__["run_merge"] = function


def _wrap(module: ModuleType) -> None:
    module.__class__ = _MergeModule
    # Without the autoload they may have been imported before.
    for script in map(sys.modules.get, _SCRIPTS):
        if script is not None and "run_merge" in script.__dict__:
            script.run_merge = _with_sessions(script.run_merge)  # type: ignore[attr-defined]


@functools.cache
def _with_sessions(original: Any) -> Any:
    if getattr(original, "__snrf__", False):
        return original

    @functools.wraps(original)
    def run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        if merge_config.merge_method != "snrf":
            return original(merge_config, out_path, options, config_source)
        from mergekit_snrf.merge.adapter import run_session

        return run_session(original, merge_config, out_path, options, config_source)

    run_merge.__snrf__ = True  # type: ignore[attr-defined]
    return run_merge
