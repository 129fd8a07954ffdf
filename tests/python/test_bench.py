"""bench/: records have all that a reader needs to judge them, and comparisons are computed as described."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

import heddle

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def host(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import host

    return host


def run(script, *arguments):
    """Its standard output; a failure shows everything that it printed."""
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_description(record, command):
    assert record["schema"] == 1
    assert command in record["command"]
    assert record["date"].endswith("+00:00")
    device = record["device"]
    assert (device["isa"], device["threads"]) == (heddle.host_isa(), heddle.num_threads())
    assert device["processor"]
    assert device["system"]
    assert device["cores"] >= 1
    assert device["memory_gib"] > 0
    assert device["last_level_cache_mib"] >= 1
    assert len(device["load_average"]) == 3
    assert any(char.isdigit() for char in record["build"]["compiler"])
    assert record["build"]["flags"] is None or "-O" in record["build"]["flags"]
    assert record["build"]["current"] in (True, False, None)
    assert record["versions"]["heddle"] == heddle.__version__
    assert {"python", "numpy"} < set(record["versions"])
    if record["revision"] is not None:
        assert len(record["revision"]["commit"]) == 40
        assert isinstance(record["revision"]["dirty"], bool)


# --- host.py ---


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(the record of a few lines of every kind, what was printed)."""
    folder = tmp_path_factory.mktemp("records")
    lines = r"prefill/.*/causal/d64/s64$|fp32/window.*/d64|decode/(fp32|int8-b)/.*/page64/(read|fp32)|memory/bf16"
    lines += "|select/fp32|select/bf16/(oam|pages|dsa 8)|stem.*s1024$"
    printed = run("host.py", "--quick", "--seconds", "0.01", "--shrink", "16", "--filter", lines, "--into", folder)
    (path,) = folder.iterdir()
    assert f"recorded in {os.path.relpath(path)}" in printed
    return json.loads(path.read_text()), path, printed


def test_record_of_the_table(table):
    record, path, _ = table
    check_description(record, "python bench/host.py --quick --seconds 0.01 --shrink 16")
    assert path.name.startswith(f"host-{heddle.host_isa()}-{record['date'][:10]}-")
    assert set(record["device"]["torch"]) == {"version", "isa", "mkldnn", "threads"}
    assert record["complete"] is False
    assert record["seconds"] > 0
    assert [result["name"] for result in record["results"]] == [
        "prefill/fp32/causal/d64/s64",
        "prefill/bf16/causal/d64/s64",
        "prefill/int8-b/causal/d64/s64",
        "prefill/fp32/window64+4/d64/s1024",
        "decode/fp32/1x2048/page64/read",
        "decode/int8-b/1x2048/page64/read",
        "decode/int8-b/1x2048/page64/fp32",
        "select/fp32/exact top 128/1x8192",
        "select/bf16/oam 64/1x2048/page64",
        "select/bf16/pages 64/1x2048/page64",
        "select/bf16/dsa 8x64 64/1x2048/page64",
        "select/bf16/stem/d128/s1024",
        "memory/bf16/causal/h2/d128/s2048",
    ]


def test_every_line_of_the_record_can_be_recomputed(table):
    record, _, _ = table
    calls = {label: call for point in record["points"] for label, call in point["calls"].items()}
    for call in calls.values():
        first, third = call["quartiles_s"]
        assert 0 < call["min_s"] <= first <= call["median_s"] <= third
        assert call["rounds"] >= 2
    for result in record["results"]:
        ours, against = result["ours"], result["against"]
        if result["name"].startswith("memory"):
            assert ours["extra_bytes"] < result["target"]["at_most_bytes"] == 200e6
            assert against["extra_bytes"] > 0
            continue
        point = next(p for p in record["points"] if against["label"] in p["calls"] and ours["label"] in p["calls"])
        assert result["ratio_of_medians"] == pytest.approx(against["median_s"] / ours["median_s"])
        assert ours["median_s"] == point["calls"][ours["label"]]["median_s"]
        assert ("gflop_per_s" in ours) != ("gb_per_s" in ours)
        assert result["met"] is None  # lengths are not those of the targets
    (int8,) = (result for result in record["results"] if result["name"].startswith("prefill/int8"))
    assert int8["against"]["label"] == "heddle bf16"
    assert int8["also"]["quantize"] > 0


