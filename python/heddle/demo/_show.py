"""The demo on the terminal: a progress bar while it works, then tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from heddle.report._format import busy_note, relative, signed


class Terminal:
    """Where the demo shows what it does."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    @contextlib.contextmanager
    def working(self, total: float) -> Iterator[_Steps]:
        """A progress bar over `total` units of work; a line a step where there is no terminal."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal, refresh_per_second=4
        ) as progress:
            yield _Steps(progress, total)

    def results(self, results: dict[str, Any]) -> None:
        """The table of figures and the answers."""
        for table in (self._figures(results), self._answers(results)):
            self.console.print(table)
            self.console.print()
        if note := busy_note(results["machine"]["others_share"]):
            self.console.print(note)

    def written(self, what: str, path: Path) -> None:
        self.console.print(f"{what}: {path.absolute()}", soft_wrap=True)

    def _figures(self, results: dict[str, Any]) -> Table:
        model, text, machine = results["model"], results["text"], results["machine"]
        wide = self.console.width >= 100
        table = Table(
            title=f"{model['name']} on {text['tokens']:,} tokens of {text['name']}",
            caption=(machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}")
            + ("; in brackets: attention's share" if wide else ""),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        table.add_column("", no_wrap=True)
        headers = ["loss", "loss\n− dense", "error\nmean", "worst\nlayer", "KV B\n/token", "prefill\nms", "decode\nms"]
        for header in [*headers, "keys\nread"] if wide else headers:
            table.add_column(header, justify="right", no_wrap=True)
        for v in results["variants"]:
            error, reference = v["attention_error"], v["name"] == "dense"
            prefill, decode = f"{v['prefill_ms']:,.0f}", f"{v['decode_ms']:.1f}"
            if wide:
                prefill += f" ({v['prefill_attention_ms']:,.0f})"
                decode += f" ({v['decode_attention_ms']:.1f})"
            table.add_row(
                v["label"],
                f"{v['loss']:.4f}",
                "" if reference else signed(v["loss_difference"]),
                "" if reference else relative(error["mean"]),
                "" if reference else relative(error["worst"]),
                f"{v['kv_bytes_per_token']:,.0f}",
                prefill,
                decode,
                *([f"{100 * v['keys_read']:.0f} %"] if wide else []),
            )
        return table

    @staticmethod
    def _answers(results: dict[str, Any]) -> Table:
        options = results["options"]
        table = Table(
            title=f"{options['question']} (after {options['prompt_tokens']:,} tokens, greedy)",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 1, 0),
            show_edge=False,
        )
        table.add_column("", no_wrap=True)
        table.add_column("tokens\nas SDPA", justify="right", no_wrap=True)
        table.add_column("answer")
        for v in results["variants"]:
            same = v["answer_same_tokens"]
            every = same == len(v["answer_tokens"])
            repeated = every and v["name"] != "sdpa"
            answer = "[dim]the same[/dim]" if repeated else escape(" ".join(v["answer"].split()))
            table.add_row(v["label"], f"all {same}" if every else f"first {same}", answer)
        return table


class _Steps:
    """One bar over all steps; each step knows its share."""

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self.done = 0.0
        self.total = total

    def skip(self, work: float) -> None:
        """That much of the total will not be done."""
        self.total -= work
        self._progress.update(self._task, total=self.total)

    @contextlib.contextmanager
    def step(self, description: str, work: float) -> Iterator[Callable[[float], None]]:
        """Yields tick(part): that share of the step's work is done. The rest is done when the block ends."""
        self._progress.update(self._task, description=description, refresh=True)
        if self._progress.disable:
            self._progress.console.print(description)
        done = 0.0

        def tick(part: float) -> None:
            nonlocal done
            part = min(part, 1.0 - done)
            done += part
            self.done += part * work
            self._progress.update(self._task, completed=self.done)

        yield tick
        tick(1.0)
