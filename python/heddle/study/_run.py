"""Runs the study's sections, keeps each that is finished, and writes the report and the record."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import heddle
from heddle import _core, _record, dsa, report
from heddle._errors import HeddleValueError, refuse
from heddle.demo import _inputs
from heddle.demo._show import Terminal
from heddle.study import SECTIONS, _access, _blocks, _budget, _int8, _sampling, _show, _statements
from heddle.study._bench import Bench

# Characters of a text that are looked at.
_TEXT = 4_000_000
# The longest context that the INT8 section reads.
_INT8_TOKENS = 4096
_WINDOW = 50
# Runs of so many tokens tell whether the text that the indexer was fitted on has parts of the passages.
_RUN = 32
# Runs of so many tokens tell which of the decoded tokens repeat what was read.
_REPEAT = 8
# Places that are looked at for each passage.
_PLACES = 1024


def study(args: argparse.Namespace, command: str) -> int:
    """Runs what `args`, checked and complete, ask for. Returns 0, or 130 after Ctrl-C."""
    show = Terminal()
    try:
        record = _measured(args, command, show)
    except KeyboardInterrupt:
        show.console.print(f"Stopped. Finished sections are in {args.out}: the same command goes on from there.")
        return 130
    _show.results(show.console, record)
    show.written("Record", _record.write(record, "study", args.record or args.out))
    page = args.out / "report.html"
    _record.write_whole(page, report.render_study(record))
    show.written("Report", page)
    return 0


def _measured(args: argparse.Namespace, command: str, show: Terminal) -> dict[str, Any]:
    record = _record.describe(shlex.split(command)) | {
        "complete": not args.quick and set(args.sections) == set(SECTIONS)
    }
    name, path = _inputs.find_model(args.model)
    text_name, text = _inputs.read_text(args.text)
    longest = max(args.context)
    kept = _Kept(args.out / "sections", args.fresh, show.console)

    seconds = _estimates(args)
    with show.working(sum(seconds.values())) as progress:
        with progress.step(f"loading {name}", seconds["load"]):
            tokenizer, model = _inputs.load_model(path)
            ids = tokenizer(text[:_TEXT], return_tensors="pt").input_ids[0]
        limit = model.config.max_position_embeddings
        if args.steps >= limit:
            raise refuse(HeddleValueError, "value", "--steps", f"{args.steps}; allowed are fewer than {limit}")
        needed = 2 * longest + 1 + args.steps
        if longest > limit:
            raise refuse(HeddleValueError, "value", "--context", f"{longest}; allowed are up to {limit}, the model's")
        if len(ids) < needed:
            message = (
                f"the text has {len(ids)} tokens; allowed are {needed} and above: a passage, and another to fit on"
            )
            raise refuse(HeddleValueError, "value", "--text", message)
        bench = Bench(model, ids)
        fit_ids = ids[None, -longest:]
        free = len(ids) - longest - (longest + 1 + args.steps)
        passages = _passages(ids[: len(ids) - longest], args.passages, free, sorted(set(args.context)), args.queries)

        base = {
            "model": [path.name, path.stat().st_size],
            "text": _inputs.digest(ids),
            "heddle": heddle.__version__,
            "source": _source(),
        }
        indexer, about_indexer = None, None
        if {"budget", "dsa"} & set(args.sections):
            with progress.step("fitting the indexer", seconds["fit"]) as tick:
                indexer, about_indexer = _indexer(args, base, model, name, fit_ids, tick)
            about_indexer["seen_in_passages"] = _overlap(fit_ids[0], ids, passages, longest)
            base["indexer"] = about_indexer["sha256"]

        parts: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = {}
        for context in args.context if "budget" in args.sections else ():
            options = {
                "passages": passages,
                "context": context,
                "queries": args.queries,
                "budgets": sorted(set(args.budgets)),
                "methods": list(_budget.LABELS),
            }
            parts[f"budget-{context}"] = (
                options,
                lambda tick, o=options: _budget.measure(bench, indexer, tick=tick, **o),
            )
        if "int8" in args.sections:
            options = {"first": 0, "context": min(longest, _INT8_TOKENS)}
            parts["int8"] = options, lambda tick, o=options: _int8.measure(bench, tick=tick, **o)
        if "sampling" in args.sections:
            options = {"seeds": args.seeds}
            parts["sampling"] = options, lambda tick, o=options: _sampling.measure(tick=tick, **o)
        if "dsa" in args.sections:
            fitting = [context for context in args.context if context + args.steps <= limit]
            options = {
                "first": passages[0],
                "context": max(fitting, default=limit - args.steps),
                "steps": args.steps,
                "budget": args.dsa_budget,
                "window": _WINDOW,
            }
            file = args.out / "dsa.parquet"
            parts["dsa"] = options, lambda tick, o=options: _access.measure(bench, indexer, path=file, tick=tick, **o)
        if "blocks" in args.sections:
            options = {"first": passages[0], "context": longest, "densities": args.densities, "block": args.block}
            parts["blocks"] = options, lambda tick, o=options: _blocks.measure(bench, tick=tick, **o)

        sections = {}
        for section, (options, measure) in parts.items():
            # `base` has the indexer's hash only where an indexer takes part.
            depends = {**base, "options": options}
            if section.split("-")[0] not in ("budget", "dsa"):
                depends.pop("indexer", None)
            with progress.step(section.replace("-", ", ") + " tokens" * ("-" in section), seconds[section]) as tick:
                sections[section] = kept.or_run(section, depends, lambda measure=measure, tick=tick: measure(tick))
    for section, part in sections.items():
        part["statements"] = _statements.of(section, part["result"])
        if section.startswith("budget"):
            shares = [_repeated(ids[first : first + part["result"]["context"]], args.queries) for first in passages]
            part["statements"].append(
                f"By passage, {', '.join(f'{100 * share:.0f} %' for share in shares)} of the decoded tokens end a run "
                f"of {_REPEAT} tokens that stands earlier in the passage: what they need is there to be copied."
            )
    for package in ("torch", "transformers"):
        record["versions"][package] = importlib.metadata.version(package)
    return record | {
        "model": {
            "name": name,
            "file": path.name,
            "parameters": model.num_parameters(),
            "layers": bench.layers,
            "heads": bench.q_heads,
            "kv_heads": bench.kv_heads,
            "head_dim": bench.head_dim,
        },
        "text": {"name": text_name, "tokens": len(ids), "sha256": _inputs.digest(ids), "passages": passages},
        "indexer": about_indexer,
        "sections": sections,
        # Of what was measured, whenever that was: finished sections may be of an earlier run.
        "seconds": sum(p["seconds"] for p in sections.values()) + ((about_indexer or {}).get("fit_seconds") or 0.0),
    }


def _source() -> str:
    """A hash of the code that measures: with another one, finished sections are measured again."""
    package = Path(heddle.__file__).resolve().parent
    files = [package / "study" / f"_{name}.py" for name in ("bench", "budget", "blocks", "int8", "sampling", "access")]
    for folder in ("dsa", "trace"):
        files += sorted((package / folder).glob("*.py"))
    files += [package / "select.py", package / "_attention.py", Path(_core.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _estimates(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that the steps take on two cores, for the bar."""
    longest = max(args.context)

    def prefill(tokens: int) -> float:
        return 14 * tokens / 8192 + 1

    configurations = len(_budget.LABELS) * len(set(args.budgets))
    seconds = {"load": 12.0, "fit": 30 * args.fit_steps * (0.034 * longest / 8192 + 0.004)}
    for n in args.context:
        each = 2.4 * n / 8192 * args.queries / 128 + 0.2
        seconds[f"budget-{n}"] = args.passages * (prefill(n) + configurations * 1.25 * each)
    rows = len(_blocks.MAIN) * (len(args.densities) - 1) + len(_blocks.METHODS) + 1
    seconds["blocks"] = rows * 1.7 * prefill(longest) + 3 * prefill(longest)
    seconds["int8"] = 3 * prefill(min(longest, _INT8_TOKENS))
    seconds["sampling"] = 2e-3 * args.seeds
    seconds["dsa"] = prefill(longest) + 0.08 * args.steps + 5
    return seconds


