"""What notebooks show of the package's objects.

Rooms below ``evidence`` know nothing of how they are shown: these methods find ``evidence.views`` when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Shown:
    """An object that notebooks show as tables."""

    def _repr_html_(self) -> str:
        from mergekit_snrf.evidence import views

        return views.html(self)


class Plotted(Shown):
    """An object that notebooks show as tables, and that becomes a data frame and figures."""

    def to_frame(self) -> DataFrame:
        """Return the numbers as a pandas data frame."""
        from mergekit_snrf.evidence import views

        return views.frame(self)

    def plot(self, figure: str | None = None) -> Figure:
        """Return a matplotlib figure; ``figure`` names one of several, as ``--figures`` names its files.

        Raises:
            SnrfError: there is no such figure, or matplotlib is missing.
        """
        from mergekit_snrf.evidence import views

        return views.plot(self, figure)
