"""What commands share: verbosity, errors in one line, checked outputs, loaded models and tables."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_snrf.errors import SnrfError, option, os_reason
from mergekit_snrf.files.markdown import share as share
from mergekit_snrf.files.writing import check_writable, cleaning_up_when_terminated, write_text

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mergekit_snrf.evidence.drawing import Drawing
    from mergekit_snrf.evidence.results import Study
    from mergekit_snrf.files.settings import Settings

_F = TypeVar("_F", bound=Callable[..., Any])


def command_options(function: _F) -> _F:
    """Give a command ``-v`` and ``--quiet``.

    ``SnrfError`` becomes one line and exit code 1 (with -vv a traceback), Ctrl-C exit code 130.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, verbosity: int, quiet: bool, **kwargs: Any) -> Any:
        level = logging.DEBUG if verbosity > 1 else logging.INFO if verbosity else logging.WARNING
        logging.basicConfig(level=logging.ERROR if quiet else level)
        try:
            with cleaning_up_when_terminated():
                return function(*args, **kwargs)
        except SnrfError as error:
            if verbosity > 1:
                raise
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            command = click.get_current_context().command
            resumes = any(parameter.name == "resume" for parameter in command.params)
            click.echo(f"\nInterrupted{'; continue with --resume' if resumes else ''}.", err=True)
            raise click.exceptions.Exit(130) from None

    quiet_option = click.option("-q", "--quiet", is_flag=True, help="Suppress progress bars and warnings.")
    verbose = click.option("-v", "verbosity", count=True, help="Verbose logging (repeat for more verbosity).")
    return verbose(quiet_option(wrapper))  # type: ignore[return-value]


def is_quiet() -> bool:
    """Tell whether the running command was given ``--quiet``."""
    return bool(click.get_current_context().params.get("quiet"))


def say(text: object) -> None:
    """Print text; to standard error where JSON goes to standard output."""
    click.echo(text, err=click.get_current_context().params.get("json_file") == "-")


def silence_progress(*, quiet: bool | None = None) -> None:
    """Under ``--quiet``, switch off the progress bars of transformers and datasets; before either loads anything."""
    if not (is_quiet() if quiet is None else quiet):
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def check_outputs(json_file: str | None, figures: str | None = None) -> None:
    """Raise ``SnrfError`` before a model runs where its results could not be written; make the folder of figures."""
    if json_file not in (None, "-"):
        check_writable(json_file)
    if figures is not None:
        try:
            Path(figures).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SnrfError(figures, f"cannot be made ({os_reason(error)})", "choose another folder") from None


def write_outputs(
    result: BaseModel | None,
    json_file: str | None,
    figures: str | None = None,
    drawings: Iterable[tuple[str, Drawing]] | None = None,
) -> list[Path]:
    """Write a result as JSON, and its drawings, or others, with the names of their files; return the figures' paths."""
    from mergekit_snrf.evidence.drawing import save
    from mergekit_snrf.evidence.results import result_text, write_result

    if result is not None and json_file == "-":
        click.echo(result_text(result))
    elif result is not None and json_file is not None:
        write_result(json_file, result)
    if figures is None:
        return []
    if drawings is None:
        from mergekit_snrf.evidence import views

        drawings = views.drawings(result).items()
    return [path for name, one in drawings for path in save(one.figure, figures, name, one.caption, one.text)]


def write_json(json_file: str | None, content: object) -> None:
    """Write JSON to a file, or print it."""
    text = json.dumps(content, indent=2)
    if json_file == "-":
        click.echo(text)
    elif json_file is not None:
        write_text(json_file, text + "\n")


def path_from(folder: Path, path: str) -> str:
    """Return a relative path of this machine as it is from another folder; hub ids and absolute paths stay."""
    if os.path.isabs(path) or not os.path.exists(path):
        return path
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows under a header; the first column is flush left, the others flush right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def size(count: int) -> str:
    """Format a number of bytes in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def study_text(study: Study) -> str:
    """Return a study as text: a table per metric, and the verdict."""
    from mergekit_snrf.evidence.wording import study_table

    parts = []
    for metric in study.items:
        one = study_table(study, metric)
        parts.append(table((one.caption, *one.header[1:]), one.rows))
    intervals = f"[{100 * study.level:g} % intervals]: paired bootstrap over items and draws, seed {study.seed}."
    return "\n\n".join([*parts, "\n".join([intervals, *study.verdict, *study.notes])])


def options_of(*types: type[Settings], **more: str) -> dict[str, str]:
    """Return the options of the fields of some types, for ``naming``: other fields are keys of files."""
    return {field: option(field) for of in types for field in of.model_fields} | more
