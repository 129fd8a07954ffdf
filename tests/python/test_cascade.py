"""Decode over shared prefixes, against decode over the same tokens one after the other."""

import numpy as np
import pytest

import heddle
from arrays import DTYPES, normal, paged, to_float64, to_torch

FORMATS = ["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"]


def poisoned_cache(format, pages, page_size, heads, dim, dim_v):
    partition = page_size if format == "int8-a" else 1
    cache = heddle.KVCache(pages, page_size, heads, dim, head_dim_v=dim_v, format=format, partition=partition)
    for x in (cache.k, cache.v):
        x[...] = 127 if x.dtype == np.int8 else np.nan
    return cache


class Case:
    """A batch with random groups on each level, whole pages of prefixes, ragged own tokens, and its oracle."""

    def __init__(self, rng, format, dtype="float32", levels=1, min_own=0):
        group, hkv, self.page = int(rng.integers(1, 17)), int(rng.integers(1, 3)), int(rng.choice([1, 3, 16]))
        dim, dim_v = (int(rng.choice([8, 40, 64])) for _ in range(2))
        self.batch, self.queries = int(rng.integers(1, 7)), int(rng.choice([1, 1, 2, 5]))
        own = rng.integers(min_own, 50, self.batch)
        own = np.where(rng.random(self.batch) < 0.3, min_own, own)
        if self.queries > 1:
            own = np.maximum(own, self.queries)  # a query stands among its own tokens
        self.cu, shared = [], []
        for _ in range(levels):
            cuts = np.sort(rng.integers(0, self.batch + 1, int(rng.integers(0, 4))))  # empty groups too
            self.cu.append(np.array([0, *cuts, self.batch], np.int32))
            lens = rng.integers(0, 120 // self.page, len(cuts) + 1) * self.page
            shared.append(np.where(rng.random(len(lens)) < 0.2, 0, lens))
        lens = np.concatenate([own, *shared]).astype(np.int32)
        table, pages = paged(rng, lens, self.page)
        self.cache = poisoned_cache(format, pages, self.page, hkv, dim, dim_v)
        cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        k, v = normal(rng, int(cu[-1]), hkv, dim), normal(rng, int(cu[-1]), hkv, dim_v)
        if cu[-1] == 0:
            self.cache.calibrate(normal(rng, 1, hkv, dim), normal(rng, 1, hkv, dim_v)) if "int8" in format else None
        self.cache.append(k, v, table, np.zeros(len(lens), np.int32), cu_seqlens=cu)
        self.q = normal(rng, self.batch, self.queries, hkv * group, dim).astype(DTYPES[dtype])
        self.sinks = normal(rng, hkv * group) if rng.random() < 0.5 else None
        self.softcap = float(rng.choice([0.0, 3.0]))

        self.table, self.lens = table[: self.batch], lens[: self.batch]
        self.prefixes, at = [], self.batch
        for cu_requests in self.cu:
            n = len(cu_requests) - 1
            self.prefixes.append(heddle.SharedPrefix(table[at : at + n], lens[at : at + n], cu_requests))
            at += n
        # The same tokens as one sequence a request.
        rows = []
        for b in range(self.batch):
            row = []
            for prefix in self.prefixes:
                g = int(np.searchsorted(prefix.cu_requests, b, "right")) - 1
                row.extend(prefix.block_table[g, : prefix.seq_lens[g] // self.page])
            rows.append(([*row, *self.table[b, : -(-self.lens[b] // self.page)]], len(row) * self.page + self.lens[b]))
        self.whole = np.full((self.batch, max(len(row) for row, _ in rows) + 1), -1, np.int32)
        for b, (row, _) in enumerate(rows):
            self.whole[b, : len(row)] = row
        self.whole_lens = np.array([n for _, n in rows], np.int32)

    @property
    def options(self):
        return {"sinks": self.sinks, "softcap": self.softcap, "return_lse": True}

    def run(self, **options):
        return heddle.decode_cascade(self.q, self.cache, self.table, self.lens, self.prefixes, **self.options | options)

    def oracle(self):
        return heddle.decode(self.q, self.cache, self.whole, self.whole_lens, backend="reference", **self.options)


def close(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(to_float64(x), to_float64(y), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_is_decode_over_the_whole_sequence(rng, backend, format, levels):
    for _ in range(8):
        case = Case(rng, format, levels=levels)
        result = case.run(backend=backend)
        close(result, case.oracle(), 1e-5 if backend == "reference" else 3e-3 if "int8" in format else 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(rng, dtype):
    for _ in range(10):
        case = Case(rng, "bf16" if dtype == "bfloat16" else "fp16", dtype, levels=2)
        out, lse = case.run()
        assert out.dtype == case.q.dtype
        assert lse.dtype == np.float32
        close((out, lse), case.oracle(), 3e-2)


def test_prefixes_that_end_inside_a_page(rng, backend):
    """What lies behind them in the page is NaN."""
    lens = np.array([21, 5, 0, 9], np.int32)  # a prefix, and three requests
    table, pages = paged(rng, lens, 16)
    cache = poisoned_cache("fp32", pages, 16, 2, 24, 24)
    k, v = normal(rng, 35, 2, 24), normal(rng, 35, 2, 24)
    cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    cache.append(k, v, table, np.zeros(4, np.int32), cu_seqlens=cu)
    q = normal(rng, 3, 1, 6, 24)
    out = heddle.decode_cascade(q, cache, table[1:], lens[1:], [(table[:1], lens[:1])], backend=backend)
    for b in range(3):
        rows = [*range(21), *range(cu[b + 1], cu[b + 2])]
        expected = heddle.attention(q[b : b + 1], k[None, rows], v[None, rows], backend="reference")
        np.testing.assert_allclose(out[b : b + 1], expected, rtol=1e-5, atol=1e-5)


def test_queries_see_the_whole_prefix(rng, backend):
    """Also those that stand before all of their own tokens; and those that see nothing at all give zeros."""
    case = Case(rng, "fp32")
    q = normal(rng, case.batch, 4, *case.q.shape[2:])
    lens = np.minimum(case.lens, 2).astype(np.int32)
    ((table, shared, cu),) = case.prefixes
    out, lse = heddle.decode_cascade(q, case.cache, case.table, lens, case.prefixes, return_lse=True, backend=backend)
    parts = [heddle.decode(q, case.cache, case.table, lens, return_lse=True, backend="reference")]
    each = np.searchsorted(cu, np.arange(case.batch), "right") - 1
    parts.append(
        heddle.decode(q, case.cache, table[each], shared[each], causal=False, return_lse=True, backend="reference")
    )
    close((out, lse), heddle.merge([o for o, _ in parts], [s for _, s in parts], backend="reference"), 1e-4)


def test_torch_out_and_defaults(rng):
    case = Case(rng, "bf16")
    expected = case.run()
    tensors = [tuple(to_torch(x) for x in prefix) for prefix in case.prefixes]
    out, lse = heddle.decode_cascade(
        to_torch(case.q),
        case.cache,
        to_torch(case.table),
        to_torch(case.lens),
        tensors,
        **case.options | {"sinks": None if case.sinks is None else to_torch(case.sinks)},
    )
    np.testing.assert_array_equal(out.numpy(), expected[0])
    np.testing.assert_array_equal(lse.numpy(), expected[1])
    given = np.empty_like(expected[0])
    assert case.run(out=given, return_lse=False) is given
    np.testing.assert_array_equal(given, expected[0])

    one = heddle.SharedPrefix(case.whole[:1], case.whole_lens[:1])
    as_list = one._replace(cu_requests=[0, case.batch])
    call = (case.q, case.cache, case.table, case.lens)
    np.testing.assert_array_equal(heddle.decode_cascade(*call, [one]), heddle.decode_cascade(*call, [as_list]))
    np.testing.assert_array_equal(heddle.decode_cascade(*call, []), heddle.decode(*call))


def test_bits_do_not_depend_on_threads(rng, default_threads):
    case = Case(rng, "int8-b", levels=2)
    heddle.set_num_threads(1)
    first = case.run()
    heddle.set_num_threads(3)
    for x, y in zip(first, case.run(schedule="static"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_errors(rng):
    case = Case(rng, "fp32")
    while case.batch < 2 or case.queries < 2:
        case = Case(rng, "fp32")
    ((table, lens, cu),) = case.prefixes
    sentinel = np.full((*case.q.shape[:3], case.cache.head_dim_v), 7, np.float32)

    def refused(kind, argument, code, *prefixes, **options):
        arguments = {"q": case.q, "cache": case.cache, "block_table": case.table, "seq_lens": case.lens} | options
        with pytest.raises(kind) as caught:
            heddle.decode_cascade(**arguments, prefixes=prefixes, out=sentinel)
        assert (caught.value.argument, caught.value.code) == (argument, code)
        assert str(caught.value).startswith(f"{argument}: ")

    good, wrong = case.prefixes[0], heddle.HeddleValueError
    refused(
        wrong,
        "prefixes[0].cu_requests",
        "value",
        (table, lens, cu[:-1]),
    )
    refused(wrong, "prefixes[0].cu_requests", "value", (table, lens, cu + 1))
    refused(wrong, "prefixes[0].cu_requests", "value", (table, lens, [0, 2, 1, case.batch]))
    refused(heddle.HeddleTypeError, "prefixes[0].cu_requests", "dtype", (table, lens, cu.astype(np.int64)))
    refused(wrong, "prefixes[1].block_table", "shape", good, (table[:0], lens, cu))
    refused(wrong, "prefixes[1].seq_lens", "shape", good, (table, lens[:0], cu))
    full, none = np.full_like(lens, 2**20), np.full_like(lens, -1)
    refused(wrong, "prefixes[0].seq_lens", "capacity", (table, full, cu))
    refused(wrong, "prefixes[0].seq_lens", "value", (table, none, cu))
    beyond = np.full_like(table, case.cache.num_pages)
    refused(wrong, "prefixes[0].block_table", "value", (beyond, np.ones_like(lens), cu))
    refused(heddle.HeddleTypeError, "prefixes[0]", "dtype", [table, lens])
    refused(wrong, "seq_lens", "shape", good, seq_lens=case.lens[:-1])
    refused(wrong, "q", "layout", good, q=np.ascontiguousarray(case.q.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3))
    refused(heddle.HeddleNotImplementedError, "backend", "unsupported", good, backend="sm90")
    assert (sentinel == 7).all()