def test_flops_and_bytes(table):
    record, _, _ = table
    calls = {label: call for point in record["points"] for label, call in point["calls"].items()}
    pairs = 64 * 65 / 2
    assert calls["heddle bf16"]["gflop_per_s"] * calls["heddle bf16"]["median_s"] == pytest.approx(
        4 * 64 * 8 * pairs * 1e-9, rel=1e-3
    )
    # Query i of 1024 sees its newest 64 keys and, of those before them, the first 4.
    pairs = sum(min(i + 1, 64) + min(max(i - 63, 0), 4) for i in range(1024))
    assert calls["heddle window"]["gflop_per_s"] * calls["heddle window"]["median_s"] == pytest.approx(
        4 * 64 * 8 * pairs * 1e-9, rel=1e-3
    )
    kv = 2 * 2048 * 8 * 128
    for label, size in {"heddle fp32": 4 * kv, "read of fp32": 4 * kv, "heddle int8-b": kv}.items():
        decode = next(p["calls"] for p in record["points"] if p["name"].startswith("decode"))[label]
        assert decode["gb_per_s"] * decode["median_s"] == pytest.approx(size * 1e-9, rel=1e-3)


def test_a_record_prints_the_table_again(table):
    _, path, printed = table
    shown = run("host.py", "--show", path)
    assert shown.strip()
    assert shown in printed
    assert "decode/int8-b/1x2048/page64/fp32" in shown
    assert "≥ 3.00" in shown


def test_the_fastest_alternative_counts(host):
    line = host.Line("prefill/fp32/full/d64/s1024", "ours", "peer", 2.0)
    ours = {"median_s": 1.0, "min_s": 0.5}
    peers = {"a": {"median_s": 3.0, "min_s": 0.9}, "b": {"median_s": 2.0, "min_s": 1.5}}
    result = host.compare(line, ours, peers)
    assert result["against"]["label"] == "b"
    assert result["ratio_of_medians"] == 2.0
    assert result["ratio_of_minima"] == pytest.approx(0.9 / 0.5)
    assert result["met"] is True
    assert host.compare(line, {"median_s": 1.01, "min_s": 0.5}, peers)["met"] is False


