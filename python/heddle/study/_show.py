"""The study on the terminal: what was found, in sentences and one table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from heddle.report import signed
from heddle.study import _budget


def results(console: Console, record: dict[str, Any]) -> None:
    """The table of quality against budget, and all sentences."""
    for name, section in record["sections"].items():
        if name.startswith("budget"):
            console.print(_table(section["result"]))
            console.print()
    for section in record["sections"].values():
        for sentence in section["statements"]:
            console.print(f"- {sentence}")


def _table(result: dict[str, Any]) -> Table:
    """Loss difference by method and budget."""
    budgets = sorted({row["budget"] for row in result["rows"]})
    table = Table(
        title=f"loss − dense at {result['context']:,} tokens, by budget",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for budget in budgets:
        table.add_column(str(budget), justify="right", no_wrap=True)
    by_key = {(row["method"], row["budget"]): row for row in result["rows"]}
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = [signed(by_key[method, budget]["loss_difference"]["mean"]) for budget in budgets]
        table.add_row(_budget.LABELS[method], *cells)
    return table
