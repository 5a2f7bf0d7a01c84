"""mergekit's recipes without the libraries that only its other parts need.

``import mergekit.config`` loads peft, accelerate, transformers' modelling code, scipy and networkx, half of what a plan
costs. Planning and patching need the types of a recipe alone. So while these types are imported, peft, accelerate and
transformers are stand-ins that load the real modules when something of them is used, and ``mergekit.tokenizer`` is a
package of which only ``config`` is loaded. Afterwards everybody else imports the real modules.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_HEAVY = ("peft", "accelerate", "transformers")
_TOKENIZER = "mergekit.tokenizer"


class _LaterModule(ModuleType):
    """A module that is imported when something of it is used."""

    binding = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # The import system's questions, such as whether this is a package.
            raise AttributeError(name)
        if self.binding:
            return _LaterName(self.__name__, name)
        return getattr(import_module(self.__name__), name)


class _LaterName:
    """What ``from module import name`` binds before the module is imported: a class, asked for its attributes."""

    def __init__(self, module: str, name: str) -> None:
        self._place = module, name

    def __getattr__(self, attribute: str) -> Any:
        module, name = self._place
        return getattr(getattr(import_module(module), name), attribute)


class _LaterTable(dict[str, Any]):
    """mergekit's table of the auto classes of architectures, filled when it is first searched."""

    def __contains__(self, key: object) -> bool:
        if not self:
            # mergekit fills it while it is imported, from all of transformers.
            spec = find_spec("mergekit.common")
            assert spec is not None and spec.loader is not None  # noqa: PT018
            again = module_from_spec(spec)
            spec.loader.exec_module(again)
            self.update(again.ARCH_NAME_TO_AUTO_CLS)
        return super().__contains__(key)


def import_recipe_types() -> None:
    """Import mergekit's types of a recipe; does nothing where mergekit, or what it needs, is loaded already."""
    mergekit = find_spec("mergekit")
    if "mergekit.common" in sys.modules or mergekit is None or not mergekit.submodule_search_locations:
        return
    stand_ins: dict[str, ModuleType] = {}
    for name in _HEAVY:
        if name not in sys.modules:
            stand_ins[name] = _LaterModule(name)
            stand_ins[name].__spec__ = find_spec(name)
    stand_ins[_TOKENIZER] = ModuleType(_TOKENIZER)
    stand_ins[_TOKENIZER].__path__ = [str(Path(mergekit.submodule_search_locations[0], "tokenizer"))]
    sys.modules.update(stand_ins)
    try:
        for name in ("mergekit.config", "mergekit.options", "mergekit.parameter_resolver"):
            import_module(name)
        sys.modules["mergekit.common"].ARCH_NAME_TO_AUTO_CLS = _LaterTable()  # type: ignore[attr-defined]
    finally:
        for name, module in stand_ins.items():
            module.__dict__["binding"] = False
            if sys.modules.get(name) is module:
                del sys.modules[name]
