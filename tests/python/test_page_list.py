"""Page lists: decode over chosen pages is decode over the tokens that they hold."""

import numpy as np
import pytest

import heddle
from arrays import normal, paged, to_torch


class Case:
    def __init__(self, rng, format="fp32"):
        self.page, group, self.hkv = int(rng.choice([1, 3, 16])), int(rng.integers(1, 17)), int(rng.integers(1, 4))
        self.batch, queries = int(rng.integers(1, 5)), int(rng.choice([1, 1, 3]))
        self.lens = rng.integers(0, 100, self.batch).astype(np.int32)
        self.lens[0] = 70
        self.table, pages = paged(rng, self.lens, self.page)
        partition = self.page if format == "int8-a" else 1
        self.cache = heddle.KVCache(pages, self.page, self.hkv, 24, format=format, partition=partition)
        for x in (self.cache.k, self.cache.v):
            x[...] = 127 if x.dtype == np.int8 else np.nan
        cu = np.concatenate([[0], np.cumsum(self.lens)]).astype(np.int32)
        k, v = (normal(rng, int(cu[-1]), self.hkv, 24) for _ in range(2))
        self.cache.append(k, v, self.table, np.zeros(self.batch, np.int32), cu_seqlens=cu)
        self.q = normal(rng, self.batch, queries, self.hkv * group, 24)

        heads = int(rng.choice([1, self.hkv]))
        pages = -(-self.lens // self.page)
        chosen = [[np.sort(rng.choice(p, rng.integers(0, p + 1), replace=False)) for _ in range(heads)] for p in pages]
        self.pages = self.padded(chosen, heads)
        tokens = [[self.tokens_of(pages, n) for pages in row] for row, n in zip(chosen, self.lens, strict=True)]
        self.tokens = self.padded(tokens, heads)
        self.lengths = np.array([[len(x) for x in row] for row in chosen], np.int32)

    def tokens_of(self, pages, n):
        return [t for p in pages for t in range(p * self.page, min((p + 1) * self.page, n))]

    def padded(self, lists, heads):
        out = np.full((self.batch, heads, max(len(x) for row in lists for x in row) + 1), -1, np.int32)
        for b, row in enumerate(lists):
            for h, x in enumerate(row):
                out[b, h, : len(x)] = x
        return out

    def decode(self, selection, **options):
        call = (self.q, self.cache, self.table, self.lens)
        return heddle.decode(*call, selection=selection, return_lse=True, **options)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"])
def test_is_decode_over_their_tokens(rng, backend, format):
    for _ in range(10):
        case = Case(rng, format)
        options = {"window": (60, None)} if rng.random() < 0.3 else {}
        tolerance = 3e-3 if "int8" in format else 1e-4
        expected = case.decode(heddle.select.tokens(case.tokens), backend="reference", **options)
        garbage = np.where(case.pages < 0, 2**30, case.pages)  # behind what counts
        for selection in (
            heddle.select.page_list(case.pages),
            heddle.select.page_list(garbage, case.lengths),
            heddle.select.page_list(to_torch(case.pages)),
        ):
            for x, y in zip(case.decode(selection, backend=backend, **options), expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_plan_and_properties(rng):
    case = Case(rng)
    selection = heddle.select.page_list(case.pages, case.lengths)
    np.testing.assert_array_equal(selection.indices, case.pages)
    np.testing.assert_array_equal(selection.lengths, case.lengths)
    assert "page_list" in repr(selection)
    plan = heddle.plan_decode(case.q, case.cache, case.table, case.lens, selection=selection)
    for x, y in zip(case.decode(selection, plan=plan), case.decode(selection), strict=True):
        np.testing.assert_array_equal(x, y)


def test_errors(rng):
    case = Case(rng)
    last = -(-int(case.lens[0]) // case.page)

    def refused(indices, argument, code, lengths=None, kind=heddle.HeddleValueError):
        with pytest.raises(kind) as caught:
            case.decode(heddle.select.page_list(indices, lengths))
        assert (caught.value.argument, caught.value.code) == (argument, code)

    def of_first(*pages):
        lists = np.full((case.batch, 1, 3), -1, np.int32)
        lists[0, 0, : len(pages)] = pages
        return lists

    for wrong in ((1, 0), (2, 2), (0, last), (-1, 1), (-2,)):
        refused(of_first(*wrong), "indices", "value")
    refused(of_first(0), "lengths", "value", np.full((case.batch, 1), 4, np.int32))
    refused(of_first(0), "lengths", "shape", np.zeros((case.batch, 2), np.int32))
    refused(np.zeros((case.batch + 1, 1, 1), np.int32), "indices", "shape")
    refused(np.zeros((case.batch, case.hkv + 1, 1), np.int32), "indices", "shape")
    refused(np.zeros((case.batch, 1, 1, 1), np.int32), "indices", "shape")
    refused(np.zeros((case.batch, 1, 1), np.int64), "indices", "dtype", kind=heddle.HeddleTypeError)
    q = normal(rng, 1, 2, 1, 8)
    with pytest.raises(heddle.HeddleNotImplementedError, match="page list"):
        heddle.attention(q, q, q, selection=heddle.select.page_list(np.zeros((1, 1, 1), np.int32)))
