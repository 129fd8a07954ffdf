"""What is kept alive, and that nothing is kept for longer."""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch

import heddle
from arrays import Producer, normal, to_torch


class Watched(np.ndarray):
    """An array that can be weakly referenced."""


def watched(x):
    return x.view(Watched)


def resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize("make", [lambda x: x, to_torch, Producer])
def test_references_are_returned(rng, make):
    q, k = make(normal(rng, 1, 3, 4, 8)), make(normal(rng, 1, 5, 2, 8))
    sinks, out = make(np.zeros(4, np.float32)), make(np.zeros((1, 3, 4, 8), np.float32))
    cache = heddle.KVCache(2, 4, 2, 8, format="int8-baseline")
    table, lens = make(np.array([[0, 1]], np.int32)), make(np.array([5], np.int32))
    selection = heddle.select.tokens(np.zeros((1, 2, 1), np.int32))
    schedule = heddle.Schedule("tile")
    everything = [q, k, sinks, out, cache, table, lens, selection, schedule]

    def work():
        heddle.attention(q, k, k, sinks=sinks, out=out, selection=selection, schedule=schedule, return_lse=True)
        heddle.attention(q, k, k, format="int8-a", smooth=True)
        heddle.decode(q, cache, table, lens, sinks=sinks, out=out, selection=selection, return_lse=True)
        cache.append(k, k, table, make(np.zeros(1, np.int32)))
        heddle.quantize(k, smooth=True).dequantize()
        for bad in ({"softcap": -1.0}, {"sinks": q}, {"window": (1, 2, 3)}, {"backend": "none"}, {"out": k}):
            with pytest.raises(heddle.HeddleError):
                heddle.attention(q, k, k, **bad)

    work()
    gc.collect()
    before = [sys.getrefcount(x) for x in everything]
    for _ in range(50):
        work()
    gc.collect()
    assert [sys.getrefcount(x) for x in everything] == before


@pytest.mark.usefixtures("default_threads")
def test_memory_does_not_grow(rng):
    heddle.set_num_threads(1)  # tiny calls on a busy machine wait for each other's threads, not for work
    q = normal(rng, 1, 64, 4, 64)
    t = to_torch(q)

    def work():
        for _ in range(100):
            heddle.attention(q, q, q, return_lse=True)
            heddle.attention(t, t, t, return_lse=True)
            heddle.KVCache(8, 16, 2, 64, format="int8-a")
            heddle.merge([q, q], [np.zeros((1, 4, 64), np.float32)] * 2)
            heddle.attention(t, t, t, format="int8-b")
            with pytest.raises(heddle.HeddleError):
                heddle.attention(q, q, q, scale=float("nan"))

    work()
    gc.collect()
    before = resident()
    for _ in range(5):
        work()
    gc.collect()
    assert resident() - before < 4 << 20  # one output of each call kept would be 64 MiB


def test_results_own_their_memory(rng, kind):
    q = normal(rng, 1, 3, 2, 8)
    out, lse = heddle.attention(kind(q), kind(q), kind(q), return_lse=True)
    expected = out.tolist()
    for _ in range(20):
        heddle.attention(kind(q + 1), kind(q), kind(q), return_lse=True)
    gc.collect()
    assert out.tolist() == expected
    assert (sys.getrefcount(out), sys.getrefcount(lse)) == (2, 2)


def test_views_keep_the_cache(rng):
    cache = heddle.KVCache(2, 4, 2, 8, format="int8-a")
    cache.append(*[normal(rng, 1, 6, 2, 8)] * 2, np.array([[0, 1]], np.int32), np.zeros(1, np.int32))
    views = [cache.k, cache.v, cache.k_scale, cache.v_scale, cache.value_norms]
    expected = [x.copy() for x in views]
    references = sys.getrefcount(cache)
    assert references == 2 + len(views)
    del cache
    gc.collect()
    filler = [heddle.KVCache(2, 4, 2, 8, format="int8-a") for _ in range(20)]
    for view, wanted in zip(views, expected, strict=True):
        np.testing.assert_array_equal(view, wanted)
        view[...] = 0
    assert len(filler) == 20


def test_selections_keep_their_arrays(rng):
    q = normal(rng, 1, 8, 2, 16)
    mask = watched(np.array([[True, False], [True, True]]))
    indices, lengths = watched(np.array([[[1, 5]] * 2], np.int32)), watched(np.full((1, 2), 2, np.int32))
    alive = [weakref.ref(x) for x in (mask, indices, lengths)]
    selections = [heddle.select.block_mask(mask, 4), heddle.select.tokens(indices, lengths)]
    expected = [heddle.attention(q, q, q, selection=s) for s in selections]
    del mask, indices, lengths
    gc.collect()
    filler = [np.zeros((2, 2), bool) for _ in range(100)]
    for selection, wanted in zip(selections, expected, strict=True):
        np.testing.assert_array_equal(heddle.attention(q, q, q, selection=selection), wanted)
    assert all(ref() is not None for ref in alive)
    del selections, selection
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert len(filler) == 100


def test_selections_keep_torch_tensors_and_capsules(rng):
    q = normal(rng, 1, 8, 2, 16)
    tensor = torch.ones(2, 2, dtype=torch.bool)
    array = watched(np.ones((2, 2), bool))
    alive = [weakref.ref(tensor), weakref.ref(array)]
    selections = [heddle.select.block_mask(tensor, 4), heddle.select.block_mask(Producer(array), 4)]
    del tensor, array
    gc.collect()
    for selection in selections:
        np.testing.assert_array_equal(heddle.attention(q, q, q, selection=selection), heddle.attention(q, q, q))
    assert all(ref() is not None for ref in alive)
    del selections, selection
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_quantized_tensors_keep_their_arrays(rng):
    made = heddle.quantize(normal(rng, 1, 4, 2, 8))
    data = watched(made.data.copy())
    alive = weakref.ref(data)
    t = heddle.QuantizedTensor(data, made.scale)
    del data
    gc.collect()
    assert t.data is alive()
    np.testing.assert_array_equal(t.dequantize(), made.dequantize())
    del t
    gc.collect()
    assert alive() is None
