"""How figures look: matplotlib's style, and SVG and PNG files whose bytes are equal for equal figures.

Every figure is readable on light and dark pages and by the colour-blind. What is drawn needs the extra ``analysis``; a
function that misses a package of it raises ``SnrfError``. Pyplot's state and the user's settings are left alone.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from xml.etree import ElementTree

from mergekit_snrf.errors import SnrfError, printable
from mergekit_snrf.files.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_T = TypeVar("_T")

INK = "#767676"
"""Text and lines: as well readable on white as on black; a page puts its own text colour in its place."""

COLORS = ("#2f7fd6", "#d0701a", "#1a9a6c", "#a566c9", "#c44e6c")
"""At least 3:1 on white and on near-black."""

CHANCE = "#9a7b00"
"""What chance would give; as readable as the others."""

WIDTH = 4.6
"""Inches. Narrow enough to be read on a phone."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "mergekit-snrf",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption and its alternative text."""

    figure: Figure
    caption: str
    text: str


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        # A token may be in a script that the font lacks; an SVG viewer has others.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def styled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a function that draws under the package's style."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            with _style():
                return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            remedy = "pip install 'mergekit-snrf[analysis]'"
            raise SnrfError(None, f"figures need the package {error.name}", remedy) from None

    return wrapper


def new_figure(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of a height in inches, and its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    # Notebooks show the figure also where pyplot, whose state is left alone, was never imported.
    figure._repr_png_ = partial(png, figure)  # type: ignore[attr-defined]
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, panel + 1) for panel in range(rows * columns)]


def percent_axis(axis: Axis) -> None:
    """Label an axis of shares in per cent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def plain_axis(axis: Axis) -> None:
    """Label an axis with numbers written out, as powers of ten: the style takes mathematics as text."""
    axis.set_major_formatter(lambda value, _: f"{value:.10g}")
    axis.set_minor_formatter(lambda value, _: "")


@styled
def png(figure: Figure, **options: Any) -> bytes:
    """Return a figure as PNG, transparent."""
    image = io.BytesIO()
    figure.savefig(image, format="png", **{"dpi": 150, **options})
    return image.getvalue()


@styled
def svg(figure: Figure, title: str, text: str, prefix: str = "figure", ink: str = INK) -> str:
    """Return a figure as an SVG element with a title and an alternative text.

    All ids begin with ``prefix``. Text and lines have the colour ``ink``: ``currentColor`` takes that of the page.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == "href" or value.startswith("url(#"):
                element.set(name, value.replace("#", f"#{prefix}-", 1))
            elif name == "style":
                element.set(name, value.replace(INK, ink))
    # A style element would apply to the whole page.
    for defs in root.findall("defs"):
        for style in defs.findall("style"):
            defs.remove(style)
    title, text = printable(title), printable(text)
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": f"{title}. {text}",
        "style": "stroke-linejoin: round; stroke-linecap: butt",
    }
    for position, (tag, content) in enumerate({"title": title, "desc": text}.items()):
        element = ElementTree.Element(tag)
        element.text = content
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


@styled
def save(figure: Figure, folder: str | os.PathLike[str], name: str, title: str, text: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` (200 pixels an inch, transparent); return the paths."""
    metadata = {"Software": None, "Title": printable(title), "Description": printable(text)}
    image = png(figure, dpi=200, metadata=metadata)
    contents = {".svg": f"{svg(figure, title, text, name)}\n".encode(), ".png": image}
    paths = {Path(folder) / f"{name}{suffix}": content for suffix, content in contents.items()}
    for path, content in paths.items():
        with replacing(path) as file:
            file.write(content)
    return list(paths)
