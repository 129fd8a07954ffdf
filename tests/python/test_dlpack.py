"""Arrays go in and come out without copies, whatever library, protocol and strides they have."""

import contextlib
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch

import arrays
import formula
import heddle
from arrays import Producer, address, normal, to_float64, to_torch


class OldTorch(torch.Tensor):
    """A tensor as torch before 2.10 has them: without the table of C functions."""

    __dlpack_c_exchange_api__ = None


def old_torch(x):
    return to_torch(x).as_subclass(OldTorch)


KINDS = {
    "numpy": (lambda x: x, np.ndarray),
    "read-only numpy": (lambda x: read_only(x), np.ndarray),
    "memoryview": (memoryview, np.ndarray),
    "torch": (to_torch, torch.Tensor),
    "old torch": (old_torch, torch.Tensor),
    "DLPack": (Producer, np.ndarray),
    "old DLPack": (lambda x: Producer(x, versioned=False), np.ndarray),
    "read-only DLPack": (lambda x: Producer(x, read_only=True), np.ndarray),
}


def read_only(x):
    x = x.view()
    x.flags.writeable = False
    return x


@pytest.fixture(params=KINDS)
def each_kind(request):
    return KINDS[request.param]


def test_every_kind_of_array_gives_the_same(rng, each_kind):
    make, result_type = each_kind
    q, k, v = normal(rng, 2, 7, 4, 16), normal(rng, 2, 9, 2, 16), normal(rng, 2, 9, 2, 16)
    expected, expected_lse = heddle.attention(q, k, v, return_lse=True)
    out, lse = heddle.attention(make(q), make(k), make(v), return_lse=True)
    for result, wanted in ((out, expected), (lse, expected_lse)):
        assert isinstance(result, result_type)
        np.testing.assert_array_equal(to_float64(result), wanted)
    t = heddle.quantize(make(k), "int8", "token")
    assert isinstance(t.data, result_type)
    np.testing.assert_array_equal(to_float64(t.dequantize()), heddle.quantize(k, "int8", "token").dequantize())


@pytest.mark.parametrize(
    ("make", "result_type"),
    [
        (lambda x: x, np.ndarray),
        (read_only, np.ndarray),
        (to_torch, torch.Tensor),
        (old_torch, torch.Tensor),
        (lambda x: Producer(to_torch(x)), np.ndarray),  # numpy itself does not export it
    ],
    ids=["numpy", "read-only numpy", "torch", "old torch", "DLPack"],
)
def test_bfloat16(rng, make, result_type):
    q = normal(rng, 1, 7, 2, 16, dtype="bfloat16")
    expected = heddle.attention(q, q, q)
    out = heddle.attention(make(q), make(q), make(q))
    assert isinstance(out, result_type)
    assert str(out.dtype).removeprefix("torch.") == "bfloat16"
    np.testing.assert_array_equal(to_float64(out), to_float64(expected))
    assert str(heddle.quantize(make(q), "fp8").data.dtype).removeprefix("torch.") == "float8_e4m3fn"


@pytest.mark.parametrize("make", [lambda x: x, memoryview, to_torch, old_torch, Producer])
def test_out_is_the_callers_memory(rng, make):
    q, out = normal(rng, 2, 7, 4, 16), np.zeros((2, 7, 4, 16), np.float32)
    given = make(out)
    like = to_torch if isinstance(given, torch.Tensor) else make
    assert heddle.attention(like(q), like(q), like(q), out=given) is given
    np.testing.assert_array_equal(out, heddle.attention(q, q, q))


