"""Block selection for prefill against its definitions in float64."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arrays
import heddle
import selecting
from arrays import normal, paged
from heddle import select

settings.register_profile(
    "blocks", deadline=None, max_examples=50, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
PROFILE = settings.get_profile("blocks")


@st.composite
def calls(draw):
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    block = draw(st.sampled_from([4, 8, 12]))
    return {
        "batch": draw(st.integers(1, 2)),
        "sq": draw(st.integers(0, 70)),
        "sk": draw(st.integers(0, 90)),
        "heads": (kv_heads * group, kv_heads),
        "dims": (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        "dtype": draw(st.sampled_from(list(arrays.DTYPES))),
        "block": block,
        "stride": draw(st.sampled_from([s for s in (1, 2, 4, 8, 12) if block % s == 0])),
        "n_first": draw(st.integers(0, 3)),
        "n_last": draw(st.integers(0, 3)),
        "causal": draw(st.sampled_from([True, True, False])),
        "window": draw(st.none() | st.tuples(st.none() | st.integers(0, 30), st.none() | st.integers(0, 5))),
        "scale": draw(st.sampled_from([None, 0.3, -0.2])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def make(c):
    rng = np.random.default_rng(c["seed"])
    (hq, hkv), (d, dv) = c["heads"], c["dims"]
    q, k, v = (
        normal(rng, c["batch"], s, h, n, dtype=c["dtype"])
        for s, h, n in ((c["sq"], hq, d), (c["sk"], hkv, d), (c["sk"], hkv, dv))
    )
    v *= np.asarray(rng.choice([0.2, 1, 5], (c["batch"], c["sk"], hkv, 1)), v.dtype)
    options = {name: c[name] for name in ("block", "n_first", "n_last", "causal", "window", "scale")}
    return rng, q, k, v, options


def rows(selection, c):
    """(b, head, row, chosen blocks, seen, own, position) of every block row of equally long requests."""
    mask = selection.mask
    block = c["block"]
    assert mask.shape == (c["batch"], c["heads"][0], -(-c["sq"] // block), -(-c["sk"] // block))
    for b, h, row in np.ndindex(mask.shape[:3]):
        seen, own, position = selecting.block_row(row, block, c["sq"], c["sk"], c["causal"], c["window"])
        yield b, h, row, np.flatnonzero(mask[b, h, row]).tolist(), seen, own, position


def density_of(selection, c):
    """Of pairs, one by one."""
    kept = seen = 0
    for b, h in np.ndindex(c["batch"], c["heads"][0]):
        for i in range(c["sq"]):
            begin, end = selecting.seen_keys(i, c["sq"], c["sk"], c["causal"], c["window"])
            seen += end - begin
            kept += sum(bool(selection.mask[b, h, i // c["block"], j // c["block"]]) for j in range(begin, end))
    return kept / seen if seen else 1.0


budgets = st.none() | st.integers(1, 12) | st.floats(0.01, 1.0)


@settings(PROFILE)
@given(
    calls(),
    budgets,
    st.sampled_from([0.7, 0.0, 1.0, 0.35]),
    st.sampled_from(["clipped", "log", "zscore"]),
    st.booleans(),
)
def test_stem(c, budget, decay, norm, longer):
    rng, q, k, v, options = make(c)
    prompt = c["sk"] + int(rng.integers(0, 200)) if longer and c["sk"] else None
    selection = select.stem(q, k, v, budget, stride=c["stride"], decay=decay, norm=norm, prompt_len=prompt, **options)
    group = c["heads"][0] // c["heads"][1]
    d, block = c["dims"][0], c["block"]
    scale = d**-0.5 if c["scale"] is None else c["scale"]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    terms = {
        (b, h): selecting.stem_value_terms(v[b, :, h], block, c["stride"], 0.2, norm, 1e-6)
        for b in range(c["batch"])
        for h in range(c["heads"][1])
    }
    n = -(-(prompt or c["sk"]) // block)
    for b, h, row, chosen, seen, own, position in rows(selection, c):
        part = q[b, row * block : (row + 1) * block, h]
        scores = {
            j: selecting.stem_score(part, k[b, j * block : (j + 1) * block, h // group], c["stride"], scale)
            + terms[b, h // group][j]
            for j in seen
        }
        wanted = selecting.stem_budget(budget, n, decay, position) if n else 0
        always = selecting.always_kept(seen, own, c["n_first"], c["n_last"])
        selecting.check_blocks(chosen, scores, seen, always, wanted, 1e-4)
    assert math.isclose(selection.density(), density_of(selection, c), rel_tol=1e-9)
    heddle.attention(*make(c)[1:4], causal=c["causal"], window=c["window"], selection=selection)


@settings(PROFILE)
@given(calls(), st.integers(1, 12) | st.floats(0.01, 1.0))
def test_block_topk(c, budget):
    _, q, k, _, options = make(c)
    selection = select.block_topk(q, k, budget=budget, **options)
    group, block = c["heads"][0] // c["heads"][1], c["block"]
    scale = c["dims"][0] ** -0.5 if c["scale"] is None else c["scale"]
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for b, h, row, chosen, seen, own, _ in rows(selection, c):
        mean = q[b, row * block : (row + 1) * block, h].mean(0)
        scores = {j: scale * float(mean @ k[b, j * block : (j + 1) * block, h // group].mean(0)) for j in seen}
        wanted = selecting.kept_count(budget, len(seen), 0)
        always = selecting.always_kept(seen, own, c["n_first"], c["n_last"])
        selecting.check_blocks(chosen, scores, seen, always, wanted, 1e-4)
    assert math.isclose(selection.density(), density_of(selection, c), rel_tol=1e-9)


@settings(PROFILE, max_examples=30)
@given(calls(), st.sampled_from([0.9, 0.5, 0.05, 1.0]))
def test_xattention(c, threshold):
    _, q, k, _, options = make(c)
    selection = select.xattention(q, k, threshold=threshold, stride=c["stride"], **options)
    group = c["heads"][0] // c["heads"][1]
    scale = c["dims"][0] ** -0.5 if c["scale"] is None else c["scale"]
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for b, h, row, chosen, seen, own, _ in rows(selection, c):
        arguments = (c["sq"], c["sk"], row, c["block"], c["stride"], scale, c["causal"], c["window"])
        mass = selecting.group_mass(q[b, :, h], k[b, :, h // group], *arguments)
        always = selecting.always_kept(seen, own, c["n_first"], c["n_last"])
        selecting.check_blocks(chosen, mass, seen, always, len(chosen), 1e-4)
        total, extra = mass.sum(), [mass[j] for j in chosen if j not in always]
        assert mass[chosen].sum() >= threshold * total * (1 - 1e-5) if seen else not chosen
        if extra:  # the lightest was still needed
            assert mass[chosen].sum() - min(extra) < threshold * total * (1 + 1e-5)


@settings(PROFILE, max_examples=30)
@given(calls(), st.integers(1, 4) | st.floats(0.01, 0.7), st.integers(1, 4) | st.floats(0.01, 0.7), st.integers(1, 20))
def test_vertical_slash(c, vertical, slash, n_queries):
    _, q, k, _, options = make(c)
    selection = select.vertical_slash(q, k, vertical=vertical, slash=slash, n_queries=n_queries, **options)
    group, block, columns = c["heads"][0] // c["heads"][1], c["block"], -(-c["sk"] // c["block"])
    masses = {}
    for b, h, _, chosen, seen, own, position in rows(selection, c):
        if (b, h) not in masses:
            arguments = (n_queries, block, c["scale"], 0.0, c["causal"], c["window"])
            masses[b, h] = selecting.last_query_mass(
                np.asarray(q[b, :, h], np.float64), np.asarray(k[b, :, h // group], np.float64), *arguments
            )
        always = selecting.always_kept(seen, own, c["n_first"], c["n_last"])
        certain, possible = set(always), set(always)
        for mass, budget, column_of in (
            (masses[b, h][0], vertical, lambda x: x),
            (masses[b, h][1], slash, lambda x, p=position: p - x),
        ):
            keep = selecting.kept_count(budget, columns, 0)
            bound = sorted(mass, reverse=True)[keep - 1] if keep else math.inf
            top = selecting.top(mass, keep)
            for x in range(columns):
                # Masses closer than float32 tells apart may go either way.
                near = abs(mass[x] - bound) <= 1e-4 * max(mass.max(), 1e-30)
                if column_of(x) in seen:
                    if x in top and not near:
                        certain.add(column_of(x))
                    if x in top or near:
                        possible.add(column_of(x))
        assert certain <= set(chosen) <= possible


@pytest.mark.parametrize("isa", heddle.available_host_isas())
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("norm", ["clipped", "log"])
def test_chunks_select_what_one_pass_does(isa, stride, norm, rng, default_threads):
    """To the bit, on every instruction set, whatever the chunks."""
    heddle.set_host_isa(isa)
    n, block = 1500, 16
    q, k, v = normal(rng, 1, n, 4, 24), normal(rng, 1, n, 2, 24), 3 * normal(rng, 1, n, 2, 24)
    options = {"block": block, "stride": stride, "norm": norm, "n_first": 1, "n_last": 2}
    whole = select.stem(q, k, v, **options)
    assert 0.3 < whole.density() < 0.9
    for chunk in (16, 160, 1040):
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            part = select.stem(q[:, start:end], k[:, :end], v[:, :end], prompt_len=n, **options)
            expected = whole.mask[:, :, start // block : -(-end // block)]
            columns = part.mask.shape[-1]
            np.testing.assert_array_equal(part.mask, expected[..., :columns])
            assert not expected[..., columns:].any()
    assert heddle.attention(q, k, v, causal=True, selection=whole).shape == q.shape


def test_published_schedule():
    """k_s and its decay at the lengths where the schedule changes."""
    for n, start in ((55, 55), (56, 0.2 * 56 + 30), (159, 0.2 * 159 + 30), (160, 46), (1000, 130)):
        assert selecting.stem_start(None, n) == start
        block = 2
        q = np.zeros((1, n * block, 1, 4), np.float32)
        mask = select.stem(q, q, q, block=block, stride=2, n_first=0, n_last=1).mask[0, 0]
        for row in range(n):
            expected = min(row + 1, math.ceil(start - start * (1.0 - 0.7) * row / n))
            assert mask[row].sum() == expected, (n, row)


def test_a_cache_gives_what_arrays_give(rng):
    n, page_size = 300, 16
    q, k, v = normal(rng, 2, 100, 4, 16), normal(rng, 2, n, 2, 16), normal(rng, 2, n, 2, 16)
    table, pages = paged(rng, [n, n], page_size)
    cache = heddle.KVCache(pages, page_size, 2, 16, format="fp32")
    seq_lens = cache.append(k, v, table, np.zeros(2, np.int32))
    for function, options in (
        (select.stem, {"budget": 5, "n_first": 1, "n_last": 1}),
        (select.block_topk, {"budget": 5}),
        (select.xattention, {"threshold": 0.5}),
        (select.vertical_slash, {"vertical": 2, "slash": 2}),
    ):
        a = function(q, cache, block=16, block_table=table, seq_lens=seq_lens, **options)
        b = function(q, k, v, block=16, **options)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.density() == b.density() < 1
        out = heddle.decode(q, cache, table, seq_lens, selection=a)
        np.testing.assert_allclose(out, heddle.attention(q, k, v, causal=True, selection=b), atol=2e-5)


def test_packed_requests(rng):
    cu_q, cu_k = np.array([0, 40, 40, 90], np.int32), np.array([0, 60, 70, 140], np.int32)
    q, k, v = normal(rng, 90, 4, 16), normal(rng, 140, 2, 16), normal(rng, 140, 2, 16)
    packed = select.stem(q, k, v, 3, block=8, n_first=1, n_last=1, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in range(3):
        qs, ks = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = select.stem(q[None, qs], k[None, ks], v[None, ks], 3, block=8, n_first=1, n_last=1).mask[0]
        np.testing.assert_array_equal(packed.mask[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert packed.mask[b].sum() == alone.sum()
    heddle.attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, selection=packed)


def test_no_requests_and_no_tokens():
    for shape in ((0, 5), (2, 0)):
        q, k = np.zeros((*shape, 4, 8), np.float32), np.zeros((*shape, 2, 8), np.float32)
        for selection in (
            select.stem(q, k, k),
            select.block_topk(q, k, budget=1),
            select.xattention(q, k),
            select.vertical_slash(q, k, vertical=1, slash=1),
        ):
            assert selection.mask.shape == (shape[0], 4, 0, 0)
            assert selection.density() == 1.0
            assert heddle.attention(q, k, k, causal=True, selection=selection).shape == q.shape


def test_threads_change_nothing(rng, default_threads):
    q, k, v = normal(rng, 1, 700, 6, 16), normal(rng, 1, 700, 2, 16), normal(rng, 1, 700, 2, 16)
    found = []
    for threads in (1, 2):
        heddle.set_num_threads(threads)
        found.append(
            [
                select.stem(q, k, v, 6, block=16).mask.tobytes(),
                select.xattention(q, k, block=16).mask.tobytes(),
                select.vertical_slash(q, k, vertical=3, slash=3, block=16).mask.tobytes(),
            ]
        )
    assert found[0] == found[1]


Q, K, V = (normal(np.random.default_rng(3), 1, s, h, 8) for s, h in ((50, 4), (60, 2), (60, 2)))


def with_nan(x, *at):
    x = x.copy()
    x[at] = np.nan
    return x


@pytest.mark.parametrize(
    ("function", "changes", "argument", "message"),
    [
        (select.stem, {"budget": 0}, "budget", "1 and above"),
        (select.stem, {"budget": 2.0}, "budget", "up to 1"),
        (select.stem, {"block": 0}, "block", "1 to"),
        (select.stem, {"stride": 3}, "stride", "divisors of block, 8"),
        (select.stem, {"stride": 0}, "stride", "divisors of block, 8"),
        (select.stem, {"decay": 1.5}, "decay", "0 to 1"),
        (select.stem, {"prompt_len": 59}, "prompt_len", "59; allowed are 60"),
        (select.stem, {"prompt_len": 0}, "prompt_len", "1 and above"),
        (select.stem, {"n_first": -1}, "n_first", "0 and above"),
        (select.stem, {"n_last": -1}, "n_last", "0 and above"),
        (select.stem, {"norm": "mean"}, "norm", "clipped, log, zscore"),
        (select.stem, {"epsilon": -1.0}, "epsilon", "above 0"),
        (select.stem, {"value_norms": np.ones((1, 60, 3), "f4")}, "value_norms", "is 3"),
        (select.stem, {"q": with_nan(Q, 0, 49, 3, 0), "budget": 3, "n_last": 1, "n_first": 0}, "q", "block row 6"),
        (select.stem, {"k": with_nan(K, 0, 20, 1, 0), "budget": 3, "n_last": 1, "n_first": 0}, "k", "query head 2"),
        (select.stem, {"v": with_nan(V, 0, 9, 1, 0), "budget": 3, "n_last": 1, "n_first": 0}, "v", "query head 2"),
        (select.block_topk, {}, "budget", "not given"),
        (select.block_topk, {"budget": -1}, "budget", "1 and above"),
        (select.xattention, {"threshold": 0.0}, "threshold", "above 0 up to 1"),
        (select.xattention, {"threshold": 1.1}, "threshold", "above 0 up to 1"),
        (select.xattention, {"stride": 5}, "stride", "divisors of block, 8"),
        (select.xattention, {"k": with_nan(K, 0, 20, 1, 0)}, "k", "query head 2"),
        (select.vertical_slash, {"slash": 1}, "vertical", "not given"),
        (select.vertical_slash, {"vertical": 1, "slash": 0}, "slash", "1 and above"),
        (select.vertical_slash, {"vertical": 1, "slash": 1, "n_queries": 0}, "n_queries", "1 and above"),
        (select.vertical_slash, {"vertical": 1, "slash": 1, "q": with_nan(Q, 0, 49, 0, 0)}, "q", "block row 6"),
    ],
)  # fmt: skip
def test_bad_input(function, changes, argument, message):
    defaults = {"stride": 4} if function in (select.stem, select.xattention) else {}
    with pytest.raises(heddle.HeddleValueError) as caught:
        function(**({"q": Q, "k": K, "v": V, "block": 8} | defaults | changes))
    assert caught.value.argument == argument
    assert message in str(caught.value)