class _Kept:
    """Sections that an earlier run has finished: JSON files, each with what its result depends on."""

    def __init__(self, folder: Path, fresh: bool, console: Console) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.fresh, self.console = folder, fresh, console

    def or_run(self, name: str, depends: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not self.fresh and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["depends"] == depends:
                    return {key: found[key] for key in ("seconds", "result")}
            except (ValueError, KeyError, TypeError):
                self.console.print(f"{path} is damaged: measured again")
        started = time.perf_counter()
        result = measure()
        # As a reader of the file would get it: tuples are lists, and no NaN is written.
        part = json.loads(json.dumps({"seconds": time.perf_counter() - started, "result": result}, allow_nan=False))
        _record.write_whole(path, json.dumps({"depends": depends, **part}, indent=1) + "\n")
        return part


def _indexer(
    args: argparse.Namespace, base: dict[str, Any], model: Any, name: str, ids: torch.Tensor, tick: Any
) -> tuple[dsa.Indexer, dict[str, Any]]:
    """The one given, the one that an earlier run has fitted, or a new one; and what the record says of it."""
    path = args.indexer or args.out / "indexer.safetensors"
    if args.indexer is None:
        wanted = {**base, "text": _inputs.digest(ids), "steps": args.fit_steps, "queries": args.fit_queries}
        indexer = None
        if path.is_file() and not args.fresh:
            try:
                indexer = dsa.load(path)
            except HeddleValueError:
                indexer = None  # of another version, or not whole: fitted again
        if indexer is None or indexer.about.get("study") != wanted:
            started = time.perf_counter()
            options = {"steps": args.fit_steps, "queries": args.fit_queries, "n_sink": _budget.KEEP["n_sink"]}
            indexer = dsa.fit_indexer(model, ids, name=name, progress=tick, **options)
            indexer.about |= {"study": wanted, "seconds": time.perf_counter() - started}
            indexer.save(path)
    indexer = dsa.load(path)
    if missing := sorted(set(range(model.config.num_hidden_layers)) - set(indexer.layers)):
        raise refuse(HeddleValueError, "value", "--indexer", f"{path} has none for the layers {missing}")
    pairs = list(indexer.about.get("kl", {}).values())
    about = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layers": len(indexer.layers),
        "heads": indexer.heads,
        "dim": indexer.dim,
        "rope_dim": indexer.rope_dim,
        "tokens": indexer.about.get("tokens"),
        "options": indexer.about.get("options"),
        "fit_seconds": indexer.about.get("seconds"),
        "kl_before": sum(pair[0] for pair in pairs) / len(pairs) if pairs else None,
        "kl_after": sum(pair[1] for pair in pairs) / len(pairs) if pairs else None,
        "kl_by_layer": pairs,
    }
    return indexer, about


