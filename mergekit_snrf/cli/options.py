"""Options of several commands, each declared once; those of the package's types come from the types' own fields."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mergekit_snrf.errors import SnrfError, invalid, naming, option
from mergekit_snrf.files.settings import Settings

_F = TypeVar("_F", bound=Callable[..., Any])

figures_option = click.option(
    "--figures", type=click.Path(file_okay=False), metavar="DIR", help="Write figures as SVG and PNG into this folder."
)


def settings_options(name: str, of: type[Settings], *fields: str) -> Callable[[_F], _F]:
    """Give a command the options of a type's fields, and pass what was typed as one argument ``name``.

    With all fields the argument is an instance, with some of them the dictionary to construct one.

    Args:
        name: of the command's argument.
        of: the type.
        fields: of it; none: all.
    """
    chosen = fields or tuple(of.model_fields)

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            given = {field: value for field in chosen if (value := options.pop(field)) is not None}
            try:
                options[name] = given if fields else construct(of, given)
            except SnrfError as error:
                raise click.ClickException(str(error)) from None
            return function(*args, **options)

        for field in reversed(chosen):
            wrapper = _option(field, of.model_fields[field])(wrapper)
        return wrapper  # type: ignore[return-value]

    return decorate


def construct(of: type[Settings], given: dict[str, Any]) -> Any:
    """Return an instance of a type.

    Raises:
        SnrfError: a value is not allowed, with its option.
    """
    with naming(option):
        try:
            return of(**given)
        except ValidationError as error:
            raise invalid(None, error.errors()) from None


def _option(name: str, field: FieldInfo) -> Callable[[_F], _F]:
    kind, metadata = field.annotation, list(field.metadata)
    while get_origin(kind) in (Union, UnionType, Annotated):
        if get_origin(kind) is Annotated:
            kind, *inner = get_args(kind)
            metadata += [part for one in inner for part in (one.metadata if isinstance(one, FieldInfo) else [one])]
        else:
            kind = next(part for part in get_args(kind) if part is not type(None))
    help_text = field.description
    if kind is bool:
        return click.option(option(name), is_flag=True, default=None, help=help_text)
    shown = field.default if isinstance(field.default, str | int | float) else None
    if shown is not None:
        help_text = f"{help_text} [default: {shown}]"
    return click.option(option(name), type=_type(kind, metadata), help=help_text)


def _type(kind: Any, metadata: list[Any]) -> click.ParamType:
    if get_origin(kind) is Literal:
        return click.Choice(list(map(str, get_args(kind))))
    if kind is not int:
        return click.FLOAT if kind is float else click.STRING
    limits = {bound: getattr(part, bound) for part in metadata for bound in ("ge", "lt") if hasattr(part, bound)}
    return click.IntRange(limits.get("ge"), limits["lt"] - 1 if "lt" in limits else None)
