"""Plots of analyses and simulations, into SVG, PNG or PDF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from heddle.report._style import STYLE
from heddle.trace._analyze import Analysis
from heddle.trace._simulate import Reservation

_COLORS = {"optimum": "#1b2230", "lru": "#2463d6", "fifo": "#c98a00", "previous": "#7d45d1", "page-lru": "#c8461b"}
_BAR, _LINE = "#9db8ec", "#c8461b"


def draw_analysis(analysis: Analysis, path: Path) -> None:
    """The distributions side by side, each with its mean."""
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7), layout="constrained")
        for axes, (name, d) in zip(figure.subplots(2, 3).flat, analysis.distributions.items(), strict=True):
            edges, counts = d.histogram(60)
            distribution(axes, name, d.title, d.unit, edges, counts, d.mean, d.quantile(0.5))
        figure.savefig(path)


def distribution(
    axes: Axes, name: str, title: str, unit: str, edges: np.ndarray, counts: np.ndarray, mean: float, median: float
) -> None:
    """One of them, as bars."""
    title = f"{name.replace('_', ' ')}: {title}"
    if len(counts):
        axes.bar(edges[:-1], counts / counts.sum(), np.diff(edges), align="edge", color=_BAR)
        axes.axvline(mean, color=_LINE, linewidth=1.4)
        title += f"\nmean {mean:.3g}, median {median:.3g}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit)
    axes.set_ylabel("share")
    if name == "persistence":
        axes.set_yscale("log")


def draw_simulation(results: Sequence[Reservation], path: Path) -> None:
    """Hit rate and slowdown over the reserved size."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        reservations(figure, results)
        figure.savefig(path)


def reservations(figure: Figure, results: Sequence[Reservation]) -> None:
    """The two of them side by side."""
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(r.policy for r in results):
        line = sorted((r for r in results if r.policy == policy), key=lambda r: r.tokens)
        x = [r.megabytes for r in line]
        style = {"color": _COLORS[policy], "marker": "o", "markersize": 4, "label": policy}
        left.plot(x, [100 * r.hit_rate for r in line], **style)
        right.plot(x, [r.slowdown for r in line], **style)
    left.set_ylabel("selected tokens that hit, %")
    right.set_ylabel("slowdown of a step")
    for axes in (left, right):
        axes.set_xlabel("reserved, MB")
        axes.set_ylim(bottom=0 if axes is left else None)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    right.legend(frameon=False)
