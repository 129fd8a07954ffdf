"""The DSA indexer against its definition in float64, and attention over what it selects."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arrays
import formula
import heddle
import selecting
from arrays import normal, paged, to_torch
from heddle import select

settings.register_profile(
    "indexer", deadline=None, max_examples=80, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
PROFILE = settings.get_profile("indexer")


@st.composite
def calls(draw):
    return {
        "batch": draw(st.integers(0, 3)),
        "sq": draw(st.integers(0, 20)),
        "sk": draw(st.integers(0, 200) | st.just(1500)),
        "heads": draw(st.integers(1, 9) | st.sampled_from([64, 97])),
        "dim": draw(st.integers(1, 70) | st.just(128)),
        "dtype": draw(st.sampled_from(list(arrays.DTYPES))),
        "keys": draw(
            st.sampled_from([None, ("int8", "token"), ("int8", "tensor"), ("fp8", "token"), ("int8", ("partition", 5))])
        ),
        "quantized_q": draw(st.booleans()),
        "weights": draw(st.sampled_from(list(arrays.DTYPES))),
        "budget": draw(st.integers(1, 60) | st.floats(0.01, 1.0)),
        "n_sink": draw(st.integers(0, 4)),
        "n_recent": draw(st.integers(0, 4)),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(st.none() | st.integers(0, 100), st.none() | st.integers(0, 5))),
        "scale": draw(st.sampled_from([1.0, 0.3, -0.5])),
        "torch": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def options_of(c):
    options = {name: c[name] for name in ("budget", "n_sink", "n_recent", "causal", "window", "scale")}
    if isinstance(c["budget"], int):
        options["budget"] = max(c["budget"], c["n_sink"] + c["n_recent"])
    return options


def check_lists(selection, b, q, k, weights, options, tolerance):
    """Of request b: q [Sq, Hi, Di], k [Sk, Di], weights [Sq, Hi], as they are meant."""
    indices, lengths = selection.indices, selection.lengths
    if indices.ndim == 3:
        indices, lengths = indices[:, None], lengths[:, None]
    for i in range(len(q)):
        begin, end = selecting.seen_keys(i, len(q), len(k), options["causal"], options["window"])
        metric = selecting.index_scores(q[i], k[begin:end], weights[i], options["scale"])
        n = lengths[b, i, 0]
        assert (indices[b, i, 0, n:] == -1).all()
        # Sums of terms of either sign: what they would be without cancellation bounds the error.
        size = np.abs(selecting.index_scores(q[i], k[begin:end], np.abs(weights[i]), options["scale"])).max(
            initial=1e-30
        )
        arguments = (begin, end, options["budget"], options["n_sink"], options["n_recent"])
        selecting.check_list(indices[b, i, 0, :n].tolist(), metric / size, *arguments, tolerance)


@settings(PROFILE)
@given(calls())
def test_indexer_over_arrays(c):
    rng = np.random.default_rng(c["seed"])
    q = normal(rng, c["batch"], c["sq"], c["heads"], c["dim"], dtype=c["dtype"])
    k = normal(rng, c["batch"], c["sk"], c["dim"], dtype=c["dtype"])
    weights = normal(rng, c["batch"], c["sq"], c["heads"], dtype=c["weights"])
    given_q, given_k, given_w = (to_torch(x) for x in (q, k, weights)) if c["torch"] else (q, k, weights)
    meant_q, meant_k = (np.asarray(x, np.float64) for x in (q, k))
    if c["keys"] is not None:
        given_k = heddle.quantize(given_k[:, :, None], *c["keys"])
        meant_k = np.asarray(given_k.dequantize(), np.float64)[:, :, 0]
        if c["quantized_q"] and c["keys"][0] == "int8":
            given_q = heddle.quantize(given_q, "int8", "token")
            meant_q = np.asarray(given_q.dequantize(), np.float64)
    options = options_of(c)
    selection = select.indexer(given_q, given_k, given_w, **options)
    expected = (c["batch"], 1) if c["sq"] == 1 else (c["batch"], c["sq"], 1)
    assert selection.lengths.shape == expected
    for b in range(c["batch"]):
        check_lists(selection, b, meant_q[b], meant_k[b], np.asarray(weights[b], np.float64), options, 2e-5)


@settings(PROFILE, max_examples=50)
@given(calls(), st.sampled_from(["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"]))
def test_indexer_over_a_cache(c, format):
    rng = np.random.default_rng(c["seed"])
    page_size = int(rng.choice([1, 16, 64]))
    seq_lens = rng.integers(0, 150, c["batch"]).astype(np.int32)
    table, pages = paged(rng, seq_lens, page_size)
    cache = heddle.KVCache(pages, page_size, 1, c["dim"], head_dim_v=1, format=format)
    cache.k.view(np.uint8)[...] = 0xFF
    cu = np.concatenate([[0], np.cumsum(seq_lens)]).astype(np.int32)
    k = normal(rng, cu[-1], 1, c["dim"])
    cache.append(k, k[..., :1], table, np.zeros(len(seq_lens), np.int32), cu_seqlens=cu)
    q = normal(rng, c["batch"], c["sq"], c["heads"], c["dim"], dtype=c["dtype"])
    weights = normal(rng, c["batch"], c["sq"], c["heads"])
    options = options_of(c)
    selection = select.indexer(q, cache, weights, block_table=table, seq_lens=seq_lens, **options)
    stored = np.asarray(cache.k, np.float64)
    if cache.k_scale is not None:
        stored = stored * cache.k_scale.astype(np.float64)[..., None]
    meant_q = selecting.queries_of(cache, q)
    for b, n in enumerate(seq_lens):
        keys = np.array([stored[table[b, t // page_size], 0, t % page_size] for t in range(n)]).reshape(n, c["dim"])
        check_lists(selection, b, meant_q[b], keys, weights[b].astype(np.float64), options, 2e-5)


@pytest.mark.parametrize("isa", heddle.available_host_isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int8 both", "float8_e4m3fn"])
def test_ties_go_to_the_lower_index(isa, dtype, rng, default_threads):
    """Small whole numbers are exact in every product, so the lists are, whatever runs them."""
    heddle.set_host_isa(isa)
    q = rng.integers(-2, 3, (1, 11, 5, 24)).astype(np.float32)
    k = rng.integers(-1, 2, (1, 700, 24)).astype(np.float32)
    weights = rng.integers(-2, 4, (1, 11, 5)).astype(np.float32)
    one = np.ones(1, np.float32)
    given_q, given_k = q, k
    if dtype == "bfloat16":
        given_q, given_k = q.astype(ml_dtypes.bfloat16), k.astype(ml_dtypes.bfloat16)
    elif dtype != "float32":
        code = np.int8 if dtype.startswith("int8") else ml_dtypes.float8_e4m3fn
        given_k = heddle.QuantizedTensor(k[:, :, None].astype(code), one)
        given_q = q.astype(ml_dtypes.bfloat16)
        if dtype == "int8 both":
            given_q = heddle.QuantizedTensor(q.astype(np.int8), one)
    for threads in (1, 2):
        heddle.set_num_threads(threads)
        for queries in (slice(0, 11), slice(10, 11)):
            part = given_q
            if isinstance(given_q, heddle.QuantizedTensor):
                part = heddle.QuantizedTensor(given_q.data[:, queries], one)
            else:
                part = given_q[:, queries]
            selection = select.indexer(part, given_k, weights[:, queries], 50, causal=True)
            indices = selection.indices.reshape(-1, 50)
            for n, i in enumerate(range(*queries.indices(11))):
                end = 700 - 10 + i
                metric = selecting.index_scores(q[0, i], k[0, :end], weights[0, i])
                assert indices[n].tolist() == selecting.top(metric, 50)


def test_packed_requests(rng):
    cu_q, cu_k = np.array([0, 12, 12, 15], np.int32), np.array([0, 300, 350, 420], np.int32)
    q, k, weights = normal(rng, 15, 4, 16), normal(rng, 420, 16), normal(rng, 15, 4)
    packed = select.indexer(q, k, weights, 20, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert packed.indices.shape == (15, 1, 20)
    for b in range(3):
        qs, ks = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if qs.start == qs.stop:
            continue
        alone = select.indexer(q[None, qs], k[None, ks], weights[None, qs], 20)
        np.testing.assert_array_equal(packed.indices[qs], alone.indices[0])
    values = normal(rng, 420, 2, 8)
    queries = normal(rng, 15, 4, 8)
    arguments = {"causal": True, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out = heddle.attention(queries, values, values, selection=packed, **arguments)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("heads", [(4, 2), (32, 1)])
def test_attention_over_what_it_selects(heads, rng, backend):
    """Prefill and decode gather just those tokens: NaN anywhere else does not matter."""
    hq, hkv = heads
    n, d = 150, 16
    q, k, v = normal(rng, 1, n, hq, d), normal(rng, 1, n, hkv, d), normal(rng, 1, n, hkv, d)
    selection = select.indexer(normal(rng, 1, n, 3, 8), normal(rng, 1, n, 8), normal(rng, 1, n, 3), 9, n_recent=1)
    seen = np.zeros((1, 1, n, n), bool)
    for i in range(n):
        length = selection.lengths[0, i, 0]
        assert length == min(i + 1, 9)
        seen[0, 0, i, selection.indices[0, i, 0, :length]] = True
    unread = ~seen[0, 0].any(0)
    k[:, unread], v[:, unread] = np.nan, np.nan
    out = heddle.attention(q, k, v, causal=True, selection=selection, backend=backend)
    expected, _ = formula.attention(q, np.nan_to_num(k), np.nan_to_num(v), seen)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    table, pages = paged(rng, [n], 16)
    cache = heddle.KVCache(pages, 16, hkv, d, format="fp32")
    seq_lens = cache.append(k, v, table, np.zeros(1, np.int32))
    last = select.tokens(selection.indices[:, -1:], selection.lengths[:, -1:])
    out = heddle.decode(q[:, -1:], cache, table, seq_lens, selection=last, backend=backend)
    np.testing.assert_allclose(out, expected[:, -1:], atol=2e-5)


Q, K, W = (normal(np.random.default_rng(3), *shape) for shape in ((1, 2, 3, 8), (1, 20, 8), (1, 2, 3)))


def with_value(x, value, *at):
    x = x.copy()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        ({"budget": 0}, "budget", "1 and above"),
        ({"budget": 3, "n_sink": 2, "n_recent": 2}, "budget", "2 + 2"),
        ({"weights": W[:, :, :2]}, "weights", "[1, 2, 2]; allowed is [1, 2, 3]"),
        ({"weights": W[0]}, "weights", "rank 2"),
        ({"weights": with_value(W, np.nan, 0, 1, 2)}, "weights", "query 1, head 2"),
        ({"weights": with_value(W, np.inf, 0, 0, 1), "q_index": 0 * Q}, "weights", "query 0, head 1"),
        ({"q_index": with_value(Q, np.nan, 0, 1, 2, 3)}, "q_index", "request 0, query 1"),
        ({"k_index": with_value(K, np.nan, 0, 4, 3)}, "k_index", "request 0, query 0"),
        ({"k_index": K[:, :, :7]}, "k_index", "is 7; allowed is 8"),
        ({"k_index": np.ones((1, 20, 2, 8), np.float32)}, "k_index", "2 heads; allowed is 1"),
        ({"block_table": np.zeros((1, 2), np.int32)}, "block_table", "KVCache"),
    ],
)
def test_bad_input(changes, argument, message):
    arguments = {"q_index": Q, "k_index": K, "weights": W, "budget": 5} | changes
    with pytest.raises(heddle.HeddleValueError) as caught:
        select.indexer(**arguments)
    assert caught.value.argument == argument
    assert message in str(caught.value)


def test_what_it_does_not_take():
    smooth = heddle.quantize(K[:, :, None], "int8", "token", smooth=True)
    with pytest.raises(heddle.HeddleNotImplementedError, match="k_index: smoothed index keys"):
        select.indexer(Q, smooth, W, 5)
    with pytest.raises(heddle.HeddleTypeError, match="weights: dtype int32"):
        select.indexer(Q, K, W.astype(np.int32), 5)
    with pytest.raises(heddle.HeddleNotImplementedError, match="q_index: index heads of 577"):
        select.indexer(
            np.ones((1, 1, 1, 577), np.float32), np.ones((1, 9, 577), np.float32), np.ones((1, 1, 1), "f4"), 5
        )
    negative = heddle.QuantizedTensor(np.ones((1, 20, 1, 8), np.int8), np.full((1, 20, 1), -1, np.float32), "token")
    with pytest.raises(heddle.HeddleValueError, match="k_index: a score is NaN"):
        select.indexer(Q, negative, W, 5)
