"""Token selection at run time against its definition in float64."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arrays
import heddle
import selecting
from arrays import normal, paged, to_torch
from heddle import select

FORMATS = ("fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8")
settings.register_profile(
    "select", deadline=None, max_examples=80, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


def lists(selection):
    """Token lists by index, as Python lists; -1 pads the rest."""
    indices, lengths = selection.indices, selection.lengths
    out = np.empty(lengths.shape, object)
    for at in np.ndindex(lengths.shape):
        n = lengths[at]
        assert (indices[at][n:] == -1).all()
        out[at] = indices[at][:n].tolist()
    return out


budgets = st.integers(1, 40) | st.floats(0.01, 1.0)


@st.composite
def calls(draw):
    group = draw(st.integers(1, 5) | st.sampled_from([8, 16, 17, 19]))
    kv_heads = draw(st.integers(1, 3))
    return {
        "batch": draw(st.integers(0, 3)),
        "sq": draw(st.integers(0, 4)),
        "sk": draw(st.integers(0, 60) | st.sampled_from([300, 1100])),
        "heads": (kv_heads * group, kv_heads),
        "dims": (draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        "dtype": draw(st.sampled_from(list(arrays.DTYPES))),
        "metric": draw(st.sampled_from(["qk", "oam", "loo"])),
        "budget": draw(budgets),
        "n_sink": draw(st.integers(0, 4)),
        "n_recent": draw(st.integers(0, 4)),
        "beta": draw(st.sampled_from([0.2, 0.0, 1.5])),
        "norm": draw(st.sampled_from(["clipped", "log"])),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(st.none() | st.integers(0, 30), st.none() | st.integers(0, 5))),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "scale": draw(st.sampled_from([None, 0.3, -0.2])),
        "sinks": draw(st.booleans()),
        "torch": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def options_of(c, rng):
    chosen = ("metric", "budget", "n_sink", "n_recent", "beta", "norm", "causal", "window", "softcap", "scale")
    options = {name: c[name] for name in chosen}
    if isinstance(c["budget"], int):
        options["budget"] = max(c["budget"], c["n_sink"] + c["n_recent"])
    if c["sinks"]:
        options["sinks"] = normal(rng, c["heads"][0])
    return options


def check_lists(found, q, k, v, options, tolerance, sk=None):
    """found [Sq][Hkv] of one request: q [Sq, Hq, D], k [Sk, Hkv, D], v [Sk, Hkv, Dv], meant as float64."""
    options = dict(options)
    budget, n_sink, n_recent = (options.pop(name) for name in ("budget", "n_sink", "n_recent"))
    causal, window, sinks = options.pop("causal", True), options.pop("window", None), options.pop("sinks", None)
    output = options.pop("output", None)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        begin, end = selecting.seen_keys(i, len(q), len(k), causal, window)
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            metric = selecting.token_metric(
                q[i, heads],
                k[begin:end, h],
                v[begin:end, h],
                sinks=None if sinks is None else sinks[heads],
                output=None if output is None else output[i, heads],
                **options,
            )
            selecting.check_list(found[i][h], metric, begin, end, budget, n_sink, n_recent, tolerance)


@settings(settings.get_profile("select"))
@given(calls())
def test_topk_over_arrays(c):
    rng = np.random.default_rng(c["seed"])
    (hq, hkv), (d, dv) = c["heads"], c["dims"]
    q, k, v = (
        normal(rng, c["batch"], s, h, n, dtype=c["dtype"])
        for s, h, n in ((c["sq"], hq, d), (c["sk"], hkv, d), (c["sk"], hkv, dv))
    )
    v *= np.asarray(rng.choice([0.2, 1, 5], (c["batch"], c["sk"], hkv, 1)), v.dtype)
    options = options_of(c, rng)
    given_arrays = [to_torch(x) for x in (q, k, v)] if c["torch"] else [q, k, v]
    found = lists(select.topk(*given_arrays, **options))
    if c["sq"] == 1:
        found = found[:, None]
    assert found.shape == (c["batch"], c["sq"], hkv)
    for b in range(c["batch"]):
        check_lists(found[b], *(np.asarray(x[b], np.float64) for x in (q, k, v)), options, 1e-4)


@settings(settings.get_profile("select"), max_examples=60)
@given(calls(), st.sampled_from(FORMATS), st.sampled_from([1, 4, 16]), st.lists(st.integers(0, 50), max_size=3))
def test_topk_over_a_cache(c, format, page_size, seq_lens):
    rng = np.random.default_rng(c["seed"])
    (hq, hkv), (d, dv) = c["heads"], c["dims"]
    seq_lens = np.array(seq_lens, np.int32)
    table, pages = paged(rng, seq_lens, page_size)
    partition = 1 if format != "int8-a" else int(rng.choice([1, page_size]))
    cache = heddle.KVCache(pages, page_size, hkv, d, head_dim_v=dv, format=format, partition=partition)
    # What no request owns may hold anything.
    for array in (cache.k, cache.v, cache.k_scale if cache.partition > 1 else None, cache.value_norms):
        if array is not None and array.size > 1:
            array.view(np.uint8)[...] = 0xFF
    total = int(seq_lens.sum())
    k, v = normal(rng, total, hkv, d), normal(rng, total, hkv, dv) * rng.choice([0.2, 5], (total, hkv, 1)).astype("f4")
    cu = np.concatenate([[0], np.cumsum(seq_lens)]).astype(np.int32)
    cache.append(k, v, table, np.zeros(len(seq_lens), np.int32), cu_seqlens=cu)
    q = normal(rng, len(seq_lens), c["sq"], hq, d)
    options = options_of(c, rng)
    selection = select.topk(q, cache, block_table=table, seq_lens=seq_lens, **options)
    found = lists(selection)
    if c["sq"] == 1:
        found = found[:, None]
    # What is stored, as decode reads it.
    stored_k, stored_v = (np.asarray(x, np.float64) for x in (cache.k, cache.v))
    if cache.k_scale is not None:
        scale = cache.k_scale.astype(np.float64)
        stored_k = stored_k * (scale if scale.size == 1 else np.repeat(scale, partition, axis=-1)[..., None])
        stored_v = stored_v * float(cache.v_scale[0])
    meant_q = selecting.queries_of(cache, q)
    for b, n in enumerate(seq_lens):
        slots = [(table[b, t // page_size], t % page_size) for t in range(n)]
        rk = np.array([stored_k[p, :, s] for p, s in slots]).reshape(n, hkv, d)
        rv = np.array([stored_v[p, :, s] for p, s in slots]).reshape(n, hkv, dv)
        if options["metric"] == "oam":  # norms are those of the values before quantization
            rv = v[cu[b] : cu[b + 1]].astype(np.float64)
        check_lists(found[b], meant_q[b], rk, rv, options, 2e-4)
    if total and q.size:
        heddle.decode(q, cache, table, seq_lens, selection=selection, causal=options["causal"])


@pytest.mark.parametrize("isa", heddle.available_host_isas())
def test_ties_go_to_the_lower_index(isa, rng, default_threads):
    """Whole numbers: every score is exact, so the lists are, on every instruction set and whatever the threads."""
    heddle.set_host_isa(isa)
    q = rng.integers(-2, 3, (2, 1, 6, 8)).astype(np.float32)
    k = rng.integers(-1, 2, (2, 500, 2, 8)).astype(np.float32)
    for threads in (1, 2):
        heddle.set_num_threads(threads)
        found = lists(select.topk(q, k, budget=37, scale=1.0, n_sink=2, n_recent=3))
        for b in range(2):
            for h in range(2):
                metric = selecting.token_metric(q[b, 0, h * 3 : h * 3 + 3], k[b, :, h], None, "qk", scale=1.0)
                middle = selecting.top(metric[2:497], 32)
                assert found[b, h] == [0, 1, *(j + 2 for j in middle), 497, 498, 499]


@pytest.mark.parametrize("isa", heddle.available_host_isas())
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 8191, 8192, 20000, 131072])
def test_exact_top_k_of_scores(isa, n, rng, default_threads):
    heddle.set_host_isa(isa)
    values = {
        "normal": rng.standard_normal(n),
        "ties": rng.integers(-3, 4, n),
        "one value": np.full(n, -2.5),
        "zeros of both signs": rng.choice([0.0, -0.0], n),
        "ascending": np.arange(n),
        "tiny": rng.standard_normal(n) * 1e-42,
        "infinities": rng.choice([np.inf, -np.inf, 1.0], n),
        "a few large": np.where(np.arange(n) % 997 == 3, 1e30, rng.standard_normal(n)),
        "sample misleads": np.where(np.arange(n) % max(n // 1024, 1) == 0, 5.0, rng.standard_normal(n)),
    }
    for name, x in values.items():
        x = x.astype(np.float32)
        order = np.argsort(-x.astype(np.float64), kind="stable")
        for k in {1, 2, n // 50 + 1, n // 3 + 1, max(n - 1, 1), n}:
            if k > n:
                continue
            found = select.top_scores(x.reshape(1, 1, n), int(k)).indices[0, 0]
            np.testing.assert_array_equal(found, np.sort(order[:k]), err_msg=f"{name}, {k} of {n}")


def test_top_scores_of_ragged_rows(rng):
    x = normal(rng, 2, 3, 2, 40)
    lengths = rng.integers(0, 41, (2, 3, 2)).astype(np.int32)
    for at in np.ndindex(lengths.shape):
        x[at][lengths[at] :] = np.nan
    found = lists(select.top_scores(x, 0.3, n_sink=1, n_recent=2, lengths=lengths))
    for at in np.ndindex(lengths.shape):
        selecting.check_list(found[at], x[at], 0, lengths[at], 0.3, 1, 2, 0.0)


def test_packed_requests(rng):
    """As if each request were alone; queries that no request reaches read nothing."""
    cu_q, cu_k = np.array([0, 2, 2, 5], np.int32), np.array([0, 30, 50, 57], np.int32)
    q, k, v = normal(rng, 6, 6, 20), normal(rng, 60, 2, 20), normal(rng, 60, 2, 9)
    k[57:], v[57:] = np.nan, np.nan
    for metric in ("qk", "oam", "loo"):
        packed = select.topk(q, k, v, 5, metric, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        found = lists(packed)
        assert found.shape == (6, 2)
        assert found[5].tolist() == [[], []]
        for b in range(3):
            alone = select.topk(q[None, cu_q[b] : cu_q[b + 1]], k[None, cu_k[b] : cu_k[b + 1]],
                                v[None, cu_k[b] : cu_k[b + 1]], 5, metric)  # fmt: skip
            assert found[cu_q[b] : cu_q[b + 1]].tolist() == lists(alone)[0].tolist()
        out = heddle.attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, selection=packed)
        assert np.isfinite(out).all()


def test_packed_lists_are_by_query_even_if_requests_are_as_many(rng):
    cu_q, cu_k = np.array([0, 2, 2], np.int32), np.array([0, 9, 12], np.int32)
    q, k = normal(rng, 2, 2, 8), normal(rng, 12, 1, 8)
    packed = select.topk(q, k, budget=1, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    out = heddle.attention(q, k, k, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, selection=packed)
    for i in range(2):
        np.testing.assert_allclose(out[i], np.repeat(k[packed.indices[i, 0]], 2, axis=0)[0:2].reshape(2, 8), rtol=1e-6)


def test_given_norms_and_outputs(rng):
    q, k, v = normal(rng, 2, 1, 4, 16), normal(rng, 2, 90, 2, 16), 3 * normal(rng, 2, 90, 2, 12)
    norms = np.linalg.norm(v, axis=-1).astype(np.float32)
    norms[:, 7] = 1e6  # believed
    found = lists(select.topk(q, k, v, 3, "oam", value_norms=norms, beta=5.0))
    assert all(7 in one for one in found.flat)
    output = normal(rng, 2, 1, 4, 12)
    found = lists(select.topk(q, k, v, 20, "loo", output=output))[:, None]
    for b in range(2):
        arguments = {"metric": "loo", "budget": 20, "n_sink": 0, "n_recent": 0, "output": output[b]}
        check_lists(found[b], q[b], k[b], v[b].astype(np.float64), arguments, 1e-4)


@pytest.mark.parametrize("smooth", [False, True])
def test_quantized_operands(rng, smooth):
    q, k, v = normal(rng, 1, 3, 6, 32), 2 + normal(rng, 1, 80, 2, 32), normal(rng, 1, 80, 2, 32)
    k8, v8 = heddle.quantize(k, "int8", "token", smooth=smooth), heddle.quantize(v, "fp8")
    q8 = heddle.quantize(q, "int8", "token")
    meant = [x.dequantize()[0].astype(np.float64) for x in (k8, v8)]
    for query, meaning in ((q, q[0]), (q8, q8.dequantize()[0])):
        for metric in ("qk", "oam", "loo"):
            found = lists(select.topk(query, k8, v8, 11, metric))
            arguments = {"metric": metric, "budget": 11, "n_sink": 0, "n_recent": 0}
            check_lists(found[0], meaning.astype(np.float64), *meant, arguments, 2e-4)


def test_leave_one_out_is_what_dropping_a_token_does(rng):
    """The metric is the distance that the output really moves, and an only token cannot be spared."""
    q, k, v = normal(rng, 1, 1, 1, 8), normal(rng, 1, 12, 1, 8), normal(rng, 1, 12, 1, 8)
    whole = heddle.attention(q, k, v)
    moved = []
    for j in range(12):
        rest = [i for i in range(12) if i != j]
        moved.append(np.linalg.norm(heddle.attention(q, k[:, rest], v[:, rest]) - whole))
    for n in range(1, 12):
        assert lists(select.topk(q, k, v, n, "loo"))[0, 0] == selecting.top(moved, n)
    assert lists(select.topk(q, k[:, :1], v[:, :1], 1, "loo"))[0, 0] == [0]


def test_density_and_mass(rng, kind):
    q, k, v = (kind(normal(rng, 2, s, h, 16)) for s, h in ((3, 4), (40, 2), (40, 2)))
    selection = select.topk(q, k, v, 10, "oam")
    seen = [38, 39, 40]
    assert math.isclose(selection.density(), 30 / sum(seen))
    mass = select.mass(selection, q, k, v)
    assert type(mass) is type(q)
    chosen = lists(selection)
    for b in range(2):
        for i in range(3):
            for h in range(4):
                s = selecting.scores(np.asarray(q)[b, i, h], np.asarray(k)[b, : seen[i], h // 2])
                p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
                assert math.isclose(float(mass[b, h, i]), p[chosen[b, i, h // 2]].sum(), rel_tol=1e-4)
    assert select.topk(q, k, v, 40).density() == 1.0
    everything = np.asarray(select.mass(select.topk(q, k, v, 40), q, k))
    np.testing.assert_allclose(everything, 1.0, rtol=1e-5)


def test_the_cache_keeps_the_mass_too(rng):
    k, v, q = normal(rng, 2, 40, 2, 16), normal(rng, 2, 40, 2, 16), normal(rng, 2, 1, 4, 16)
    table, pages = paged(rng, [40, 40], 8)
    cache = heddle.KVCache(pages, 8, 2, 16, format="fp32")
    seq_lens = cache.append(k, v, table, np.zeros(2, np.int32))
    seq_lens[1] = 0
    arguments = {"block_table": table, "seq_lens": seq_lens}
    selection = select.topk(q, cache, budget=6, **arguments)
    mass = select.mass(selection, q, cache, **arguments)
    np.testing.assert_allclose(mass[0], select.mass(select.topk(q[:1], k[:1], budget=6), q[:1], k[:1])[0], rtol=1e-5)
    assert (mass[1] == 1).all()


def test_what_a_selection_shows(rng):
    q, k = normal(rng, 1, 1, 2, 8), normal(rng, 1, 30, 1, 8)
    selection = select.topk(q, k, budget=4)
    assert selection.indices.shape == (1, 1, 4)
    assert selection.indices.dtype == selection.lengths.dtype == np.int32
    assert selection.mask is None
    assert selection.block is None
    assert not selection.indices.flags.writeable
    indices = selection.indices
    del selection
    assert (np.diff(indices[0, 0]) > 0).all()
    blocks = select.block_mask(np.ones((1, 1), bool), (3, 5))
    assert blocks.block == (3, 5)
    assert blocks.mask.shape == (1, 1)
    assert blocks.indices is None
    with pytest.raises(heddle.HeddleValueError, match="not made for a call"):
        blocks.density()


def test_one_list_for_all_heads(rng, backend):
    q, k, v = normal(rng, 1, 5, 4, 8), normal(rng, 1, 20, 2, 8), normal(rng, 1, 20, 2, 8)
    one = np.sort(rng.choice(20, (1, 5, 1, 6), replace=True), axis=-1).astype(np.int32)
    one += np.arange(6, dtype=np.int32) * 20
    one = one % 20
    one = np.sort(np.stack([rng.permutation(20)[:6] for _ in range(5)])[None, :, None].astype(np.int32), axis=-1)
    a = heddle.attention(q, k, v, selection=select.tokens(one), backend=backend)
    b = heddle.attention(q, k, v, selection=select.tokens(one.repeat(2, axis=2)), backend=backend)
    np.testing.assert_array_equal(a, b)


# --- pages ---


def page_options(c, rng):
    options = options_of(c, rng)
    if options["metric"] == "loo":
        options["metric"] = "oam"
    options.pop("sinks", None)
    return options


def check_page_lists(found, q, k, v, page_size, options, tolerance):
    """found [Sq][Hkv] of one request: q [Sq, Hq, D], k [Sk, Hkv, D], v [Sk, Hkv, Dv], meant as float64."""
    options = dict(options)
    budget, n_sink, n_recent = (options.pop(name) for name in ("budget", "n_sink", "n_recent"))
    causal, window = options.pop("causal", True), options.pop("window", None)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        begin, end = selecting.seen_keys(i, len(q), len(k), causal, window)
        for h in range(k.shape[1]):
            bounds = {}
            for page in range(-(-len(k) // page_size)):
                part = slice(page * page_size, (page + 1) * page_size)
                row = q[i, h * group : (h + 1) * group]
                bounds[page] = selecting.page_bound(row, k[part, h], v[part, h], **options)
            selecting.check_pages(found[i][h], bounds, begin, end, page_size, budget, n_sink, n_recent, tolerance)


@settings(settings.get_profile("select"), max_examples=50)
@given(calls(), st.integers(1, 20))
def test_pages_over_arrays(c, page_size):
    rng = np.random.default_rng(c["seed"])
    (hq, hkv), (d, dv) = c["heads"], c["dims"]
    sk = min(c["sk"], 100)
    q, k, v = (
        normal(rng, c["batch"], s, h, n, dtype=c["dtype"])
        for s, h, n in ((c["sq"], hq, d), (sk, hkv, d), (sk, hkv, dv))
    )
    options = page_options(c, rng)
    found = lists(select.pages(q, k, v, page_size=page_size, **options))
    if c["sq"] == 1:
        found = found[:, None]
    for b in range(c["batch"]):
        check_page_lists(found[b], *(np.asarray(x[b], np.float64) for x in (q, k, v)), page_size, options, 1e-4)


def stored_as_meant(cache):
    k = np.asarray(cache.k, np.float64)
    if cache.k_scale is None:
        return k
    scale = cache.k_scale.astype(np.float64)
    return k * (scale if scale.size == 1 else np.repeat(scale, cache.partition, axis=-1)[..., None])


@settings(settings.get_profile("select"), max_examples=60)
@given(calls(), st.sampled_from(FORMATS), st.sampled_from([1, 4, 16]), st.lists(st.integers(0, 50), max_size=3))
def test_pages_over_a_cache(c, format, page_size, seq_lens):
    """Appended in pieces, some of them written over: the bounds are those of what is there."""
    rng = np.random.default_rng(c["seed"])
    (hq, hkv), (d, dv) = c["heads"], c["dims"]
    seq_lens = np.array(seq_lens, np.int32)
    table, pages = paged(rng, seq_lens, page_size)
    partition = 1 if format != "int8-a" else int(rng.choice([1, page_size]))
    cache = heddle.KVCache(
        pages, page_size, hkv, d, head_dim_v=dv, format=format, partition=partition, page_bounds=True
    )
    for array in (cache.k, cache.v, cache.page_bounds, cache.page_norms):
        array.view(np.uint8)[...] = 0xFF if array.dtype != np.int8 else 0x7F
    norms = np.zeros((len(seq_lens), 51, hkv))
    held = np.zeros(len(seq_lens), np.int32)
    if len(seq_lens):
        sample = normal(rng, 1, 64, hkv, d), normal(rng, 1, 64, hkv, dv)
        cache.calibrate(*sample)
    while (held < seq_lens).any():
        start = np.maximum(held - rng.integers(0, 3, len(held)), 0).astype(np.int32)  # the last ones again
        count = np.minimum(rng.integers(1, 12, len(held)), seq_lens - start)
        cu = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        k, v = normal(rng, cu[-1], hkv, d), normal(rng, cu[-1], hkv, dv)
        held = np.asarray(cache.append(k, v, table, start, cu_seqlens=cu))
        for b in range(len(held)):
            norms[b, start[b] : held[b]] = np.linalg.norm(v[cu[b] : cu[b + 1]].astype(np.float64), axis=-1)
    lengths = np.maximum(seq_lens - rng.integers(0, 2, len(seq_lens)), 0).astype(np.int32)  # the last one given up
    q = normal(rng, len(seq_lens), c["sq"], hq, d)
    options = page_options(c, rng)
    selection = select.pages(q, cache, block_table=table, seq_lens=lengths, **options)
    found = lists(selection)
    if c["sq"] == 1:
        found = found[:, None]
    stored = stored_as_meant(cache)
    meant_q = selecting.queries_of(cache, q)
    for b, n in enumerate(lengths):
        rk = np.array([stored[table[b, t // page_size], :, t % page_size] for t in range(n)]).reshape(n, hkv, d)
        rv = norms[b, :n, :, None]  # a value of one number, as long
        check_page_lists(found[b], meant_q[b], rk, rv, page_size, options, 2e-4)
        for page in range(-(-int(seq_lens[b]) // page_size)):
            slots = min(page_size, int(seq_lens[b]) - page * page_size)
            at = table[b, page]
            assert cache.page_tokens[at] == slots
            rows = stored[at, :, :slots]
            bounds = np.asarray(cache.page_bounds[at], np.float64)
            if cache.k_scale is not None and cache.k_scale.size == 1:
                bounds = bounds * np.float64(cache.k_scale[0])
            np.testing.assert_allclose(bounds, np.stack([rows.max(1), rows.min(1)], 1), rtol=1e-6)
            longest = norms[b, page * page_size :][:slots].max(0)
            np.testing.assert_allclose(cache.page_norms[at], longest, rtol=1e-6)
    heddle.decode(q, cache, table, lengths, selection=selection, causal=options["causal"], window=options["window"])


def test_a_bound_holds(rng):
    """No token of a page that was left out beats the bound of one that was kept, by more than the bounds' slack."""
    q, k, v = normal(rng, 1, 1, 4, 32), normal(rng, 1, 256, 2, 32), 4 * normal(rng, 1, 256, 2, 32)
    for h in range(2):
        metric = selecting.token_metric(q[0, 0, 2 * h : 2 * h + 2], k[0, :, h], v[0, :, h], "oam")
        for page in range(16):
            part = slice(page * 16, page * 16 + 16)
            bound = selecting.page_bound(q[0, 0, 2 * h : 2 * h + 2], k[0, part, h], v[0, part, h], "oam")
            assert metric[part].max() <= bound + 1e-9