def test_calls_take_turns_and_slow_alternatives_drop_out(host, monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(host.time, "perf_counter", lambda: clock[0])

    def call(name, seconds, peer=""):
        def run():
            log.append(name)
            clock[0] += seconds

        return host.Call(run, 1.0, "flop", peer)

    calls = {"slow": call("slow", 0.2, "p"), "fast": call("fast", 0.1, "p"), "long": call("long", 0.3)}
    times = host.take_turns(calls, host.Options(0.01, 5), lambda: log.append("flush"), lambda part: None)
    assert {label: len(seconds) for label, seconds in times.items()} == {"slow": 3, "fast": 5, "long": 5}
    assert times["long"] == pytest.approx([0.3] * 5)
    assert log[:8] == ["slow", "flush", "slow", "fast", "flush", "fast", "long", "flush"]
    # A call of 0.3 s is its own warm-up from the second round on.
    assert log[9:17] == ["slow", "flush", "slow", "fast", "flush", "fast", "flush", "long"]


def test_calls_that_differ_are_not_compared(host):
    import torch

    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    calls = {
        "reference": host.Call(lambda: one, 1.0, "flop", tolerance=1e-5),
        "read": host.Call(lambda: None, 1.0, "byte"),
        "other": host.Call(lambda: other, 1.0, "flop", tolerance=0.1),
    }
    assert host.check_same(calls) == {"reference": 0.0, "other": pytest.approx(0.1 / np.sqrt(3))}
    calls["other"].tolerance = 0.01
    with pytest.raises(SystemExit, match=r"^other differs .* by 0\.058"):
        host.check_same(calls)


def test_a_filter_that_matches_nothing_says_so():
    command = [sys.executable, str(BENCH / "host.py"), "--filter", "prefil/"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0
    assert not done.stdout.strip()
    assert "--filter matches no line" in done.stderr


def test_runs_of_parts_are_joined(host):
    names = [line.name for point in host.make_points(1) for line in point.lines]
    names += [host._memory_name(dtype, 32768) for dtype in host.DTYPES]
    about = {
        "command": "python bench/host.py --filter x",
        "device": {"processor": "p", "isa": "avx2", "threads": 2, "torch": {}, "load_average": [0.5, 0.5, 0.5]},
        "build": {"current": True},
        "versions": {},
        "revision": {"commit": "0" * 40, "dirty": False},
        "seconds": 2.0,
    }
    parts = [about | {"points": [{"name": n}], "results": [{"name": n, "met": True}]} for n in reversed(names)]
    joined = host.join(parts)
    assert joined["complete"] is True
    assert [result["name"] for result in joined["results"]] == names
    assert joined["seconds"] == 2.0 * len(names)
    assert len(joined["commands"]) == len(joined["points"]) == len(names)
    assert host.join(parts[1:])["complete"] is False
    with pytest.raises(SystemExit, match="differ in revision"):
        host.join([parts[0], parts[1] | {"revision": {"commit": "1" * 40, "dirty": False}}])
    with pytest.raises(SystemExit, match="differ in device"):
        host.join([parts[0], parts[1] | {"device": about["device"] | {"isa": "amx"}}])
    with pytest.raises(SystemExit, match="no line of the table is called other"):
        host.join([parts[0] | {"results": [{"name": "other"}]}])


# --- peak_memory.py ---


def test_peak_memory_is_seen_and_reset(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import peak_memory

    size = 64 << 20
    peak_memory.reset_peak()
    before = peak_memory.resident("VmRSS")
    block = np.ones(size, np.uint8)
    del block
    assert peak_memory.resident("VmHWM") - before == pytest.approx(size, rel=0.1)
    peak_memory.reset_peak()
    assert peak_memory.resident("VmHWM") - before < size / 4


def test_partial_results_of_small_splits_are_bounded(monkeypatch, rng):
    """Splits of 64 keys in a prefill of 6144: kept all at once, their partial results are 156 MB a head."""
    monkeypatch.syspath_prepend(str(BENCH))
    import peak_memory

    q, k, v = (rng.standard_normal((1, 6144, 2, 64), dtype=np.float32) for _ in range(3))
    expected = heddle.attention(q, k, v, causal=True)
    peak_memory.reset_peak()
    before = peak_memory.resident("VmRSS")
    out = heddle.attention(q, k, v, causal=True, schedule=heddle.Schedule(split_size=64))
    assert peak_memory.resident("VmHWM") - before < 100 << 20
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


# --- record.py ---

PROGRAM = """#!{python}
import json, sys
out = next(a.partition("=")[2] for a in sys.argv if a.startswith("--benchmark_out="))
report = {{"context": {{"host_name": "secret", "executable": "/x", "num_cpus": 2}}, "benchmarks": [{{"name": "a"}}]}}
open(out, "w").write("" if "--benchmark_filter=none" in sys.argv else json.dumps(report))
"""


def test_record_of_a_google_benchmark_program(tmp_path):
    program = tmp_path / "some_bench"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    into = tmp_path / "records"
    printed = run("record.py", "--into", into, program, "--benchmark_filter=a")
    (path,) = into.iterdir()
    assert f"recorded in {os.path.relpath(path)}" in printed
    assert path.name.startswith(f"some_bench-{heddle.host_isa()}-")
    record = json.loads(path.read_text())
    check_description(record, "some_bench --benchmark_filter=a")
    assert record["complete"] is False
    assert record["benchmarks"] == [{"name": "a"}]
    assert record["context"] == {"num_cpus": 2}
    path.unlink()
    run("record.py", "--into", into, program, "--benchmark_filter=none")
    assert not list(into.iterdir())
