"""What the public functions return, against the definition in float64 and against PyTorch."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch

import arrays
import formula
import heddle
from arrays import address, normal, to_float64, to_torch


def check(actual, expected, dtype):
    actual = to_float64(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=formula.tolerance(dtype))


def check_lse(actual, expected):
    actual = to_float64(actual)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=2e-2 if finite.any() else 0)


# Name, arguments of attention(), arguments of formula.visible().
MASKS = [
    ("full", {}, {}),
    ("causal", {"causal": True}, {"causal": True}),
    ("window", {"window": (7, 3)}, {"window": (7, 3)}),
    ("window of a number", {"window": 5}, {"window": (5, 0)}),
    ("window open on the left", {"window": (None, 2)}, {"window": (None, 2)}),
    ("window open on the right", {"window": [4, None], "causal": True}, {"window": (4, None), "causal": True}),
    (
        "window and globals",
        {"causal": True, "selection": heddle.select.window(6, 0, n_global=4)},
        {"causal": True, "window": (6, 0), "n_global": 4},
    ),
    (
        "strided",
        {"causal": True, "selection": heddle.select.strided(4, 5)},
        {"causal": True, "strided": (4, 5)},
    ),
]


@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize(("name", "options", "mask"), MASKS, ids=[m[0] for m in MASKS])
def test_attention(rng, backend, kind, dtype, name, options, mask):
    q, k, v = normal(rng, 2, 37, 6, 48, dtype=dtype), normal(rng, 2, 53, 2, 48, dtype=dtype), None
    v = normal(rng, 2, 53, 2, 32, dtype=dtype)
    out, lse = heddle.attention(kind(q), kind(k), kind(v), return_lse=True, backend=backend, **options)
    expected, expected_lse = formula.attention(q, k, v, formula.visible(37, 53, **mask))
    assert type(out) is type(kind(q))
    assert out.dtype == kind(q).dtype
    assert str(lse.dtype).endswith("float32")
    check(out, expected, dtype)
    check_lse(lse, expected_lse)
    assert heddle.last_kernel().startswith(backend)


def test_softcap_scale_and_sinks(rng, backend, kind):
    q, k, v = normal(rng, 1, 9, 4, 64), normal(rng, 1, 33, 2, 64), normal(rng, 1, 33, 2, 64)
    sinks = np.array([0.5, -np.inf, 3.0, -1.0], np.float32)
    options = {"softcap": 1.5, "scale": 0.3}
    out, lse = heddle.attention(
        kind(q), kind(k), kind(v), causal=True, sinks=kind(sinks), return_lse=True, backend=backend, **options
    )
    expected, expected_lse = formula.attention(q, k, v, formula.visible(9, 33, causal=True), sinks=sinks, **options)
    check(out, expected, "float32")
    np.testing.assert_allclose(to_float64(lse), expected_lse, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_like_torch(rng, backend, causal, head_dim):
    q, k, v = (to_torch(normal(rng, 2, 130, heads, head_dim)) for heads in (8, 2, 2))
    out = heddle.attention(q, k, v, causal=causal, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_float64_with_the_reference(rng, kind):
    q, k, v = (normal(rng, 1, 5, 2, 8, dtype="float64") for _ in range(3))
    out = heddle.attention(kind(q), kind(k), kind(v), backend="reference")
    np.testing.assert_allclose(to_float64(out), formula.attention(q, k, v)[0], atol=1e-7)  # scale is a float
    wide = np.empty((1, 5, 2, 8), np.float64)
    heddle.attention(*(x.astype(np.float32) for x in (q, k, v)), out=wide, backend="reference")
    np.testing.assert_allclose(wide, formula.attention(q, k, v)[0], atol=1e-6)


@pytest.mark.parametrize("heads", [None, 1, 2, 6])
def test_block_mask(rng, backend, kind, heads):
    q, k, v = normal(rng, 2, 37, 6, 32), normal(rng, 2, 53, 2, 32), normal(rng, 2, 53, 2, 32)
    blocks = (3, 4) if heads is None else (heads, 3, 4) if heads == 2 else (2, heads, 3, 4)
    mask = rng.random(blocks) < 0.5
    seen = np.broadcast_to(np.reshape(mask, (1,) * (4 - mask.ndim) + mask.shape), (2, heads or 1, 3, 4))
    seen = np.repeat(np.repeat(seen, 16, 2), 16, 3)[:, :, :37, :53]
    seen = np.repeat(seen, 6 // seen.shape[1], 1)
    out = heddle.attention(
        kind(q), kind(k), kind(v), selection=heddle.select.block_mask(kind(mask), 16), backend=backend
    )
    check(out, formula.attention(q, k, v, seen)[0], "float32")


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_token_lists(rng, backend, kind, per_query, with_lengths):
    q, k, v = normal(rng, 2, 5, 6, 32), normal(rng, 2, 40, 2, 32), normal(rng, 2, 40, 2, 32)
    shape = (2, 5, 2) if per_query else (2, 2)
    lengths = rng.integers(0, 12, shape).astype(np.int32)
    indices = np.full((*shape, 12), -1, np.int32)
    seen = np.zeros((2, 6, 5, 40), bool)
    for place in np.ndindex(shape):
        chosen = np.sort(rng.choice(40, lengths[place], replace=False))
        indices[place][: len(chosen)] = chosen
        b, h = place[0], place[-1]
        seen[b, 3 * h : 3 * h + 3, place[1] if per_query else slice(None), chosen if per_query else None] |= per_query
        if not per_query:
            seen[b, 3 * h : 3 * h + 3][:, :, chosen] = True
    if with_lengths:
        indices[indices < 0] = 2**31 - 1  # beyond a length anything may stand
    selection = heddle.select.tokens(kind(indices), kind(lengths) if with_lengths else None)
    out, lse = heddle.attention(kind(q), kind(k), kind(v), selection=selection, return_lse=True, backend=backend)
    expected, expected_lse = formula.attention(q, k, v, seen)
    check(out, expected, "float32")
    check_lse(lse, expected_lse)


def test_packed_batch(rng, backend, kind):
    q_lens, k_lens = [5, 0, 17, 1], [9, 4, 17, 0]
    cu_q, cu_k = (np.cumsum([0, *lens]).astype(np.int32) for lens in (q_lens, k_lens))
    q, k, v = normal(rng, 25, 4, 32), normal(rng, 32, 2, 32), normal(rng, 32, 2, 16)  # two unused tokens at the ends
    q[23:], k[30:], v[30:] = np.nan, np.nan, np.nan
    out = np.full((25, 4, 16), 7.0, np.float32)
    result, lse = heddle.attention(
        kind(q),
        kind(k),
        kind(v),
        causal=True,
        cu_seqlens_q=kind(cu_q),
        cu_seqlens_k=kind(cu_k),
        out=kind(out),
        return_lse=True,
        backend=backend,
    )
    assert lse.shape == (4, 25)
    assert address(result) == address(out)
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        seen = formula.visible(q_lens[b], k_lens[b], causal=True)
        expected, expected_lse = formula.attention(q[None, rows], k[None, keys], v[None, keys], seen)
        check(out[None, rows], expected, "float32")
        check_lse(lse[None, :, rows], expected_lse)
    assert (out[23:] == 7.0).all()


def test_rows_that_see_nothing(rng, backend, kind):
    q, k = normal(rng, 2, 3, 2, 8), np.full((2, 0, 1, 8), np.nan, np.float32)
    out, lse = heddle.attention(kind(q), kind(k), kind(k), return_lse=True, backend=backend)
    assert (to_float64(out) == 0).all()
    assert np.isneginf(to_float64(lse)).all()
    sinks = np.array([1.0, -2.0], np.float32)
    out, lse = heddle.attention(kind(q), kind(k), kind(k), sinks=kind(sinks), return_lse=True, backend=backend)
    assert (to_float64(out) == 0).all()
    assert (to_float64(lse) == sinks[:, None]).all()


@pytest.mark.parametrize(("batch", "sq"), [(0, 3), (2, 0)])
def test_empty_results(rng, backend, kind, batch, sq):
    q, k = normal(rng, batch, sq, 4, 8), normal(rng, batch, 5, 2, 8)
    out, lse = heddle.attention(kind(q), kind(k), kind(k), return_lse=True, backend=backend)
    assert tuple(out.shape) == (batch, sq, 4, 8)
    assert tuple(lse.shape) == (batch, 4, sq)


def test_out_is_written_in_place_and_nothing_around_it(rng, backend):
    q, k = normal(rng, 2, 9, 4, 16), normal(rng, 2, 11, 2, 16)
    around = np.full((4, 11, 6, 32), 7.0, np.float32)
    out = around[1:3, 1:-1, 1:5, 8:24]
    assert heddle.attention(q, k, k, out=out, backend=backend) is out
    check(out, formula.attention(q, k, k)[0], "float32")
    out[...] = 7.0
    assert (around == 7.0).all()


def test_schedules_and_splits_agree(rng):
    q, k = normal(rng, 1, 4, 8, 64), normal(rng, 1, 3000, 2, 64)
    whole = heddle.attention(q, k, k, backend="reference")
    for kind in ("auto", "tile", "static", "stealing"):
        assert np.array_equal(heddle.attention(q, k, k, schedule=kind), heddle.attention(q, k, k))
        for split_size in (0, 256, 1000):
            schedule = heddle.Schedule(kind, split_size)
            assert (schedule.kind, schedule.split_size) == (kind, split_size)
            check(heddle.attention(q, k, k, schedule=schedule), whole, "float32")


def test_merge(rng, backend, kind):
    q, k, v = normal(rng, 2, 6, 4, 32), normal(rng, 2, 50, 2, 32), normal(rng, 2, 50, 2, 32)
    cuts = [slice(0, 13), slice(13, 13), slice(13, 50)]
    parts = [heddle.attention(kind(q), kind(k[:, c]), kind(v[:, c]), return_lse=True, backend=backend) for c in cuts]
    outs, lses = [p[0] for p in parts], [p[1] for p in parts]
    outs[1][...] = float("nan")  # a part that saw nothing does not count
    expected, expected_lse = formula.attention(q, k, v)
    stack = np.stack if isinstance(outs[0], np.ndarray) else torch.stack
    for o, s in ((outs, lses), (tuple(outs), tuple(lses)), (stack(outs), stack(lses))):
        out, lse = heddle.merge(o, s, backend=backend)
        assert type(out) is type(outs[0])
        check(out, expected, "float32")
        np.testing.assert_allclose(to_float64(lse), expected_lse, atol=1e-5)
    # packed: [P, total, H, Dv] with [P, H, total]
    out, lse = heddle.merge([o[0] for o in outs], [s[0] for s in lses], backend=backend)
    check(out, expected[0], "float32")
    out, lse = heddle.merge(stack(outs)[1:2], stack(lses)[1:2], backend=backend)
    assert (to_float64(out) == 0).all()
    assert np.isneginf(to_float64(lse)).all()


# ---- quantization ----------------------------------------------------------------------------------------------------


def group_scales(x, n, limit):
    """max|x| / limit of n consecutive tokens of a head, [B, ceil(S / n), H]."""
    groups = [np.abs(x[:, t : t + n]).max(axis=(1, 3)) for t in range(0, x.shape[1], n)]
    return np.stack(groups, 1).astype(np.float32) / np.float32(limit)


@pytest.mark.parametrize("granularity", ["tensor", "token", ("partition", 1), ("partition", 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_int8(rng, kind, granularity, dtype):
    x = normal(rng, 2, 13, 3, 24, dtype=dtype)
    x[1, 5:10] = 0
    t = heddle.quantize(kind(x), "int8", granularity)
    n = {"tensor": 0, "token": 1}.get(granularity) if isinstance(granularity, str) else granularity[1]
    assert t.granularity == ("token" if n == 1 else granularity)
    x = x.astype(np.float32)
    scale = np.full(1, np.abs(x).max() / np.float32(127)) if n == 0 else group_scales(x, n, 127)
    np.testing.assert_array_equal(to_float64(t.scale), scale)
    per_token = scale.reshape(1, 1, 1, 1) if n == 0 else np.repeat(scale, n, 1)[:, :13, :, None]
    np.testing.assert_array_equal(to_float64(t.data), formula.quantize(x, per_token))
    np.testing.assert_array_equal(to_float64(t.dequantize()), to_float64(t.data).astype(np.float32) * per_token)
    assert type(t.data) is type(kind(x))
    assert t.mean is None
    assert t.format == "int8"
    assert t.saturated == 0
    assert t.shape == x.shape
    assert t.nbytes == x.size + 4 * scale.size


def test_quantize_fp8(rng, kind):
    x = normal(rng, 30, 2, 16)
    t = heddle.quantize(kind(x), "fp8")
    scale = np.abs(x).max() / np.float32(448)
    assert str(t.data.dtype).removeprefix("torch.") == "float8_e4m3fn"
    np.testing.assert_array_equal(to_float64(t.data), (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert repr(t) == "QuantizedTensor(fp8 [30, 2, 16], granularity='tensor', saturated=0)"


def test_quantize_with_a_static_scale_counts_what_saturates(rng):
    x = normal(rng, 1, 40, 2, 16)
    t = heddle.quantize(x, static_scale=0.01)
    assert t.saturated == (np.abs(np.rint(x / np.float32(0.01))) > 127).sum() > 0
    np.testing.assert_array_equal(t.data, formula.quantize(x, np.float32(0.01)))


def test_smoothing_subtracts_each_heads_mean(rng, kind):
    x = normal(rng, 2, 50, 3, 16) + 5 * normal(rng, 2, 1, 3, 16)
    t = heddle.quantize(kind(x), "int8", "token", smooth=True)
    np.testing.assert_allclose(to_float64(t.mean), x.mean(axis=1, dtype=np.float64), atol=1e-6)
    plain = heddle.quantize(kind(x), "int8", "token")
    error, plain_error = (np.abs(to_float64(y.dequantize()) - x).max() for y in (t, plain))
    assert error < 0.6 * plain_error


def test_a_quantized_tensor_from_parts(rng, kind, backend):
    q, k = normal(rng, 1, 4, 2, 16), normal(rng, 1, 20, 2, 16)
    made = heddle.quantize(kind(k), "int8", ("partition", 4), smooth=True)
    again = heddle.QuantizedTensor(made.data, made.scale, ("partition", 4), made.mean)
    assert again.data is made.data
    one, two = (heddle.attention(kind(q), x, x, backend=backend) for x in (made, again))
    np.testing.assert_array_equal(to_float64(one), to_float64(two))


FORMATS = {"int8-baseline": ("tensor", "tensor"), "int8-a": (("partition", 3),) * 2, "int8-b": ("token", "tensor")}


@pytest.mark.parametrize("format", [*FORMATS, "fp8"])
@pytest.mark.parametrize("smooth", [False, True])
def test_attention_in_a_format(rng, backend, kind, format, smooth):
    q, k, v = normal(rng, 2, 20, 4, 32), normal(rng, 2, 29, 2, 32) + 1.0, normal(rng, 2, 29, 2, 32)
    scheme = "fp8" if format == "fp8" else "int8"
    q_granularity, k_granularity = FORMATS.get(format, (None, "tensor"))
    q8 = q if q_granularity is None else heddle.quantize(q, scheme, q_granularity)
    k8, v8 = heddle.quantize(k, scheme, k_granularity, smooth=smooth), heddle.quantize(v, scheme)
    options = {"causal": True, "return_lse": True, "backend": backend}
    out, lse = heddle.attention(kind(q), kind(k), kind(v), format=format, partition=3, smooth=smooth, **options)
    explicit, explicit_lse = heddle.attention(q8, k8, v8, **options)
    np.testing.assert_array_equal(to_float64(out), explicit)
    np.testing.assert_array_equal(to_float64(lse), explicit_lse)
    exact = (x if x is q else x.dequantize() for x in (q8, k8, v8))
    expected, expected_lse = formula.attention(*exact, formula.visible(20, 29, causal=True))
    np.testing.assert_allclose(explicit, expected, atol=2e-2)
    np.testing.assert_allclose(explicit_lse, expected_lse, atol=2e-3)


@pytest.mark.parametrize("format", [*FORMATS, "fp8"])
def test_a_format_returns_the_dtype_of_q(rng, kind, format):
    q, k, v = (kind(normal(rng, 1, 8, 2, 32, dtype="bfloat16")) for _ in range(3))
    out, lse = heddle.attention(q, k, v, format=format, return_lse=True)
    assert out.dtype == q.dtype
    assert str(lse.dtype).endswith("float32")


# ---- cache and decode ------------------------------------------------------------------------------------------------

CACHE_FORMATS = ["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"]


def logical(pages, table, seq_lens, page_size):
    """Rows [Hkv, tokens, D] of each request out of [num_pages, Hkv, page_size, D]."""
    pages = np.asarray(pages, np.float64)
    for b, n in enumerate(seq_lens):
        own = pages[table[b, : -(-n // page_size)]]
        yield np.concatenate([*own, own[:0].sum(0) if len(own) else pages[0]], axis=1)[:, :n]


def filled(rng, kind, format, seq_lens, page_size, **options):
    table, num_pages = arrays.paged(rng, seq_lens, page_size)
    cache = heddle.KVCache(num_pages, page_size, 2, 32, head_dim_v=16, format=format, **options)
    cu = np.cumsum([0, *seq_lens]).astype(np.int32)
    k, v = normal(rng, cu[-1], 2, 32), normal(rng, cu[-1], 2, 16)
    start = np.zeros(len(seq_lens), np.int32)
    result = cache.append(kind(k), kind(v), kind(table), kind(start), cu_seqlens=kind(cu))
    assert type(result) is type(kind(start))
    assert result.tolist() == list(seq_lens)
    return cache, table, k, v, cu


@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("sq", [1, 3])
def test_decode(rng, backend, kind, format, sq):
    seq_lens = np.array([33, 1, 0, 64, 2], np.int32)
    cache, table, k, _, cu = filled(rng, kind, format, seq_lens, page_size=8)
    q = normal(rng, 5, sq, 6, 32)
    out, lse = heddle.decode(kind(q), cache, kind(table), kind(seq_lens), return_lse=True, backend=backend)
    assert type(out) is type(kind(q))
    assert tuple(out.shape) == (5, sq, 6, 16)

    k_scale = np.ones(1) if cache.k_scale is None else cache.k_scale
    keys = np.asarray(cache.k, np.float64) * (k_scale[..., None] if format == "int8-a" else k_scale)
    values = np.asarray(cache.v, np.float64) * (1 if cache.v_scale is None else cache.v_scale)
    if format.startswith("int8"):
        scale = np.abs(q).max(-1, keepdims=True) / np.float32(127)
        if format == "int8-baseline":
            scale = cache.q_scale
            assert cache.q_calibrated
        q = formula.quantize(q, scale) * scale
    stored = zip(logical(keys, table, seq_lens, 8), logical(values, table, seq_lens, 8), strict=True)
    for b, (kb, vb) in enumerate(stored):
        seen = formula.visible(sq, seq_lens[b], causal=True)
        own = kb.transpose(1, 0, 2)[None], vb.transpose(1, 0, 2)[None]
        expected, expected_lse = formula.attention(q[b : b + 1], *own, seen)
        # P is kept in 16 bits beside 8-bit values; the rest is fp32 arithmetic on what is stored.
        np.testing.assert_allclose(
            to_float64(out)[b : b + 1], expected, atol=1e-2 if cache.v_scale is not None else 1e-4
        )
        check_lse(lse[b : b + 1], expected_lse)
        # What is stored is what was given, within half a step of its format.
        given = k[cu[b] : cu[b + 1]].transpose(1, 0, 2)
        step = {"fp32": 0, "fp16": 2e-3, "bf16": 2e-2, "fp8": 0.25}.get(format, np.abs(k).max() / 127)
        np.testing.assert_allclose(kb, given, atol=step)


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_appending_token_by_token_is_appending_at_once(rng, kind, format):
    k, v = normal(rng, 2, 21, 2, 32), normal(rng, 2, 21, 2, 16)
    table, pages = arrays.paged(rng, [21, 21], 4)
    partition = 2 if format == "int8-a" else 1
    caches = [heddle.KVCache(pages, 4, 2, 32, head_dim_v=16, format=format, partition=partition) for _ in range(2)]
    for cache in caches:
        cache.calibrate(kind(k), kind(v))
        cache.k.view(np.uint8)[...] = 0
        cache.v.view(np.uint8)[...] = 0
    zero = np.zeros(2, np.int32)
    caches[0].append(kind(k), kind(v), kind(table), kind(zero))
    lens = kind(zero)
    for t in range(21):
        lens = caches[1].append(kind(k[:, t : t + 1]), kind(v[:, t : t + 1]), kind(table), lens)
    assert lens.tolist() == [21, 21]
    whole, stepped = (
        heddle.decode(kind(normal(np.random.default_rng(1), 2, 1, 4, 32)), c, kind(table), lens) for c in caches
    )
    # A partition that was quantized again as it grew has been rounded twice.
    np.testing.assert_allclose(to_float64(whole), to_float64(stepped), atol=2e-2 if format == "int8-a" else 1e-6)


def test_cache_describes_itself(rng):
    cache = heddle.KVCache(6, 8, 2, 32, format="int8-a", partition=4)
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim, cache.head_dim_v) == (6, 8, 2, 32, 32)
    assert (cache.format, cache.partition, cache.device, cache.saturated) == ("int8-a", 4, "cpu", 0)
    assert repr(cache) == (
        "KVCache(num_pages=6, page_size=8, num_kv_heads=2, head_dim=32, format='int8-a', partition=4, device='cpu')"
    )
    assert cache.k.shape == cache.v.shape == (6, 2, 8, 32)
    assert cache.k.dtype == np.int8
    assert cache.k_scale.shape == (6, 2, 2)
    assert cache.value_norms.shape == (6, 2, 8)
    assert cache.q_scale is None
    assert cache.nbytes >= cache.k.nbytes + cache.v.nbytes + cache.k_scale.nbytes + cache.value_norms.nbytes
    # int8 K and V of 2 heads, a float scale for 4 tokens, a float norm
    assert cache.bytes_per_token == 2 * (32 + 32 + 4 / 4 + 4)
    assert heddle.KVCache(6, 8, 2, 32).k.dtype == ml_dtypes.bfloat16
    assert heddle.KVCache(6, 8, 2, 32, format="fp8").v.dtype == ml_dtypes.float8_e4m3fn


def test_value_norms_are_those_of_the_values_given(rng):
    cache, table, _, v, _ = filled(rng, lambda x: x, "int8-b", [19], page_size=4)
    norms = next(logical(cache.value_norms[..., None], table, [19], 4))[..., 0]
    np.testing.assert_allclose(norms, np.linalg.norm(v, axis=-1).T, rtol=1e-6)


def test_calibration_from_samples_saturates_what_lies_beyond(rng):
    k, v = normal(rng, 1, 16, 2, 32), normal(rng, 1, 16, 2, 32)
    cache = heddle.KVCache(4, 4, 2, 32, format="int8-baseline")
    assert not cache.kv_calibrated
    cache.calibrate(k * 0.5, v * 0.5, q=k)
    assert cache.kv_calibrated
    assert cache.q_calibrated
    assert cache.k_scale == np.abs(k * 0.5).max() / np.float32(127)
    assert cache.q_scale == np.abs(k).max() / np.float32(127)
    cache.append(k, v, np.arange(4, dtype=np.int32)[None], np.zeros(1, np.int32))
    beyond = sum((np.abs(np.rint(x / np.float32(np.abs(x * 0.5).max() / 127))) > 127).sum() for x in (k, v))
    assert cache.saturated == beyond > 0


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8-a"])
def test_decode_of_long_requests(rng, format):
    """Longer splits from 32,768 keys on: the last of them partial, whole, or not there at all."""
    seq_lens = np.array([32767, 32768, 34853], np.int32)
    cache, table, *_ = filled(rng, np.asarray, format, seq_lens, page_size=16)
    q = normal(rng, 3, 1, 6, 32)
    run = partial(heddle.decode, q, cache, table, seq_lens, return_lse=True)
    (out, lse), (expected, expected_lse) = run(), run(backend="reference")
    np.testing.assert_allclose(out, expected, atol=2e-4)  # rows of about 1 / sqrt(keys)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    np.testing.assert_array_equal(out, run(schedule=heddle.Schedule("static"))[0])


def test_decode_reads_only_what_it_should(rng, backend):
    seq_lens = np.array([13, 5], np.int32)
    cache, table, *_ = filled(rng, lambda x: x, "fp32", seq_lens, page_size=4)
    q = normal(rng, 2, 1, 4, 32)
    before = heddle.decode(q, cache, table, seq_lens, backend=backend)
    used = np.zeros(cache.k.shape[:3], bool)
    for b, n in enumerate(seq_lens):
        for t in range(n):
            used[table[b, t // 4], :, t % 4] = True
    cache.k[~used], cache.v[~used] = np.nan, np.inf
    np.testing.assert_array_equal(heddle.decode(q, cache, table, seq_lens, backend=backend), before)


def test_selections_describe_themselves():
    select = heddle.select
    assert repr(select.window(1024, n_global=64)) == "Selection.window(left=1024, right=0, n_global=64)"
    assert repr(select.window(None, None)) == "Selection.window(left=None, right=None, n_global=0)"
    assert repr(select.strided(8, 4)) == "Selection.strided(width=8, stride=4)"
    mask = select.block_mask(np.ones((2, 3), bool), (64, 32))
    assert repr(mask) == "Selection.block_mask(mask=[2, 3], block=(64, 32))"
    tokens = select.tokens(np.zeros((1, 2, 3), np.int32), np.zeros((1, 2), np.int32))
    assert repr(tokens) == "Selection.tokens(indices=[1, 2, 3], lengths=[1, 2])"


@pytest.mark.usefixtures("default_threads")
def test_threads_and_instruction_sets(rng):
    q, k = normal(rng, 1, 40, 4, 64, dtype="bfloat16"), normal(rng, 1, 70, 2, 64, dtype="bfloat16")
    heddle.set_num_threads(3)
    assert heddle.num_threads() == 3
    three = heddle.attention(q, k, k)
    heddle.set_num_threads(1)
    np.testing.assert_array_equal(heddle.attention(q, k, k), three)
    assert heddle.host_isa() == heddle.available_host_isas()[0] or heddle.host_isa() in heddle.available_host_isas()
    for isa in heddle.available_host_isas():
        heddle.set_host_isa(isa)
        assert heddle.host_isa() == isa
        check(heddle.attention(q, k, k), formula.attention(q, k, k)[0], "bfloat16")
        assert heddle.last_kernel() == f"host/{isa}/attention bf16"


def test_public_names_are_documented():
    for name in heddle.__all__:
        member = getattr(heddle, name)
        assert name == "__version__" or (member.__doc__ and member.__doc__.strip()), name
    assert heddle.available_backends()[-1] == "reference"


def test_packed_rows_of_no_request_see_nothing():
    q, k, v = (np.ones((6, 2, 8), np.float32) for _ in range(3))
    bounds = np.array([0, 2, 4], np.int32)
    out, lse = heddle.attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True)
    assert (out[:4] == 1).all()
    assert (out[4:] == 0).all()
    assert np.isfinite(lse[:, :4]).all()
    assert (lse[:, 4:] == -np.inf).all()


def test_plans(rng, backend):
    """A plan serves the calls that it was made for, and no others."""
    cache = heddle.KVCache(8, 16, 2, 16, format="fp32")
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    k, v, q = normal(rng, 2, 50, 2, 16), normal(rng, 2, 50, 2, 16), normal(rng, 2, 1, 4, 16)
    seq_lens = cache.append(k, v, table, np.zeros(2, np.int32))
    window = heddle.select.window(9, n_global=2)
    plan = heddle.plan_decode(q, cache, table, seq_lens, selection=window, backend=backend)
    for _ in range(2):  # layers
        out = heddle.decode(q, cache, table, seq_lens, selection=window, plan=plan, backend=backend)
        expected = heddle.decode(q, cache, table, seq_lens, selection=window, backend=backend)
        np.testing.assert_array_equal(out, expected)
    same = heddle.select.window(9, n_global=2)
    heddle.decode(q, cache, table, seq_lens, selection=same, plan=plan, return_lse=True, softcap=2.0, backend=backend)
    for change in (
        {"selection": None},
        {"selection": heddle.select.window(8, n_global=2)},
        {"causal": False},
        {"window": 3},
        {"schedule": heddle.Schedule("auto", 128)},
        {"backend": "reference" if backend == "host" else "host"},
    ):
        options = {"selection": window, "backend": backend, **change}
        with pytest.raises(heddle.HeddleValueError, match="plan: made for another call"):
            heddle.decode(q, cache, table, seq_lens, plan=plan, **options)
    for other in (
        (q[:1], table[:1], seq_lens[:1]),
        (q, table[:, :3], np.minimum(seq_lens, 40)),
        (q, table, seq_lens.copy()),
    ):
        with pytest.raises(heddle.HeddleValueError, match="plan: made for another call"):
            heddle.decode(other[0], cache, *other[1:], selection=window, plan=plan, backend=backend)
    assert heddle.plan_decode(q, cache, table, seq_lens, backend=backend, plan=plan) is plan
    heddle.decode(q, cache, table, seq_lens, plan=plan, backend=backend)
    with pytest.raises(heddle.HeddleTypeError, match="plan"):
        heddle.decode(q, cache, table, seq_lens, plan="plan", backend=backend)
    with pytest.raises(heddle.HeddleValueError) as caught:
        heddle.plan_decode(q, cache, table[:, :2], seq_lens, backend=backend)
    assert caught.value.code == "capacity"
