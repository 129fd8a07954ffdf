"""The figures of docs/study.md, from the newest complete record of `heddle study` in bench/results.

python bench/study_table.py            writes them between the page's markers
python bench/study_table.py --check    exit status 1 if the page says anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heddle.report import signed
from heddle.study import _blocks, _budget
from readme_table import BEGIN, END, RESULTS, ROOT

PAGE = ROOT / "docs" / "study.md"


def newest(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """(file name, record), or None if there is no complete one."""
    records = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("study-*.json"))]
    return max((r for r in records if r[1]["complete"]), key=lambda r: r[1]["date"], default=None)


def render(name: str, record: dict[str, Any]) -> str:
    """What stands between the markers."""
    revision, device = record["revision"], record["device"]
    source = "no revision" if revision is None else revision["commit"][:12] + ", with changes" * revision["dirty"]
    lines = [
        f"Record: [{name}](../bench/results/{name}), {record['date'][:10]}, `{record['command']}`, revision {source}, "
        f"{device['processor']}, {device['threads']} threads, {device['isa']}; {record['seconds'] / 60:.0f} minutes.",
        "",
    ]
    for section, part in record["sections"].items():
        result = part["result"]
        if section.startswith("budget"):
            lines += [f"### Decode at {result['context']:,} tokens: loss − dense, and the output's error", ""]
            lines += [*_budgets(result), ""]
        elif section == "blocks":
            lines += [f"### Blocks at prefill of {result['context']:,} tokens", "", *_blocks_table(result), ""]
        else:
            titles = {"int8": "INT8", "sampling": "Sampling, on synthetic data", "dsa": "What the indexer reads"}
            lines += [f"### {titles[section]}", ""]
            if section == "dsa":
                lines += [*_reservations(result), ""]
        lines += [*(f"- {sentence}" for sentence in part["statements"]), ""]
    indexer = record["indexer"]
    if indexer:
        lines += [
            f"The indexer, {indexer['heads']} heads of {indexer['dim']} a layer, was fitted in "
            f"{indexer['fit_seconds']:.0f} s: the KL divergence of held-out queries fell from "
            f"{indexer['kl_before']:.2f} to {indexer['kl_after']:.2f} nats, mean over layers. "
            f"{100 * indexer['seen_in_passages']:.1f} % of its text's runs of 32 tokens are in the passages too.",
            "",
        ]
    return "\n".join(lines)


def _budgets(result: dict[str, Any]) -> list[str]:
    budgets = sorted({row["budget"] for row in result["rows"]})
    lines = [_row(["", *map(str, budgets)]), _row(["---", *["---:"] * len(budgets)])]
    for method, label in _budget.LABELS.items():
        rows = {row["budget"]: row for row in result["rows"] if row["method"] == method}
        cells = [
            f"{signed(rows[b]['loss_difference']['mean'])} ± {rows[b]['loss_difference']['se']:.3f} "
            f"({100 * rows[b]['error']:.1f} %)"
            for b in budgets
        ]
        lines.append(_row([label, *cells]))
    return lines


def _blocks_table(result: dict[str, Any]) -> list[str]:
    lines = [_row(["", "pairs kept", "loss − dense", "error"]), _row(["---", "---:", "---:", "---:"])]
    for row in result["rows"]:
        loss = row["loss_difference"]
        cells = [
            f"{100 * row['density']:.1f} %",
            f"{signed(loss['mean'])} ± {loss['se']:.4f}",
            f"{100 * row['error']:.1f} %",
        ]
        lines.append(_row([_blocks.LABELS[row["method"]], *cells]))
    return lines


def _reservations(result: dict[str, Any]) -> list[str]:
    """Hit rate and slowdown of the published sizes, as they are and scaled to the model."""
    rows = {(row["policy"], round(row["megabytes"], 2)): row for row in result["reservation"]}
    policies = list(dict.fromkeys(policy for policy, _ in rows))
    lines = [_row(["reserved", *policies]), _row(["---", *["---:"] * len(policies)])]
    scaled = {round(mb, 2): f"{mb / result['scale']:.0f} MB scaled" for mb in result["scaled_mb"]}
    for mb in dict.fromkeys(mb for _, mb in rows):
        note = f" ({scaled[mb]})" if scaled.get(mb) and mb else ""
        found = [rows[policy, mb] for policy in policies]
        cells = [f"{100 * row['hit_rate']:.0f} % ({row['slowdown']:.2f})" for row in found]
        lines.append(_row([f"{mb:g} MB{note}", *cells]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    found = newest(RESULTS)
    wanted = f"{head}{BEGIN}\n{render(*found) if found else ''}{END}{tail}"
    if args.check:
        if wanted != text:
            print(f"{PAGE} differs from the record: run bench/study_table.py", file=sys.stderr)
        return int(wanted != text)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
