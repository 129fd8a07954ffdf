"""What all plots of heddle share: the style, SVG to put into a page, an axis for differences of losses."""

from __future__ import annotations

import io
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

INK, FAINT, GRID = "#1b2230", "#667085", "#e4e7ec"
STYLE = {
    "font.size": 10.5,
    # Text stays text, in the page's own font.
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}


def svg(name: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """The drawing as an <svg> element to put into a page. `name` keeps its ids apart from other plots'."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]


def differences(axes: Axes, largest: float) -> None:
    """A y axis for loss differences: linear within ±0.01, logarithmic beyond."""
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.9)
    ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10]
    axes.set_yticks(ticks, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks], minor=False)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.02 if largest < 0.01 else -0.01, max(0.02, 2.5 * largest))
    axes.axhline(0, color=FAINT, linewidth=1)
