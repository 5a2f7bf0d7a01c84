"""What notebooks show of the package's objects.

Rooms below ``evidence`` import nothing of how they are shown. The package itself, which stands above all rooms, says
with ``show_with`` where that is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


_loaders: list[Callable[[], Any]] = []


def show_with(load: Callable[[], Any]) -> None:
    """Set what returns a module with ``html``, ``frame`` and ``plot`` when an object is first shown."""
    _loaders[:] = [load]


class Shown:
    """An object that notebooks show as tables."""

    def _repr_html_(self) -> str:
        found: str = _loaders[0]().html(self)
        return found


class Plotted(Shown):
    """An object that notebooks show as tables, and that becomes a data frame and figures."""

    def to_frame(self) -> DataFrame:
        """Return the numbers as a pandas data frame."""
        found: DataFrame = _loaders[0]().frame(self)
        return found

    def plot(self, figure: str | None = None) -> Figure:
        """Return a matplotlib figure; ``figure`` names one of several, as ``--figures`` names its files.

        ``SnrfError``: there is no such figure, or matplotlib is missing.
        """
        found: Figure = _loaders[0]().plot(self, figure)
        return found
