"""Evaluations: any callable that asks a loaded model the same items as another, and returns a score for each.

    @mergekit_snrf.evaluation(roles={"perception": "keep"})
    def evaluate(model, processor):
        return {"reasoning": [1.0, 0.0, ...], "perception": Items(scores=(...), malformed=(...))}

``load_evaluation`` finds one by a reference: a YAML file of the built-in exact-match evaluation,
``package.module:name``, ``path/file.py:name``, or an entry point of the group ``mergekit_snrf.evaluations``. Arguments
of a callable follow a question mark: ``evaluation.py:board?n=100&seed=1``. An evaluation must be deterministic: equal
models, equal scores.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import parse_qsl

import torch
import yaml

from mergekit_snrf.errors import SnrfError, first_line, unexpected
from mergekit_snrf.evidence.items import Items, Role, Scores, as_items, check_alike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY_POINTS = "mergekit_snrf.evaluations"

_YAML = (".yml", ".yaml")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was found by its reference ``name``; call it through ``evaluate``.

    ``function`` takes a loaded model in eval mode and its processor (a tokenizer, for a model without images).
    """

    name: str
    function: Callable[[Any, Any], Any]
    roles: Mapping[str, Role] = field(default_factory=dict)

    def role(self, metric: str) -> Role:
        """Return the role of a metric."""
        return self.roles.get(metric, "gain")


_F = TypeVar("_F", bound=Callable[..., Any])


def evaluation(*, roles: Mapping[str, Role]) -> Callable[[_F], _F]:
    """Return a decorator that says what a merge should do to each metric of an evaluation.

    Args:
        roles: by metric, ``gain`` if the merge should improve it (as where none is given), or ``keep`` if it should
            not lower it.

    Raises:
        SnrfError: a role is neither.
    """
    checked = _roles("evaluation", roles)

    def mark(function: _F) -> _F:
        function.roles = checked  # type: ignore[attr-defined]
        return function

    return mark


AnyEvaluation = Evaluation | Callable[[Any, Any], Any] | str | os.PathLike[str]
"""An evaluation, a function of a model and its processor, or a reference to one."""


def load_evaluation(reference: AnyEvaluation) -> Evaluation:
    """Find an evaluation, and check what can be checked without a model.

    Values of arguments are written as in YAML. A callable's attribute ``roles``, which ``evaluation`` sets, says what a
    merge should gain and what it should keep. Python is imported, so it runs with the user's rights.
    """
    if isinstance(reference, Evaluation):
        return reference
    if isinstance(reference, os.PathLike):
        reference = os.fspath(reference)
    if not isinstance(reference, str):
        if not callable(reference):
            raise unexpected("eval", reference, "a function of a model and its processor, or a reference to one")
        name = f"{getattr(reference, '__module__', '')}:{getattr(reference, '__qualname__', type(reference).__name__)}"
        return _called(name, reference, {})
    if not reference:
        raise SnrfError(None, "is empty", "name an evaluation", field="eval")
    if reference.endswith(_YAML):
        from mergekit_snrf.evidence.exact_match import load_exact_match

        return Evaluation(reference, *load_exact_match(reference))
    place, _, query = reference.partition("?")
    found = _attribute(place) if ":" in place else _from_entry_point(reference, place)
    return _called(reference, found, _arguments(reference, query) if query else {})


def _called(reference: str, found: Any, arguments: dict[str, Any]) -> Evaluation:
    if not callable(found):
        what = f"is {type(found).__name__}, not callable"
        raise SnrfError(reference, what, "name a function of a model and its processor")
    try:
        inspect.signature(found).bind(None, None, **arguments)
    except TypeError as error:
        what = f"cannot be called with a model and its processor ({first_line(error)})"
        raise SnrfError(reference, what, "correct the function or its arguments") from None
    except ValueError:
        pass  # A function written in C may have no signature.
    return Evaluation(reference, partial(found, **arguments), _roles(reference, getattr(found, "roles", None)))


@torch.no_grad()
def evaluate(
    evaluation: Evaluation, model: PreTrainedModel, processor: Any, *, like: Scores | None = None
) -> dict[str, Items]:
    """Evaluate a model, which is put in eval mode; its metrics and items must be those of the scores ``like``."""
    model.eval()
    try:
        returned = evaluation.function(model, processor)
    except SnrfError as error:
        raise error.at(error.where or evaluation.name) from error
    except (Exception, SystemExit) as error:
        what = f"fails with {type(error).__name__}: {first_line(error)}"
        raise SnrfError(evaluation.name, what, "-vv shows where") from error
    if not isinstance(returned, Mapping) or not returned:
        what = f"returned {type(returned).__name__ if returned else 'nothing'}"
        raise SnrfError(evaluation.name, what, "return a mapping from the names of metrics to a score per item")
    scores = {}
    for metric, value in returned.items():
        if not isinstance(metric, str):
            raise SnrfError(evaluation.name, f"the name of a metric is {metric!r}", "use text for names")
        try:
            scores[metric] = as_items(value)
        except SnrfError as error:
            place = f"metric {metric!r}" + (f" {error.field}" if error.field else "")
            raise error.at(evaluation.name, field=place) from None
    if like is not None:
        check_alike(evaluation.name, like, scores)
    return scores


def _from_entry_point(reference: str, name: str) -> Any:
    points = entry_points(group=ENTRY_POINTS)
    for point in points:
        if point.name == name:
            return _imported(reference, point.load)
    known = ", ".join(sorted({point.name for point in points})) or "none is installed"
    what = "is neither a .yml file, nor path/file.py:name or package.module:name, nor an entry point of the group "
    raise SnrfError(reference, f"{what}{ENTRY_POINTS} ({known})", "correct the reference")


def _arguments(reference: str, query: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        return {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        what = f"{query!r} is not key=value&key=value ({first_line(error)})"
        raise SnrfError(reference, what, "correct the arguments") from None


def _roles(reference: str, roles: Any) -> Mapping[str, Role]:
    if roles is None:
        return {}
    if not isinstance(roles, Mapping) or not all(role in ("gain", "keep") for role in roles.values()):
        what = f"its roles must map metrics to 'gain' or 'keep', got {roles!r:.100}"
        raise SnrfError(reference, what, "correct the roles")
    return cast("Mapping[str, Role]", dict(roles))


def _attribute(reference: str) -> Any:
    """Return what ``package.module:name`` or ``path/file.py:name`` means. It is imported, with the user's rights."""
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        module = _module_at(reference, Path(where).expanduser())
    else:
        module = _imported(reference, lambda: importlib.import_module(where))
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            shown = ", ".join(sorted(public)) or "nothing that can be called"
            raise SnrfError(reference, f"has no attribute {attribute!r}", f"there is {shown}")
        found = getattr(found, name)
    return found


def _imported(reference: str, load: Callable[[], Any]) -> Any:
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
    _imported(reference, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module
