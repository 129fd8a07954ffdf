"""The figures of README.md, from the records in bench/results.

    python bench/readme_table.py            writes them between the markers of README.md
    python bench/readme_table.py --check    exit status 1 if README.md says anything else

Of each program and instruction set the newest record counts. Lines of one kind are one row, told by their range: no
line of a record is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")

Record = dict[str, Any]


def newest(folder: Path) -> dict[str, Record]:
    """By file name, the newest complete record of each program and instruction set of CPUs, in the order of TABLES."""
    found: dict[tuple[int, int], tuple[str, str, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        # Figures of GPUs stand in docs/kernels and docs/demo.md; the study measures quality, which docs/study.md tells.
        elsewhere = "gpu" in record.get("device", {}) or record.get("machine", {}).get("gpu") or "sections" in record
        if elsewhere or not record.get("complete", True):
            continue
        key = (list(TABLES).index(_program(record)), ISAS.index(_device(record)["isa"]))
        if key not in found or found[key][0] <= record["date"]:
            found[key] = (record["date"], path.name, record)
    return {name: record for _, (_, name, record) in sorted(found.items(), key=lambda item: item[0])}


def render(records: dict[str, Record]) -> str:
    """What stands between the markers."""
    if not records:
        return "No run has been recorded yet.\n"
    parts, seen = [], set()
    for name, record in records.items():
        program = _program(record)
        introduce, header, rows, folded = TABLES[program]
        table = [header, ["---", *["---:"] * (len(header) - 1)], *rows(record)]
        lines = [introduce(record), "", *("| " + " | ".join(cells) + " |" for cells in table), ""]
        lines += [f"Record: [{name}](bench/results/{name}), {_source(record)}.", ""]
        if folded or program in seen:
            lines = [f"<details><summary>{folded or name}</summary>", "", *lines, "</details>", ""]
        seen.add(program)
        parts += lines
    return "\n".join(parts)


def _program(record: Record) -> str:
    return "host" if "results" in record else "heddle_bench" if "benchmarks" in record else "demo"


def _device(record: Record) -> dict[str, Any]:
    return record["machine"] if _program(record) == "demo" else record["device"]


def _machine(record: Record) -> str:
    device = _device(record)
    threads = device.get("threads", device.get("heddle_threads"))
    return f"{device['processor']}, {threads} threads, {device['isa']}"


def _source(record: Record) -> str:
    """The day, the command and the revision."""
    revision = record.get("revision", record["versions"].get("revision"))
    if isinstance(revision, dict):
        revision = revision["commit"][:12] + (" with changes" if revision["dirty"] else "")
    load = record.get("device", {}).get("load_average")
    busy = "" if load is None else f", load {load[0]} before"
    return f"{record['date'][:10]}, `{record['command']}`, revision {revision or 'unknown'}{busy}"


# --- numbers for people ---


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


def _span(values: Iterable[float], unit: str = "", show: Callable[[float], str] = _short) -> str:
    """ "1.2 to 3.4 GB/s", or one number if they are alike."""
    shown = [show(x) for x in sorted(values)]
    text = shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"
    return f"{text} {unit}".strip()


def _listed(values: Iterable[Any]) -> str:
    """In their order, each once: "64 and 128", "1024, 2048 and 4096"."""
    *most, last = dict.fromkeys(map(str, values))
    return f"{', '.join(most)} and {last}" if most else last


def _groups(lines: Iterable[Record], kind: Callable[[str], tuple[str, ...]]) -> Iterator[list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for line in lines:
        groups.setdefault(kind(line["name"]), []).append(line)
    yield from groups.values()


def _kind(name: str) -> tuple[str, ...]:
    """Lines of one kind differ in shape alone: "prefill/fp32/causal/d64/s1024", "decode/int8-a/1x32768/page16/fp32"."""
    shape = re.compile(r"[dsr]\d+|page\d+|full|causal|manual_time|iterations:\d+")
    return tuple(part for part in name.split("/") if not shape.fullmatch(part))


def _what(names: Sequence[str]) -> str:
    """ "fp32 prefill, full and causal, D 64 and 128, S 1024 to 8192" """
    parts = [name.split("/") for name in names]
    operation, type_ = parts[0][0], parts[0][1]
    words = {"memory": "memory beyond inputs and output", "sampled": "sampled decode"}.get(
        operation, operation.replace("-", " ")
    )
    text = [f"{type_} selection by {parts[0][2]} and attention" if operation == "select" else f"{type_} {words}"]
    if operation == "select" and parts[0][2].startswith("exact top"):
        text = [f"{type_} {parts[0][2]}"]
    rest = [p for name in parts for p in name[2:]]
    text += [f"window {p[6:]}" for p in dict.fromkeys(rest) if p.startswith("window")]
    text += [f"{p[1:]} parts" for p in dict.fromkeys(rest) if re.fullmatch(r"p\d+", p)]
    text += [f"{p.replace('x', ' x ')} keys" for p in dict.fromkeys(rest) if re.fullmatch(r"\d+x\d+", p)]
    if masks := [p for p in rest if p in ("full", "causal")]:
        text.append(_listed(masks))
    for letter, word in (("d", "D"), ("s", "S"), ("page", "pages of"), ("r", "rows")):
        numbers = sorted({int(p.removeprefix(letter)) for p in rest if re.fullmatch(letter + r"\d+", p)})
        if len(numbers) > 2:
            text.append(f"{word} {numbers[0]} to {numbers[-1]}")
        elif numbers:
            text.append(f"{word} {_listed(numbers)}")
    return ", ".join(text)


# --- one table a program ---


def _host_introduction(record: Record) -> str:
    torch = record["device"]["torch"]
    return (
        f"{_machine(record)}; against PyTorch {torch['version']} ({torch['isa']}) and against itself, the calls taking "
        "turns. Medians; above 1 heddle is the faster or the smaller ([how](bench/README.md))."
    )


def _host_rows(record: Record) -> Iterator[list[str]]:
    for lines in _groups(record["results"], _kind):
        ours, against = [line["ours"] for line in lines], [line["against"] for line in lines]
        if "extra_bytes" in ours[0]:
            rate = _span((x["extra_bytes"] / 1e6 for x in ours), "MB")
        elif "gflop_per_s" in ours[0]:
            rate = _span((x["gflop_per_s"] for x in ours), "GFLOP/s")
        else:
            rate = _span((x["gb_per_s"] for x in ours), "GB/s")
        # "PyTorch bf16 folded heads, [B,H,S,D]" names the fastest of PyTorch's alternatives.
        peers = (re.sub(r"^(PyTorch \w+).*", r"\1", x["label"]) for x in against)
        ratios = _span((line["ratio_of_medians"] for line in lines), "x")
        yield [_what([line["name"] for line in lines]), str(len(lines)), rate, _listed(peers), ratios]


def _bench_introduction(record: Record) -> str:
    limits = ", ".join(f"{name[6:]} {value}" for name, value in record["context"].items() if name.startswith("limit_"))
    return (
        f"{_machine(record)}; as fractions of limits measured in the same run ({limits}): products on registers, or a "
        "read of memory, whichever allows less."
    )


def _bench_rows(record: Record) -> Iterator[list[str]]:
    for lines in _groups(record["benchmarks"], _kind):
        unit = "GFLOP/s" if "of products" in lines[0]["label"] else "GB/s"
        rate = _span((x[unit] for x in lines), unit)
        limit = _listed(line["label"].partition(",")[0].removeprefix("of ") for line in lines)
        fraction = _span((100 * line["fraction"] for line in lines), "%", lambda x: f"{x:.0f}")
        yield [_what([line["name"] for line in lines]), str(len(lines)), rate, limit, fraction]


def _demo_introduction(record: Record) -> str:
    model, text = record["model"], record["text"]
    return (
        f"{_machine(record)}; `heddle demo`: {model['name']} in {model['dtype']} on {text['tokens']:,} tokens of "
        f"{text['name']}. Only the attention differs ([what each figure is](docs/demo.md))."
    )


def _demo_rows(record: Record) -> Iterator[list[str]]:
    for v in record["variants"]:
        reference = v["name"] == "dense"
        yield [
            v["label"],
            f"{v['loss']:.4f}",
            "" if reference else f"{v['loss_difference']:+.4f} ± {v['loss_difference_se']:.4f}",
            "" if reference else f"{v['attention_error']['mean']:.1e}",
            f"{v['kv_bytes_per_token']:,.0f}",
            f"{v['prefill_ms']:,.0f}",
            f"{v['decode_ms']:.1f}",
        ]


# program: (introduction, header, rows, title of the fold that hides the table, if any)
TABLES: dict[str, tuple[Callable[[Record], str], list[str], Callable[[Record], Iterator[list[str]]], str]] = {
    "host": (_host_introduction, ["work", "lines", "heddle", "against", "ratio"], _host_rows, ""),
    "demo": (
        _demo_introduction,
        ["attention", "loss", "− dense", "error", "KV bytes a token", "prefill ms", "decode ms"],
        _demo_rows,
        "",
    ),
    "heddle_bench": (
        _bench_introduction,
        ["work", "cases", "heddle", "limit", "of the limit"],
        _bench_rows,
        "As fractions of what the machine can do",
    ),
}


def replaced(page: str, figures: str) -> str:
    """The page with these figures between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{figures}{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page differs")
    args = parser.parse_args(argv)
    page = README.read_text()
    wanted = replaced(page, render(newest(RESULTS)))
    if args.check and page != wanted:
        print(f"{README.name} differs from the records: run python bench/readme_table.py", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