def _passages(ids: torch.Tensor, count: int, free: int, contexts: list[int], queries: int) -> list[int]:
    """Where passages begin: each in a part of [0, free] of its own, at the first place where the fewest of the decoded
    tokens, the last `queries` of a context, end a run of _REPEAT tokens that stands earlier in the passage. Where they
    do, a model copies, and its loss tells of little else."""
    latest: dict[bytes, int] = {}
    before = np.full(len(ids), -1)  # by the last token of a run: where the same run began last
    for first, run in enumerate(_runs(ids, _REPEAT)):
        before[first + _REPEAT - 1] = latest.get(run, -1)
        latest[run] = first

    def repeated(first: int) -> float:
        return max(float(np.mean(before[first + n - min(queries, n) : first + n] >= first)) for n in contexts)

    ranges = [range(n * free // count, max((n + 1) * free // count, n * free // count + 1)) for n in range(count)]
    return [min(starts[:: max(_REPEAT, len(starts) // _PLACES)], key=repeated) for starts in ranges]


def _overlap(fitted: torch.Tensor, ids: torch.Tensor, passages: list[int], length: int) -> float:
    """Share of the runs of tokens of the fitted text that the passages have too."""
    there = {run for first in passages for run in _runs(ids[first : first + length + 1], _RUN)}
    found = set(_runs(fitted, _RUN))
    return len(found & there) / max(len(found), 1)


def _repeated(passage: torch.Tensor, queries: int) -> float:
    """Share of the last tokens of a passage that end a run of tokens which those before them have too."""
    before = set(_runs(passage[:-queries], _REPEAT))
    return sum(run in before for run in _runs(passage[1 - queries - _REPEAT :], _REPEAT)) / queries


def _runs(tokens: torch.Tensor, length: int) -> list[bytes]:
    data = tokens.to(torch.int32).numpy()
    return [data[i : i + length].tobytes() for i in range(len(data) - length + 1)]
