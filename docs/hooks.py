"""mkdocs hooks: pages that lie elsewhere in the repository, and tables that come from the code."""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/scaling.svg")


def outside() -> list[str]:
    """Files outside of docs/ that are part of the site."""
    examples = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("examples/**/README.md"))]
    return [*OUTSIDE, *examples]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them under the path that they have in the repository."""
    for path in outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables and turn links to files of the repository into links of the site."""
    here = PurePosixPath(page.file.src_uri)
    folder = here.parent if here.as_posix() in outside() else PurePosixPath("docs") / here.parent
    known = {file.src_uri for file in files}

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        place = os.path.normpath(folder / target)
        uri = place.removeprefix("docs/")
        if uri in known:
            return f"{text}({os.path.relpath(uri, here.parent)}{anchor})"
        # Not on the site: name the file instead.
        return f"`{place}`"

    pattern = r"(?P<text>!?\[[^\]]*\])\((?!https?:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)"
    markdown = re.sub(pattern, link, markdown)
    return re.sub(r"<!-- table: (\w+) -->", lambda match: TABLES[match[1]](), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Options without a default: mkdocs-click shows click's marker for them."""
    return html.replace("<code>Sentinel.UNSET</code>", "none")


def recipe_table() -> str:
    """Parameters of a recipe."""
    from mergekit_snrf.fusion.fuse import settings
    from mergekit_snrf.merge.method import SPEC

    rows = ["| parameter | where | default | range | meaning |", "|---|---|---|---|---|"]
    for one in SPEC.parameters:
        known = settings().get(one.name)
        where = "source or top level" if known is not None and known.by_tensor else "top level"
        default = "required" if one.name == "masks" else code(one.default)
        if known is not None and known.of_regmean is not None:
            default = code(f"{one.default} (regmean: {known.of_regmean:g})")
        limits = "" if known is None else known.range
        rows.append(f"| `{one.name}` | {where} | {default} | {cell(limits)} | {cell(one.description)} |")
    return "\n".join(rows)


def profile_table() -> str:
    """Keys of profile.yml, from its types."""
    from mergekit_snrf.profiling.settings import ProfileConfig

    return settings_table(ProfileConfig)


def domains_table() -> str:
    """Keys of profile.yml with domains that other runs do not have."""
    from mergekit_snrf.profiling.domains import DomainsConfig
    from mergekit_snrf.profiling.settings import RunConfig

    return (
        f"{settings_table(DomainsConfig, without=RunConfig)}\n\nThe other keys are those of [Profiling](profiling.md)."
    )


def settings_table(config: type[BaseModel], without: type[BaseModel] | None = None) -> str:
    """Keys of a type of settings: its own, then, unless they are left out, those of the type that it extends."""
    inherited = {key for base in config.__mro__[1:] if issubclass(base, BaseModel) for key in base.model_fields}
    found = sorted(keys(config), key=lambda row: row[0].partition(".")[0] in inherited)
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field, description in found:
        if without is not None and name.partition(".")[0] in without.model_fields:
            continue
        if name.startswith("source."):
            continue
        if name == "source":
            description = "the text-only model and its probes; the same keys as `target`"
        default = "required" if field.is_required() else code(field.get_default(call_default_factory=True))
        nested = model_of(field.annotation) is not None
        values = "mapping" if nested else values_of(field.annotation)
        rows.append(
            f"| `{name}` | {values} | {'' if nested and default != 'required' else default} | {cell(description)} |"
        )
    return "\n".join(rows)


def api_reference() -> str:
    """One entry of mkdocstrings for each public name, functions last."""
    import mergekit_snrf

    public = {name: getattr(mergekit_snrf, name) for name in dir(mergekit_snrf) if not name.startswith("_")}
    objects = {
        name: each for name, each in public.items() if getattr(each, "__module__", "").startswith("mergekit_snrf.")
    }
    ordered = sorted(objects, key=lambda name: (not isinstance(objects[name], type), name.lower()))
    entry = "::: {path}\n    options: {{heading: snrf.{name}, toc_label: {name}}}"
    paths = {name: f"{objects[name].__module__}.{objects[name].__qualname__}" for name in ordered}
    return "\n\n".join(entry.format(path=path, name=name) for name, path in paths.items())


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, str]]:
    """Fields of a settings type and of those inside it, with what they mean."""
    documented = attributes(model)
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field, field.description or documented.get(name, "")
        if inner := model_of(field.annotation):
            yield from keys(inner, f"{prefix}{name}.")


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings type in an annotation, if there is one."""
    options = [annotation, *typing.get_args(annotation)]
    return next((each for each in options if isinstance(each, type) and issubclass(each, BaseModel)), None)


def attributes(model: type) -> dict[str, str]:
    """The attributes that a docstring describes."""
    text = inspect.getdoc(model) or ""
    section = text.partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def values_of(annotation: Any) -> str:
    """What may be written for a key."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in options)
    if origin is typing.Annotated:
        return values_of(options[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(values_of(each) for each in options if each is not type(None)))
    if origin in (dict, list, tuple):
        return {dict: "mapping", list: "list", tuple: "list"}[origin]
    return {str: "text", float: "number", int: "whole number", bool: "`true`, `false`"}.get(annotation, "")


def code(value: Any) -> str:
    """A default as code, or `none`."""
    if value is None or value == "":
        return "none"
    value = getattr(value, "value", value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str | None) -> str:
    """Text that fits into a cell of a table."""
    return " ".join((text or "").replace("``", "`").replace("|", r"\|").split())


TABLES: dict[str, Callable[[], str]] = {
    "recipe": recipe_table,
    "profile": profile_table,
    "domains": domains_table,
    "api": api_reference,
}
