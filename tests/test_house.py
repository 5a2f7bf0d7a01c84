"""The house rules that a program can check: sizes of modules and functions, unused code, and words of the prose.

The directions of imports are checked by `lint-imports` (`make lint`, contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import vulture

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_snrf"
MODULE_LINES, FUNCTION_LINES, ARGUMENTS = 350, 60, 8

# "path::function" or "path::callee": why it is longer or takes more.
LONG_FUNCTIONS: dict[str, str] = {}
_RECORD, _KERNEL = (
    "a record, made in one place",
    "matrices and where they are from; a record would be made for each call",
)
MANY_ARGUMENTS = {
    **{f"mergekit_snrf/fusion/fuse.py::{name}": _KERNEL for name in ("masked_update", "fuse")},
    "mergekit_snrf/evidence/controls.py::masked_update": _KERNEL,
    "mergekit_snrf/models/edits.py::fuse_neurons": _KERNEL,
    "mergekit_snrf/fusion/lowrank.py::Certificate": _RECORD,
    "mergekit_snrf/merge/draft.py::PlannedEdit": _RECORD,
    "mergekit_snrf/evidence/recipes.py::OpenedRecipe": _RECORD,
    "mergekit_snrf/profiling/impact/heads.py::HeadGroup": _RECORD,
    "mergekit_snrf/profiling/measure/capture.py::AttentionInputs": _RECORD,
}
# Names that no code of ours uses but others do: mergekit's and click's interfaces, pydantic's hooks, notebooks.
USED_ELSEWHERE = {
    "model_config",
    "__class__",
    "__path__",
    "__signature__",
    "__snrf__",
    "__spec__",
    "_execute",
    "_repr_html_",
    "_repr_png_",
    "config_yaml",
    "done_event",
    "epilog",
    "execute",
    "folded",
    "format_commands",
    "frame",
    "group_label",
    "input_dtypes",
    "layer_weights",
    "num_layers",
    "num_layers_config_key",
    "post_weights",
    "plan_tensor",
    "pre_weights",
    "supports_batching",
    "trace",
}
CALLED_BY_DECORATOR = ["@field_validator", "@model_validator", "@field_serializer", "@*.command", "@*.group"]
WORDS = (
    "shall",
    "told",
    "mend",
    "mends",
    "goes on with",
    "for want of",
    "nobody",
    "is no",
    "speaks",
    "knows",
    "what stands under",
    "refused by name",
)

Finding = tuple[str, int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def modules() -> dict[str, tuple[str, ast.Module]]:
    """Every module of the package by its path, as text and parsed."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    return {path: (text, ast.parse(text)) for path, text in texts.items()}


def functions() -> Iterator[tuple[str, Function]]:
    for path, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield path, node


def long_modules() -> Iterator[Finding]:
    for path, (text, _) in modules().items():
        if (lines := len(text.splitlines())) > MODULE_LINES:
            yield path, 1, f"{lines} lines"


def long_functions() -> Iterator[Finding]:
    for path, node in functions():
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION_LINES and f"{path}::{node.name}" not in LONG_FUNCTIONS:
            yield path, node.lineno, f"{node.name} has {lines} lines"


def long_signatures() -> Iterator[Finding]:
    for path, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > ARGUMENTS and f"{path}::{node.name}" not in MANY_ARGUMENTS:
            yield path, node.lineno, f"{node.name} takes {count} arguments"


def long_calls() -> Iterator[Finding]:
    for path, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (count := len(node.args) + len(node.keywords)) > ARGUMENTS:
                name = ast.unparse(node.func)
                if f"{path}::{name}" not in MANY_ARGUMENTS:
                    yield path, node.lineno, f"{name} is called with {count} arguments"


def unused_code() -> Iterator[Finding]:
    """What nothing in the package uses, except public names and what other packages call."""
    used = USED_ELSEWHERE | public_names()
    found = vulture.Vulture(ignore_decorators=CALLED_BY_DECORATOR)
    found.scavenge([PACKAGE])
    for item in found.get_unused_code(min_confidence=60):
        if item.name in used:
            continue
        path = Path(item.filename).resolve().relative_to(ROOT).as_posix()
        yield path, item.first_lineno, f"{item.typ} {item.name} is not used"


def public_names() -> set[str]:
    """Names that the documentation, the examples or other packages use."""
    texts = [PACKAGE / "__init__.py"]
    for pattern in ("docs/**/*.md", "docs/*.py", "examples/**/*.py"):
        texts += ROOT.glob(pattern)
    return {name for path in texts for name in re.findall(r"\w+", path.read_text("utf-8")) if not name.isdigit()}


def forbidden_words() -> Iterator[Finding]:
    """Old-fashioned prose in code, comments, docstrings and messages; see CONTRIBUTING.md."""
    pattern = re.compile(r"(?<![\w_-])(?<!there )(" + "|".join(map(re.escape, WORDS)) + r")(?![\w_-])", re.IGNORECASE)
    for path in [*sorted(PACKAGE.rglob("*")), *sorted(ROOT.glob("docs/**/*.md")), *documents()]:
        if path.suffix not in (".py", ".md", ".jinja"):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            for match in pattern.finditer(line):
                yield path.relative_to(ROOT).as_posix(), number, match.group()


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    return [path for path in [*found, *sorted(ROOT.glob("examples/**/README.md"))] if path.exists()]


RULES: tuple[Callable[[], Iterator[Finding]], ...] = (
    long_modules,
    long_functions,
    long_signatures,
    long_calls,
    unused_code,
    forbidden_words,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[], Iterator[Finding]]) -> None:
    findings = [f"{path}:{line}: {what}" for path, line, what in rule()]
    assert not findings, "\n".join(findings)


def test_exceptions_are_still_needed() -> None:
    """An exception whose function is gone is removed from the list."""
    names = {f"{path}::{node.name}" for path, node in functions()}
    calls = {
        f"{path}::{ast.unparse(node.func)}"
        for path, (_, tree) in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert set(LONG_FUNCTIONS) | set(MANY_ARGUMENTS) <= names | calls


if __name__ == "__main__":  # python tests/test_house.py lists every finding
    for rule in RULES:
        print(rule.__name__)
        for path, line, what in rule():
            print(f"  {path}:{line}: {what}")
