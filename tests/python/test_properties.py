"""Random shapes, strides, types and options against the definition in float64."""

import itertools

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arrays
import formula
import heddle
from arrays import normal, to_float64, to_torch

settings.register_profile(
    "heddle", deadline=None, max_examples=120, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("heddle")

sides = st.none() | st.integers(0, 12)


@st.composite
def problems(draw, packed=False):
    """Shapes, how the arrays lie in memory, and the options of a call."""
    batch = draw(st.integers(0, 3))
    lengths = st.lists(st.integers(0, 12), min_size=batch, max_size=batch)
    sq, sk = (draw(lengths), draw(lengths)) if packed else (draw(st.integers(0, 12)), draw(st.integers(0, 40)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return {
        "batch": batch,
        "sq": sq,
        "sk": sk,
        "heads": (kv_heads * group, kv_heads),
        "dims": (draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        "dtype": draw(st.sampled_from(list(arrays.DTYPES))),
        "axes": draw(st.permutations(range(2 if packed else 3))),
        "backwards": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(sides, sides)),
        "softcap": draw(st.sampled_from([0.0, 1.0, 30.0])),
        "scale": draw(st.sampled_from([None, 0.05, 0.7, 0.0])),
        "sinks": draw(st.booleans()),
        "split_size": draw(st.sampled_from([0, 1, 7, 16])),
        "torch": draw(st.booleans()),
        "backend": draw(st.sampled_from(["host", "reference"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def lay(x, p):
    """The same values with other strides: another order of the axes, some of them backwards, NaN between the rows."""
    order = [*p["axes"], x.ndim - 1]
    y = np.full([n + 1 for n in np.transpose(x, order).shape], np.nan, x.dtype)
    y = y[tuple(slice(0, -1) for _ in order)]
    if p["backwards"] and not p["torch"]:
        y = y[::-1]
    y[...] = np.transpose(x, order)
    return np.transpose(y, np.argsort(order))


def options(p, rng):
    """The arguments of heddle and those of the definition."""
    sinks = normal(rng, p["heads"][0]) if p["sinks"] else None
    shared = {"softcap": p["softcap"], "scale": p["scale"], "sinks": sinks}
    ours = {"causal": p["causal"], "window": p["window"], "backend": p["backend"]}
    ours["schedule"] = heddle.Schedule(split_size=p["split_size"])
    return shared, ours


def kind_of(p):
    return to_torch if p["torch"] else lambda x: x


def check(out, lse, expected, expected_lse, dtype):
    np.testing.assert_allclose(to_float64(out), expected, rtol=0, atol=2 * formula.tolerance(dtype))
    lse = to_float64(lse)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    seen = np.isfinite(expected_lse)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=1e-3, atol=2e-2)


@given(problems())
def test_attention(p):
    rng, kind = np.random.default_rng(p["seed"]), kind_of(p)
    (hq, hkv), (d, dv) = p["heads"], p["dims"]
    q = normal(rng, p["batch"], p["sq"], hq, d, dtype=p["dtype"])
    k = normal(rng, p["batch"], p["sk"], hkv, d, dtype=p["dtype"])
    v = normal(rng, p["batch"], p["sk"], hkv, dv, dtype=p["dtype"])
    shared, ours = options(p, rng)
    inputs = [kind(lay(x, p)) for x in (q, k, v)]
    out, lse = heddle.attention(*inputs, return_lse=True, **shared, **ours)
    seen = formula.visible(p["sq"], p["sk"], causal=p["causal"], window=p["window"])
    check(out, lse, *formula.attention(q, k, v, seen, **shared), p["dtype"])


@given(problems(packed=True))
def test_packed_attention(p):
    rng, kind = np.random.default_rng(p["seed"]), kind_of(p)
    (hq, hkv), (d, dv) = p["heads"], p["dims"]
    cu_q, cu_k = (np.cumsum([0, *lengths]).astype(np.int32) for lengths in (p["sq"], p["sk"]))
    q = normal(rng, cu_q[-1] + 1, hq, d, dtype=p["dtype"])
    k = normal(rng, cu_k[-1] + 1, hkv, d, dtype=p["dtype"])
    v = normal(rng, cu_k[-1] + 1, hkv, dv, dtype=p["dtype"])
    q[-1], k[-1], v[-1] = np.nan, np.nan, np.nan  # beyond the last request
    shared, ours = options(p, rng)
    inputs = [kind(lay(x, p)) for x in (q, k, v)]
    cu = {"cu_seqlens_q": kind(cu_q), "cu_seqlens_k": kind(cu_k)}
    out, lse = heddle.attention(*inputs, return_lse=True, **cu, **shared, **ours)
    for b in range(p["batch"]):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        seen = formula.visible(p["sq"][b], p["sk"][b], causal=p["causal"], window=p["window"])
        expected, expected_lse = formula.attention(q[None, rows], k[None, keys], v[None, keys], seen, **shared)
        check(out[None, rows], lse[None, :, rows], expected, expected_lse, p["dtype"])


@given(problems(packed=True), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["fp32", "bf16", "fp16"]))
def test_decode(p, page_size, sq, format):
    """A cache filled in two ragged appends, the second of which may begin in the middle of a page."""
    rng, kind = np.random.default_rng(p["seed"]), kind_of(p)
    (hq, hkv), (d, dv) = p["heads"], p["dims"]
    first, second = np.array(p["sq"], np.int32), np.array(p["sk"], np.int32)
    seq_lens = first + second
    table, pages = arrays.paged(rng, seq_lens, page_size)
    cache = heddle.KVCache(pages, page_size, hkv, d, head_dim_v=dv, format=format)
    cache.k.view(np.uint8)[...] = 0xFF  # NaN in each of these formats
    cache.v.view(np.uint8)[...] = 0xFF
    stored, start = [], np.zeros(p["batch"], np.int32)
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[format]
    for lengths in (first, second):
        cu = np.cumsum([0, *lengths]).astype(np.int32)
        k, v = normal(rng, cu[-1], hkv, d, dtype=dtype), normal(rng, cu[-1], hkv, dv, dtype=dtype)
        lens = cache.append(kind(k), kind(v), kind(table), kind(start), cu_seqlens=kind(cu))
        stored.append([(k[cu[b] : cu[b + 1]], v[cu[b] : cu[b + 1]]) for b in range(p["batch"])])
        start = start + lengths
    assert lens.tolist() == seq_lens.tolist()
    q = normal(rng, p["batch"], sq, hq, d, dtype=p["dtype"])
    shared, ours = options(p, rng)
    out, lse = heddle.decode(
        kind(lay(q, p | {"axes": (2, 0, 1)})), cache, kind(table), lens, return_lse=True, **shared, **ours
    )
    for b in range(p["batch"]):
        k, v = (np.concatenate([part[b][i] for part in stored])[None] for i in (0, 1))
        seen = formula.visible(sq, seq_lens[b], causal=p["causal"], window=p["window"])
        expected, expected_lse = formula.attention(q[b : b + 1], k, v, seen, **shared)
        check(out[b : b + 1], lse[b : b + 1], expected, expected_lse, p["dtype"])


@given(
    problems(),
    st.sampled_from(["tensor", "token", ("partition", 2), ("partition", 7)]),
    st.booleans(),
    st.sampled_from(["int8", "fp8"]),
)
def test_quantize(p, granularity, smooth, format):
    """A value is at most half a step of its group away, and quantizing is the same for every layout."""
    rng, kind = np.random.default_rng(p["seed"]), kind_of(p)
    x = normal(rng, p["batch"], p["sk"], p["heads"][1], p["dims"][0], dtype=p["dtype"])
    t = heddle.quantize(kind(lay(x, p)), format, granularity, smooth=smooth)
    same = heddle.quantize(x, format, granularity, smooth=smooth)
    np.testing.assert_array_equal(to_float64(t.data), to_float64(same.data))
    np.testing.assert_array_equal(to_float64(t.scale), same.scale)
    scale = to_float64(t.scale)
    if granularity != "tensor":
        n = 1 if granularity == "token" else granularity[1]
        scale = np.repeat(scale, n, axis=1)[:, : p["sk"], :, None]
    values = to_float64(t.data)
    # E4M3 keeps 3 bits of mantissa, and steps of 2^-9 below its normal numbers.
    step = (
        1.0 if format == "int8" else np.maximum(2.0 ** (np.floor(np.log2(np.maximum(abs(values), 2**-6))) - 3), 2**-9)
    )
    error = abs(to_float64(t.dequantize()) - x.astype(np.float64))
    assert (error <= 0.5 * step * scale * 1.02 + 1e-5).all()


@given(problems(), st.integers(1, 5))
def test_merge_of_any_cut_is_the_whole(p, parts):
    rng, kind = np.random.default_rng(p["seed"]), kind_of(p)
    (hq, hkv), (d, dv) = p["heads"], p["dims"]
    q = normal(rng, p["batch"], p["sq"], hq, d)
    k, v = normal(rng, p["batch"], p["sk"], hkv, d), normal(rng, p["batch"], p["sk"], hkv, dv)
    cuts = [0, *sorted(rng.integers(0, p["sk"] + 1, parts - 1)), p["sk"]]
    pieces = [
        heddle.attention(kind(q), kind(k[:, a:b]), kind(v[:, a:b]), return_lse=True, backend=p["backend"])
        for a, b in itertools.pairwise(cuts)
    ]
    out, lse = heddle.merge([x[0] for x in pieces], [x[1] for x in pieces], backend=p["backend"])
    check(out, lse, *formula.attention(q, k, v), "float32")
