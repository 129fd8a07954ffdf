"""The plots of the demo's report, as SVG."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from heddle.report._style import FAINT, INK, differences, svg

# They agree but for rounding.
_EXACT = ("sdpa", "dense")
_COLORS = {
    "sdpa": "#8b93a1",
    "dense": "#1b2230",
    "window": "#1a8f5a",
    "strided": "#8aa624",
    "int8-baseline": "#c8461b",
    "int8-a": "#2463d6",
    "int8-b": "#7d45d1",
    "fp8": "#c98a00",
}


def color(name: str) -> str:
    """Of a variant, in all plots and tables."""
    return _COLORS.get(name, FAINT)


def _label_right(axes: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Names the points (x, y, text, color) at their right, moved apart vertically where names would touch."""
    axes.figure.draw_without_rendering()
    spacing = 14 * axes.figure.dpi / 72
    placed: list[tuple[float, float]] = []
    for x, y, text, ink in sorted(points, key=lambda point: point[1]):
        at_x, at_y = axes.transData.transform((x, y))
        label_y = at_y
        while near := [py for px, py in placed if abs(px - at_x) < 130 and abs(py - label_y) < spacing - 0.01]:
            label_y = max(near) + spacing
        placed.append((at_x, label_y))
        offset = (9, (label_y - at_y) * 72 / axes.figure.dpi)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.annotate(text, (x, y), offset, textcoords="offset points", va="center", color=ink, bbox=paper)


def quality(results: dict[str, Any]) -> str:
    """Loss difference against the bytes of KV that one decoded token reads."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        variants = results["variants"]
        differences(axes, max(v["loss_difference"] for v in variants))
        axes.set_xscale("log", base=2)
        reads = [v["kv_bytes_read_per_step"] / 2**20 for v in variants]
        axes.set_xlim(0.75 * min(reads), 1.9 * max(reads))
        points = []
        for v, read in zip(variants, reads, strict=True):
            ink, y = color(v["name"]), v["loss_difference"]
            axes.errorbar(read, y, v["loss_difference_se"], color=ink, linewidth=1.2, capsize=0, zorder=2)
            axes.plot(read, y, "o", color=ink, markersize=8, markeredgecolor="white", zorder=3)
            points.append((read, y, v["label"], ink))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("KV read for one decoded token, MiB (all layers)")
        axes.set_ylabel("loss − dense")
        _label_right(axes, points)

    return svg("quality", 9.6, 4.4, draw)


def _named_lines(axes: Axes, lines: list[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Lines (variant, label, x, y) and a legend in the order of their last points."""
    for name, label, x, y in sorted(lines, key=lambda line: -line[3][-1]):
        axes.plot(x, y, color=color(name), linewidth=1.8, label=label, marker="o" if len(x) == 1 else None)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=1.4)


def layers(results: dict[str, Any]) -> str:
    """The attention output's error, layer by layer."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines = []
        # SDPA's is rounding, orders of magnitude below.
        for v in [v for v in results["variants"] if v["name"] not in _EXACT] or results["variants"][:1]:
            error = np.maximum(v["attention_error"]["by_layer"], 1e-9)
            lines.append((v["name"], v["label"], np.arange(len(error)), error))
        axes.set_yscale("log")
        _named_lines(axes, lines)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the attention output")

    return svg("layers", 9.6, 4.0, draw)


def positions(results: dict[str, Any]) -> str:
    """Where along the text the loss differs from dense."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines = []
        for v in results["variants"]:
            if v["name"] not in _EXACT:
                bins = v["loss_difference_by_position"]
                x, y = (np.array([point[key] for point in bins]) for key in ("token", "difference"))
                lines.append((v["name"], v["label"], x, y))
        if lines:
            differences(axes, max(float(y.max()) for *_, y in lines))
            lowest = min(float(y.min()) for *_, y in lines)
            axes.set_ylim(bottom=min(axes.get_ylim()[0], 1.5 * lowest))
            _named_lines(axes, lines)
        axes.set_xlim(left=0)
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("loss − dense")

    return svg("positions", 9.6, 3.6, draw)


def times(results: dict[str, Any]) -> str:
    """Prefill and decode time, attention's share in full colour."""

    def draw(figure: Figure) -> None:
        variants = results["variants"]
        rows = np.arange(len(variants))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title, form in (
            (panels[0], "prefill", f"prefill of {results['text']['tokens']:,} tokens, ms", "{:,.0f}"),
            (panels[1], "decode", "decode of one token, ms", "{:.1f}"),
        ):
            total = np.array([v[f"{key}_ms"] for v in variants])
            attention = np.array([v[f"{key}_attention_ms"] for v in variants])
            inks = [color(v["name"]) for v in variants]
            axes.barh(rows, attention, color=inks, height=0.62)
            pale = [0.22 * np.array(to_rgb(ink)) + 0.78 for ink in inks]
            axes.barh(rows, total - attention, left=attention, color=pale, height=0.62)
            for row, a, t in zip(rows, attention, total, strict=True):
                text = f"{form.format(a)} of {form.format(t)}"
                axes.annotate(text, (t, row), (5, 0), textcoords="offset points", va="center", fontsize=9.5)
            axes.set_xlim(0, 1.32 * total.max())
            axes.set_title(title, loc="left", fontsize=10.5, color=FAINT)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(rows, [v["label"] for v in variants])
        panels[0].tick_params(axis="y", labelcolor=INK)
        panels[0].invert_yaxis()

    return svg("times", 10.4, 0.6 + 0.42 * (len(results["variants"]) + 1), draw)


PLOTS = {"quality": quality, "layers": layers, "positions": positions, "times": times}