@pytest.mark.parametrize("make", [to_torch, old_torch, lambda x: x, Producer])
def test_inputs_are_not_copied(make):
    """4 GiB of keys that are 16 KiB of memory: a copy would be noticed."""
    q = np.ones((1, 1, 8, 64), np.float32)
    k = np.broadcast_to(np.ones((1, 1, 8, 64), np.float32), (1, 1 << 21, 8, 64))
    if make in (to_torch, old_torch):
        k = make(np.ones((1, 1, 8, 64), np.float32)).expand(1, 1 << 21, 8, 64)
    else:
        k = make(k)
    block_mask = heddle.select.block_mask(np.arange(1 << 12).reshape(1, -1) == 5, (1, 512))
    tracemalloc.start()
    out = heddle.attention(make(q), k, k, selection=block_mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    np.testing.assert_allclose(to_float64(out), 1.0, rtol=1e-6)


def test_selections_read_the_callers_memory(rng):
    q, k = normal(rng, 1, 8, 2, 16), normal(rng, 1, 8, 2, 16)
    mask = torch.ones(2, 2, dtype=torch.bool)
    selection = heddle.select.block_mask(mask, 4)
    full = heddle.attention(q, k, k, selection=selection)
    mask[:, 1] = False
    half = heddle.attention(q, k, k, selection=selection)
    np.testing.assert_array_equal(full, heddle.attention(q, k, k))
    np.testing.assert_array_equal(half, heddle.attention(q, k[:, :4], k[:, :4]))


# ---- strides ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "tokens first": lambda x: np.ascontiguousarray(x.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3),
    "sliced": lambda x: np.repeat(np.pad(x, ((0, 0), (2, 3), (1, 0), (5, 7))), 3, axis=1)[:, 6:-9:3, 1:, 5:-7],
    "backwards": lambda x: np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
    "fortran, but for the last axis": lambda x: np.ascontiguousarray(x.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_any_strides(rng, backend, kind, layout, dtype):
    arrange = LAYOUTS[layout]
    if layout == "backwards" and kind is to_torch:
        pytest.skip("torch has no negative strides")
    q, k, v = (normal(rng, 2, 6, heads, 24, dtype=dtype) for heads in (4, 2, 2))
    around = np.full((2, 6, 4, 24), 7.0, q.dtype)
    out, x, y, z = arrange(around), arrange(q), arrange(k), arrange(v)
    assert not x.flags.c_contiguous
    np.testing.assert_array_equal(x, q)
    heddle.attention(kind(x), kind(y), kind(z), causal=True, out=kind(out), backend=backend)
    np.testing.assert_array_equal(out, heddle.attention(q, k, v, causal=True, backend=backend))


def test_zero_strides(rng, backend, kind):
    """One key and value head, and one request, broadcast to many."""
    q, k, v = normal(rng, 3, 6, 4, 24), normal(rng, 1, 9, 1, 24), normal(rng, 1, 9, 1, 24)
    if kind is to_torch:
        wide = [to_torch(x).expand(3, 9, 4, 24) for x in (k, v)]
    else:
        wide = [np.broadcast_to(x, (3, 9, 4, 24)) for x in (k, v)]
    out = heddle.attention(kind(q), *wide, backend=backend)
    expected = formula.attention(q, *(np.broadcast_to(x, (3, 9, 4, 24)) for x in (k, v)))[0]
    np.testing.assert_allclose(to_float64(out), expected, atol=1e-5)


def test_strided_appends_and_tables(rng):
    k, v = normal(rng, 2, 2, 5, 16), normal(rng, 5, 2, 2, 16)
    table = np.zeros((4, 6), np.int32)
    table[::2, 1:4] = [[0, 1, 9], [2, 3, 9]]
    caches = [heddle.KVCache(4, 4, 2, 16, format="fp32") for _ in range(2)]
    x, y = k.transpose(0, 2, 1, 3), v.transpose(1, 0, 2, 3)[:, ::-1]
    start, q = np.zeros(2, np.int32), normal(rng, 2, 1, 4, 16)
    lens = caches[0].append(x, y, table[::2, 1:4], start)
    caches[1].append(*(np.ascontiguousarray(a) for a in (x, y)), np.array([[0, 1], [2, 3]], np.int32), start)
    np.testing.assert_array_equal(caches[0].k, caches[1].k)
    np.testing.assert_array_equal(
        heddle.decode(q, caches[0], table[::2, 1:4], lens),
        heddle.decode(q, caches[1], np.array([[0, 1], [2, 3]], np.int32), lens),
    )


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_streams_are_asked_for_on_gpus_alone(rng):
    q = normal(rng, 1, 3, 2, 8)
    for device, stream in (((1, 0), None), ((2, 3), 1)):
        producer = Producer(q, device=device)
        with pytest.raises(heddle.HeddleValueError, match="cuda:3") if stream else contextlib.nullcontext():
            heddle.attention(q, producer, q)
        assert producer.streams == [stream]


@pytest.mark.parametrize("versioned", [False, True])
def test_tensors_are_given_back_to_their_producer(rng, versioned):
    q = normal(rng, 1, 3, 2, 8)
    references = sys.getrefcount(q)
    producer = Producer(q, versioned=versioned)
    for _ in range(100):
        heddle.attention(producer, producer, producer)
        with pytest.raises(heddle.HeddleTypeError):
            heddle.attention(producer, producer, to_torch(q))
    del producer
    assert sys.getrefcount(q) == references


def test_a_broken_producer_is_refused(rng):
    class Broken(Producer):
        def __dlpack__(self, **options):
            return None

    class Unwilling(Producer):
        def __dlpack__(self, **options):
            raise BufferError("not today")

    q = normal(rng, 1, 3, 2, 8)
    with pytest.raises(heddle.HeddleValueError, match=r"q: .*no DLPack capsule"):
        heddle.attention(Broken(q), q, q)
    with pytest.raises(heddle.HeddleValueError, match=r"k: .*not today"):
        heddle.attention(q, Unwilling(q), q)


def test_cache_views_share_memory_with_what_the_cache_reads(rng):
    cache = heddle.KVCache(2, 4, 2, 16, format="fp32")
    table, start = np.array([[1, 0]], np.int32), np.zeros(1, np.int32)
    lens = cache.append(normal(rng, 1, 6, 2, 16), normal(rng, 1, 6, 2, 16), table, start)
    views = [cache.k, cache.v, cache.value_norms]
    for view, again in zip(views, (cache.k, cache.v, cache.value_norms), strict=True):
        assert address(view) == address(again)
        assert view.flags.writeable
    views[1][...] = 3.0
    np.testing.assert_allclose(heddle.decode(normal(rng, 1, 1, 2, 16), cache, table, lens), 3.0, rtol=1e-6)
    assert address(torch.from_numpy(cache.k)) == address(cache.k)


def test_quantized_arrays_are_new_and_owned(rng, kind):
    x = normal(rng, 1, 4, 2, 8)
    t = heddle.quantize(kind(x))
    assert t.data is t.data
    assert address(t.data) != address(x)
    copied = to_float64(t.dequantize()).copy()
    x[...] = 0
    np.testing.assert_array_equal(to_float64(t.dequantize()), copied)
    assert t.data.dtype == (torch.int8 if kind is to_torch else np.int8)
    assert ml_dtypes.finfo(heddle.quantize(np.ones_like(x), "fp8").data.dtype).max == 448
