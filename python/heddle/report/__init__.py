"""The reports of `heddle demo` and `heddle study`: one HTML file with everything in it, for a person with a browser."""

from __future__ import annotations

from typing import Any

from heddle.report import _plots
from heddle.report._format import busy_note, relative, scientific, signed

__all__ = ["render", "render_study"]


def render(results: dict[str, Any]) -> str:
    """The report on the measurements of `heddle demo` (the content of its --json) as HTML."""
    by_name = {variant["name"]: variant for variant in results["variants"]}
    return _page(
        "demo.html.j2",
        {name: plot(results) for name, plot in _plots.PLOTS.items()},
        r=results,
        by_name=by_name,
        color=_plots.color,
        busy_note=busy_note(results["machine"]["others_share"]),
    )


def render_study(record: dict[str, Any]) -> str:
    """The report on a record of `heddle study`, whichever sections it has, as HTML."""
    from heddle.report import _study

    return _page("study.html.j2", _study.plots(record), r=record, **_study.context(record))


def _page(template: str, plots: dict[str, str], **values: Any) -> str:
    """Style and plots are inside the page: it needs no other file and no network."""
    # Imported here: what else draws in this style needs matplotlib alone.
    import jinja2
    import markupsafe

    loader = jinja2.PackageLoader("heddle.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"signed": signed, "scientific": scientific, "relative": relative}
    drawn = {name: markupsafe.Markup(plot) for name, plot in plots.items()}
    return environment.get_template(template).render(plots=drawn, **values)
