"""The demo's report: one HTML file with everything in it, for a person with a browser."""

from __future__ import annotations

import importlib.resources
from typing import Any

from heddle.report import _plots
from heddle.report._format import busy_note, relative, scientific, signed

__all__ = ["render"]


def render(results: dict[str, Any]) -> str:
    """The report on the measurements of `heddle demo` (the content of its --json) as HTML.

    Style and plots are inside the page: it needs no other file and no network.
    """
    # Imported here: what else draws in this style needs matplotlib alone.
    import jinja2
    import markupsafe

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"signed": signed, "scientific": scientific, "relative": relative}
    source = importlib.resources.files(__name__).joinpath("report.html.j2").read_text(encoding="utf-8")
    by_name = {variant["name"]: variant for variant in results["variants"]}
    return environment.from_string(source).render(
        r=results,
        by_name=by_name,
        color=_plots.color,
        busy_note=busy_note(results["machine"]["others_share"]),
        plots={name: markupsafe.Markup(plot(results)) for name, plot in _plots.PLOTS.items()},
    )
