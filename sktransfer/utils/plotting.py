"""Axes for plots, without pyplot."""

from __future__ import annotations

from typing import Any

from sktransfer.utils.errors import import_optional


def new_axes(ax: Any, purpose: str) -> Any:
    """Return `ax`, or the axes of a new figure that pyplot does not manage.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    figure_class = import_figure(purpose)
    return figure_class(layout="constrained").subplots() if ax is None else ax


def import_figure(purpose: str) -> Any:
    """Import matplotlib's Figure.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import_optional("matplotlib", extra="plot", purpose=purpose)
    from matplotlib.figure import Figure

    return Figure