def test_pages_need_their_bounds(rng):
    q, k = normal(rng, 1, 1, 2, 8), normal(rng, 1, 40, 1, 8)
    table, pages = paged(rng, [40], 8)
    cache = heddle.KVCache(pages, 8, 1, 8)
    seq_lens = cache.append(k, k, table, np.zeros(1, np.int32))
    arguments = {"budget": 16, "block_table": table, "seq_lens": seq_lens}
    with pytest.raises(heddle.HeddleValueError, match="cache: made without page_bounds") as caught:
        select.pages(q, cache, **arguments)
    assert caught.value.argument == "cache"
    with pytest.raises(heddle.HeddleValueError, match="page_size: 0; allowed are 1"):
        select.pages(q, k, k, 16)
    with pytest.raises(heddle.HeddleValueError, match="loo has no bound"):
        select.pages(q, k, k, 16, "loo", page_size=8)
    with pytest.raises(heddle.HeddleValueError, match="a page's bound is NaN") as caught:
        select.pages(q, with_nan(k, 0, 20, 0, 3), budget=16, page_size=8)
    assert caught.value.argument == "k"
    with pytest.raises(heddle.HeddleValueError, match="a page's bound is NaN") as caught:
        select.pages(with_nan(q, 0, 0, 1, 3), k, budget=16, page_size=8)
    assert caught.value.argument == "q"
    bounded = heddle.KVCache(pages, 8, 1, 8, page_bounds=True)
    assert bounded.nbytes > cache.nbytes
    assert bounded.bytes_per_token > cache.bytes_per_token
    assert cache.page_bounds is None
    with pytest.raises(heddle.HeddleValueError, match="allowed is 8, the cache's own"):
        select.pages(q, bounded, page_size=16, **arguments)


