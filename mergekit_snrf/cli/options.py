"""Options of several commands, each declared once; those of the package's types come from the types' own fields."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from mergekit_snrf.errors import SnrfError, naming, option
from mergekit_snrf.evidence.options import Reading
from mergekit_snrf.files import settings
from mergekit_snrf.files.settings import Settings, own_first
from mergekit_snrf.models.reference import ModelRef

_F = TypeVar("_F", bound=Callable[..., Any])

SEEDS = click.IntRange(0, 2**32 - 1)

mask_option = click.option("--mask", required=True, metavar="MASK", help="A file, or hf://owner/repo@revision/path.")
eval_help = "file.yml (exact match), path/file.py:name, package.module:name, or an entry point."
eval_option = click.option("--eval", "reference", required=True, metavar="EVAL", help=eval_help)
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Tensors computed at once, a thread each; default: the cores."
)
json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write everything as JSON, to FILE or in place of the text.",
)
recipe_argument = click.argument("recipe", metavar="RECIPE.yml", type=click.Path(dir_okay=False, allow_dash=True))
figures_option = click.option(
    "--figures", type=click.Path(file_okay=False), metavar="DIR", help="Write figures as SVG and PNG into this folder."
)


def _bundle(name: str, fields: Sequence[str], options: Sequence[Callable[[Any], Any]]) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> Any:
            given[name] = {field: given.pop(field) for field in fields}
            return function(*args, **given)

        for add in reversed(options):
            wrapper = add(wrapper)
        return wrapper  # type: ignore[return-value]

    return decorate


def device_options(function: _F) -> _F:
    """Give a command ``--device`` and ``--cuda``: an available ``device`` in its argument ``reading``."""

    @functools.wraps(function)
    def wrapper(*args: Any, device: str | None, cuda: bool, reading: dict[str, Any], **given: Any) -> Any:
        device = device or ("cuda" if cuda else None)
        if device is not None:
            from mergekit_snrf.models.loading import find_device

            try:
                with naming(option):
                    find_device(device)
            except SnrfError as error:
                raise click.ClickException(str(error)) from None
        return function(*args, reading={**reading, "device": device}, **given)

    add = click.option("--device", metavar="NAME", help="Where tensors are computed, such as cuda:1; default: the CPU.")
    return add(click.option("--cuda", is_flag=True, help="Short for --device cuda.")(wrapper))  # type: ignore[return-value]


selection_options = _bundle(
    "rule",
    ("top_ratio", "sigma", "at_least"),
    (
        click.option("--top-ratio", metavar="SHARE", help="The strongest share, such as 0.1 or attn=0.3,fwd=0.1."),
        click.option("--sigma", metavar="NUMBER", help="Impacts of at least this; also by projection, as --top-ratio."),
        click.option("--at-least", metavar="SHARE|COUNT", help="Active on this share or number of probes, not on all."),
    ),
)
"""One argument ``rule``, for ``Selection.of``."""


def settings_options(name: str, of: type[Settings], *fields: str) -> Callable[[_F], _F]:
    """Give a command the options of a type's fields, and pass what was typed as one argument ``name``.

    With all fields the argument is an instance, with some of them the dictionary to construct one.
    """
    chosen = fields or own_first(of)

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            given = {field: value for field in chosen if (value := options.pop(field)) not in (None, ())}
            try:
                options[name] = given if fields else construct(of, given)
            except SnrfError as error:
                raise click.ClickException(str(error)) from None
            return function(*args, **options)

        for field in reversed(chosen):
            wrapper = _option(field, of.model_fields[field])(wrapper)
        return wrapper  # type: ignore[return-value]

    return decorate


recipe_options = settings_options("reading", Reading, "transformers_cache", "lora_merge_cache", "trust_remote_code")
"""How the models of a recipe are read: one argument ``reading``, for ``MergeOptions``."""


def run_options(function: _F) -> _F:
    """Give a command ``resume``, and one argument ``overrides`` for ``ProfileConfig.override``."""
    fields = ("device", "dtype", "trust_remote_code", "limit")
    options = [_option(field, ModelRef.model_fields[field], "Overrides PROFILE.yml.") for field in fields[:-1]]
    limit = click.option("--limit", type=click.IntRange(1), help="Probes of each data set. Overrides PROFILE.yml.")
    resume = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
    return resume(_bundle("overrides", fields, (*options, limit))(function))


def construct(of: type[Settings], given: dict[str, Any]) -> Any:
    """Return an instance of a type; ``SnrfError`` names the option of a value that is not allowed."""
    with naming(option):
        return settings.construct(of, given)


def _option(name: str, field: FieldInfo, note: str | None = None) -> Callable[[_F], _F]:
    kind, metadata = field.annotation, list(field.metadata)
    while get_origin(kind) in (Union, UnionType, Annotated):
        if get_origin(kind) is Annotated:
            kind, *inner = get_args(kind)
            metadata += [part for one in inner for part in (one.metadata if isinstance(one, FieldInfo) else [one])]
        else:
            kind = next(part for part in get_args(kind) if part is not type(None))
    help_text = f"{field.description} {note}" if note else field.description
    if kind is bool:
        return click.option(option(name), is_flag=True, default=None, help=help_text)
    many = isinstance(field.default, tuple)
    shown = ",".join(map(str, field.default)) if many else field.default
    if isinstance(shown, str | int | float) and shown != "" and note is None:
        help_text = f"{help_text} [default: {shown}]"
    # A list that is empty by default is an option to repeat, another one is separated by commas.
    repeats = many and not field.default
    # Shells complete paths.
    of = click.Path() if field.title == "PATH" else _type(kind, metadata)
    return click.option(option(name), type=of, multiple=repeats, metavar=field.title, help=help_text)


def _type(kind: Any, metadata: list[Any]) -> click.ParamType:
    if get_origin(kind) is Literal:
        return click.Choice(list(map(str, get_args(kind))))
    limits = {bound: getattr(part, bound) for part in metadata for bound in ("ge", "lt") if hasattr(part, bound)}
    if kind is float and limits:
        return click.FloatRange(limits.get("ge"), limits.get("lt"), max_open=True)
    if kind is not int:
        return click.FLOAT if kind is float else click.STRING
    return click.IntRange(limits.get("ge"), limits["lt"] - 1 if "lt" in limits else None)
