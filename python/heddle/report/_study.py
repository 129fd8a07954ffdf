"""The plots of the study's report, as SVG, and what its page needs besides."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from heddle.report._style import FAINT, INK, differences, svg
from heddle.study import _blocks, _budget, _int8
from heddle.trace._plots import distribution, reservations
from heddle.trace._simulate import Reservation

_COLORS = {
    "qk": "#1b2230",
    "oam": "#2463d6",
    "oam_log": "#6fa0ff",
    "loo": "#1a8f5a",
    "pages": "#c98a00",
    "dsa": "#c8461b",
    "window": "#8b93a1",
    "iid": "#e08bb0",
    "stratified": "#a05fd0",
    "systematic": "#5f2aa8",
    "systematic_tile": "#b7a3d8",
    "int8-baseline": "#c8461b",
    "int8-b": "#7d45d1",
    "int8-a": "#2463d6",
}
# Draws of values, beside choices of keys.
_DASHED = ("iid", "stratified", "systematic", "systematic_tile")


def plots(record: dict[str, Any]) -> dict[str, str]:
    """The plot of each section of the record, by the section's name."""
    drawn = {}
    for name, part in record["sections"].items():
        draw, width, height = _PLOTS[name.split("-")[0]]
        result = part["result"]
        height = height(result) if callable(height) else height
        drawn[name] = svg(name, width, height, lambda figure, draw=draw, result=result: draw(figure, result))
    return drawn


def context(record: dict[str, Any]) -> dict[str, Any]:
    """Names and colors for the page."""
    return {
        "labels": _budget.LABELS | _blocks.LABELS | _int8.LABELS,
        "color": lambda name: _COLORS.get(name, FAINT),
        "by_key": {
            section: {(row["method"], row["budget"]): row for row in part["result"]["rows"]}
            for section, part in record["sections"].items()
            if section.startswith("budget")
        },
    }


def _powers(axes: Axes, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _percents(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())


def _budgets(figure: Figure, result: dict[str, Any]) -> None:
    panels = figure.subplots(1, 3)
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows})
    differences(panels[0], max(row["loss_difference"]["mean"] for row in rows))
    lowest = min(row["loss_difference"]["mean"] - row["loss_difference"]["se"] for row in rows)
    panels[0].set_ylim(bottom=min(panels[0].get_ylim()[0], 1.5 * lowest))
    for method in dict.fromkeys(row["method"] for row in rows):
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["budget"])
        style = {
            "color": _COLORS[method],
            "linewidth": 1.6,
            "linestyle": "--" if method in _DASHED else "-",
            "marker": "o",
            "markersize": 3.5,
        }
        x = [row["budget"] for row in line]
        loss = [row["loss_difference"] for row in line]
        bars = {"capsize": 0, "elinewidth": 0.8}
        panels[0].errorbar(
            x, [a["mean"] for a in loss], [a["se"] for a in loss], label=_budget.LABELS[method], **bars, **style
        )
        panels[1].plot(x, [row["error"] for row in line], **style)
        if line[0]["mass"] is not None:
            panels[2].plot(x, [row["mass"] for row in line], **style)
    _percents(panels[1])
    for axes, name in zip(panels, ("loss − dense, nats", "error of the output", "attention mass kept"), strict=True):
        _powers(axes, budgets)
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_title(name, loc="left", fontsize=10.5, color=FAINT)
        axes.set_xlabel("keys, or samples")
    panels[2].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, handlelength=1.6)


def _bars(figure: Figure, result: dict[str, Any]) -> None:
    rows = result["rows"]
    at = np.arange(len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    inks = ["#2463d6" if row["method"].startswith("stem") else "#c98a00" for row in rows]
    loss = [row["loss_difference"] for row in rows]
    left.barh(at, [a["mean"] for a in loss], xerr=[a["se"] for a in loss], color=inks, height=0.62, ecolor=FAINT)
    right.barh(at, [100 * row["error"] for row in rows], color=inks, height=0.62)
    for axes, name in ((left, "loss − dense, nats"), (right, "error of the output, %")):
        axes.set_title(name, loc="left", fontsize=10.5, color=FAINT)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    names = [f"{_blocks.LABELS[row['method']]}, {100 * row['density']:.0f} %" for row in rows]
    left.set_yticks(at, names)
    left.tick_params(axis="y", labelcolor=INK)
    left.axvline(0, color=FAINT, linewidth=1)
    left.invert_yaxis()


def _layers(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    for row in result["rows"]:
        name = f"{_int8.LABELS[row['scheme']]}{', K smoothed' if row['smooth'] else ''}"
        style = {"color": _COLORS[row["scheme"]], "linestyle": "-" if row["smooth"] else "--", "linewidth": 1.6}
        axes.plot(row["error_by_layer"], label=name, **style)
    _percents(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the output")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _variances(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    for line in result["slopes"]:
        x = [point["samples"] for point in line["points"]]
        style = {"color": _COLORS[line["method"]], "linewidth": 1.6}
        name = f"{line['label']}: slope {line['slope']:.2f}".replace("-", "−")
        axes.plot(x, [point["measured"] for point in line["points"]], "o-", markersize=4, label=name, **style)
        closed = [point["closed"] for point in line["points"]]
        if None not in closed:
            label = f"{line['label']}, closed form"
            axes.plot(x, closed, color=INK, linestyle=":", linewidth=1.6, label=label, zorder=4)
    axes.set_yscale("log")
    _powers(axes, [point["samples"] for point in result["slopes"][0]["points"]])
    axes.set_xlabel("samples")
    axes.set_ylabel("variance of the output (trace)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _access(figure: Figure, result: dict[str, Any]) -> None:
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    for axes, (name, d) in zip(top.subplots(2, 3).flat, result["distributions"].items(), strict=True):
        edges, counts = (np.asarray(d["histogram"][key]) for key in ("edges", "counts"))
        distribution(axes, name, d["title"], d["unit"], edges, counts, d["mean"], d["quantiles"]["0.5"])
    reservations(bottom, [Reservation(**row) for row in result["reservation"]])


_PLOTS: dict[str, Any] = {
    "budget": (_budgets, 13.0, 4.6),
    "blocks": (_bars, 11.0, lambda result: 0.7 + 0.36 * len(result["rows"])),
    "int8": (_layers, 10.4, 4.0),
    "sampling": (_variances, 10.4, 4.2),
    "dsa": (_access, 13.0, 11.0),
}