# --- bad input ---

Q, K, V = (normal(np.random.default_rng(3), 1, s, h, 8) for s, h in ((2, 4), (20, 2), (20, 2)))


def with_nan(x, *at):
    x = x.copy()
    x[at] = np.nan
    return x


@pytest.mark.parametrize(
    ("changes", "argument", "given", "allowed"),
    [
        ({"budget": 0}, "budget", "0", "1 and above"),
        ({"budget": 0.0}, "budget", "0", "fractions above 0"),
        ({"budget": -3}, "budget", "-3", "1 and above"),
        ({"budget": 1.5}, "budget", "1.5", "up to 1"),
        ({"budget": float("nan")}, "budget", "nan", "up to 1"),
        ({"budget": None}, "budget", "not given", "a count or a fraction"),
        ({"budget": 4, "n_sink": 3, "n_recent": 2}, "budget", "4", "3 + 2"),
        ({"n_sink": -1}, "n_sink", "-1", "0 and above"),
        ({"n_recent": -1}, "n_recent", "-1", "0 and above"),
        ({"metric": "best"}, "metric", "'best'", "qk, oam, loo"),
        ({"norm": "max"}, "norm", "'max'", "clipped, log"),
        ({"epsilon": 0.0}, "epsilon", "0", "above 0"),
        ({"beta": float("inf")}, "beta", "inf", "finite"),
        ({"value_norms": np.ones((1, 20, 2), "f4")}, "value_norms", "given", "oam only"),
        ({"value_norms": np.ones((1, 19, 2), "f4"), "metric": "oam"}, "value_norms", "is 19", "20"),
        ({"value_norms": np.ones((1, 20, 4), "f4"), "metric": "oam"}, "value_norms", "is 4", "2"),
        ({"value_norms": np.ones((20, 2), "f4"), "metric": "oam"}, "value_norms", "rank 2", "3"),
        ({"output": np.ones((1, 2, 4, 8), "f4")}, "output", "given", "loo only"),
        ({"output": np.ones((1, 2, 4, 7), "f4"), "metric": "loo"}, "output", "[1, 2, 4, 7]", "[1, 2, 4, 8]"),
        ({"v": None, "metric": "oam"}, "v", "NoneType", "numpy"),
        ({"k": K[:, :, :, :5]}, "k", "is 5", "8"),
        ({"block_table": np.zeros((1, 2), np.int32)}, "block_table", "given with arrays", "KVCache"),
        ({"q": with_nan(Q, 0, 1, 2, 3)}, "q", "NaN in request 0, query 1, KV head 1", "ranked"),
        ({"k": with_nan(K, 0, 7, 1, 0)}, "k", "key 7 is NaN for request 0, query 0, KV head 1", "ranked"),
        ({"v": with_nan(V, 0, 3, 0, 0), "metric": "oam"}, "v", "NaN in the norms", "ranked"),
        ({"v": with_nan(V, 0, 3, 0, 0), "metric": "loo"}, "v", "NaN in the distances", "ranked"),
    ],
)  # fmt: skip
def test_bad_input(changes, argument, given, allowed):
    arguments = {"q": Q, "k": K, "v": V, "budget": 5} | changes
    kinds = heddle.HeddleTypeError if given == "NoneType" else heddle.HeddleValueError
    with pytest.raises(kinds) as caught:
        select.topk(**arguments)
    assert caught.value.argument == argument
    assert given in str(caught.value)
    assert allowed in str(caught.value)


def test_nan_of_a_score_is_named():
    scores = with_nan(np.ones((1, 2, 9), np.float32), 0, 1, 4)
    with pytest.raises(heddle.HeddleValueError, match="NaN at 4 of list 1"):
        select.top_scores(scores, 3)
    with pytest.raises(heddle.HeddleValueError, match="allowed are 0 to 9"):
        select.top_scores(np.ones((1, 2, 9), np.float32), 3, lengths=np.full((1, 2), 10, np.int32))
