"""Bad input: one typed error that names the argument, what came and what is allowed, and nothing is written."""

import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

import heddle
from arrays import Producer, normal, to_torch
from heddle import HeddleNotImplementedError, HeddleTypeError, HeddleValueError

RNG = np.random.default_rng(5)
Q, K, V = normal(RNG, 2, 6, 4, 16), normal(RNG, 2, 9, 2, 16), normal(RNG, 2, 9, 2, 8)
PACKED = {"q": Q[0], "k": K[0], "v": V[0], "out": np.zeros((6, 4, 8), np.float32)}
PACKED |= {"cu_seqlens_q": np.array([0, 2, 6], np.int32), "cu_seqlens_k": np.array([0, 9, 9], np.int32)}
ON_GPU = {"device": (2, 0)}


def int32(*values):
    return np.array(values, np.int32)


def block_mask(shape, block=(4, 4), dtype=bool):
    return {"selection": heddle.select.block_mask(np.ones(shape, dtype), block)}


def tokens(*lists, lengths=None):
    """One list for both requests and both heads."""
    indices = np.broadcast_to(int32(*lists), (2, 2, len(lists)))
    return {"selection": heddle.select.tokens(indices, None if lengths is None else np.full((2, 2), lengths, np.int32))}


TORCH = {"q": to_torch(Q), "k": to_torch(K), "v": to_torch(V)}
RECORDED = {name: x.clone().requires_grad_() for name, x in TORCH.items()} | {"out": None}
MASK, LIST, ONE = np.ones((2, 2), bool), np.zeros((1, 2, 3), np.int32), np.ones(1, np.float32)


def case(title, argument, exception, code, given, allowed, /, **changes):
    return pytest.param(changes, argument, exception, code, given, allowed, id=title)


VALUE, TYPE, MISSING = HeddleValueError, HeddleTypeError, HeddleNotImplementedError

ATTENTION = [
    case("rank of q", "q", VALUE, "shape", "rank 2", "4", q=Q[0, 0]),
    case("rank of q without cu_seqlens", "q", VALUE, "shape", "rank 3", "4", q=Q[0], v=V[0], out=None),
    case("rank of q with cu_seqlens", "q", VALUE, "shape", "rank 4", "3", cu_seqlens_q=int32(0, 6)),
    case("rank of k", "k", VALUE, "shape", "rank 3", "4", k=K[0]),
    case("rank of v", "v", VALUE, "shape", "rank 5", "4", v=V[None]),
    case("rank beyond all", "q", VALUE, "shape", "rank 6", "5", q=Q[None, None]),
    case("batch of k", "k", VALUE, "shape", "is 1", "2", k=K[:1]),
    case("batch of v", "v", VALUE, "shape", "is 1", "2", v=V[:1]),
    case("tokens of v", "v", VALUE, "shape", "is 8", "9", v=V[:, :8]),
    case("heads of v", "v", VALUE, "shape", "is 1", "2", v=V[:, :, :1]),
    case("heads not divisible", "q", VALUE, "shape", "3 heads", "multiples of the 2", q=Q[:, :, :3]),
    case("head_dim of k", "k", VALUE, "shape", "is 15", "16", k=K[..., :15]),
    case("no head_dim", "q", VALUE, "shape", "is 0", "1 and above", q=Q[..., :0], k=K[..., :0]),
    case("no heads", "k", VALUE, "shape", "is 0", "1 and above", k=K[:, :, :0], v=V[:, :, :0]),
    case("no head_dim_v", "v", VALUE, "shape", "is 0", "1 and above", v=V[..., :0], out=None),
    case("dtype of k", "k", TYPE, "dtype", "float16", "float32", k=K.astype(np.float16)),
    case("dtype of v", "v", TYPE, "dtype", "bfloat16", "float32", v=V.astype(ml_dtypes.bfloat16)),
    case("integers", "q", TYPE, "dtype", "int32", "float32", q=Q.astype(np.int32)),
    case("int8 without scales", "k", TYPE, "dtype", "int8 without scales", "QuantizedTensor", k=K.astype(np.int8)),
    case("unknown dtype", "q", TYPE, "dtype", "uint16", "float32", q=Q.astype(np.uint16)),
    case(
        "unknown torch dtype",
        "sinks",
        TYPE,
        "dtype",
        "complex64",
        "float32",
        sinks=torch.zeros(4, dtype=torch.complex64),
    ),
    case("byte order", "v", TYPE, "dtype", "big-endian", "float32", v=V.astype(">f4")),
    case("not an array", "k", TYPE, "dtype", "list", "numpy", k=[[1.0]]),
    case("None", "v", TYPE, "dtype", "NoneType", "numpy", v=None),
    case("mixed kinds", "k", TYPE, "dtype", "torch tensor", "numpy array", k=to_torch(K)),
    case("last axis", "k", VALUE, "layout", "stride 2", "1 (contiguous)", k=normal(RNG, 2, 9, 2, 32)[..., ::2]),
    case("last axis backwards", "q", VALUE, "layout", "stride -1", "1 (contiguous)", q=Q[..., ::-1]),
    case(
        "unaligned",
        "q",
        VALUE,
        "layout",
        "not aligned",
        "4 bytes",
        q=np.frombuffer(b"\0" + Q.tobytes(), np.uint8)[1:].view(np.float32).reshape(Q.shape),
    ),
    case(
        "unaligned torch",
        "k",
        VALUE,
        "layout",
        "not aligned",
        "4 bytes",
        **TORCH
        | {"k": torch.frombuffer(bytearray(1 + K.nbytes), dtype=torch.float32, offset=1).reshape(K.shape), "out": None},
    ),
    case("mixed devices", "k", VALUE, "device", "cuda:0", "cpu", k=Producer(K, **ON_GPU)),
    case(
        "sinks on another device",
        "sinks",
        VALUE,
        "device",
        "cuda:0",
        "cpu",
        sinks=Producer(Q[0, 0, :, 0].copy(), **ON_GPU),
    ),
    case("unknown device", "q", VALUE, "device", "device type 8", "CPU", q=Producer(Q, device=(8, 0))),
    case("meta tensors", "q", VALUE, "value", "meta", "DLPack", q=to_torch(Q).to("meta")),
    case("out of another shape", "out", VALUE, "shape", "[2, 6, 4, 16]", "[2, 6, 4, 8]", out=np.zeros_like(Q)),
    case("out of another dtype", "out", TYPE, "dtype", "float16", "float32", out=np.zeros((2, 6, 4, 8), np.float16)),
    case("out of another kind", "out", TYPE, "dtype", "torch tensor", "numpy array", out=torch.zeros(2, 6, 4, 8)),
    case("read-only out", "out", VALUE, "value", "read-only", "writable", out=np.frombuffer(bytes(1536), np.float32)),
    case("read-only out by DLPack", "out", VALUE, "value", "read-only", "writable", out=Producer(Q, read_only=True)),
    case(
        "overlapping out",
        "out",
        VALUE,
        "layout",
        "stride 0",
        "other",
        **TORCH,
        out=torch.zeros(1, 6, 4, 8).expand(2, 6, 4, 8),
    ),
    case("negative window", "window", VALUE, "value", "-1", "0 and above", window=(-1, 0)),
    case("negative window on the right", "window", VALUE, "value", "-3", "0 and above", window=(None, -3)),
    case("window of three", "window", VALUE, "value", "3", "(left, right)", window=(1, 2, 3)),
    case("window of a float", "window", TYPE, "dtype", "float", "(left, right)", window=2.5),
    case("window of floats", "window", TYPE, "dtype", "float", "integer", window=(2.5, 0)),
    case("negative softcap", "softcap", VALUE, "value", "-1", "0", softcap=-1.0),
    case("softcap NaN", "softcap", VALUE, "value", "nan", "finite", softcap=float("nan")),
    case("softcap None", "softcap", TYPE, "dtype", "NoneType", "number", softcap=None),
    case("scale NaN", "scale", VALUE, "value", "nan", "finite", scale=float("nan")),
    case("scale infinite", "scale", VALUE, "value", "inf", "finite", scale=float("inf")),
    case("scale of text", "scale", TYPE, "dtype", "str", "number", scale="1"),
    case("causal of text", "causal", TYPE, "dtype", "str", "True and False", causal="yes"),
    case("return_lse of a number", "return_lse", TYPE, "dtype", "int", "True and False", return_lse=2),
    case("shape of sinks", "sinks", VALUE, "shape", "[3]", "[4]", sinks=np.zeros(3, np.float32)),
    case("dtype of sinks", "sinks", TYPE, "dtype", "float64", "float32", sinks=np.zeros(4)),
    case("sinks NaN", "sinks", VALUE, "value", "nan", "finite", sinks=np.full(4, np.nan, np.float32)),
    case("unknown backend", "backend", VALUE, "value", "'gpu'", "auto, reference, host", backend="gpu"),
    case("backend that is not there", "backend", MISSING, "unsupported", "sm90", "host", backend="sm90"),
    case("backend of another type", "backend", TYPE, "dtype", "int", "string", backend=1),
    case("unknown schedule", "schedule", VALUE, "value", "'fast'", "auto, tile, static, stealing", schedule="fast"),
    case("schedule of another type", "schedule", TYPE, "dtype", "int", "heddle.Schedule", schedule=3),
    case("selection of another type", "selection", TYPE, "dtype", "numpy array", "heddle.select", selection=Q),
    case("mask too small", "mask", VALUE, "shape", "is 2", "3", **block_mask((2, 2))),
    case("mask for other heads", "mask", VALUE, "shape", "is 3", "1, 2", **block_mask((3, 2, 3))),
    case("mask for another batch", "mask", VALUE, "shape", "is 3", "2", **block_mask((3, 1, 2, 3))),
    case("token out of range", "indices", VALUE, "value", "token 9", "0 to 8", **tokens(1, 9)),
    case("token below -1", "indices", VALUE, "value", "token -2", "0 to 8", **tokens(1, -2)),
    case("padding in the middle", "indices", VALUE, "value", "token -1", "end", **tokens(1, -1, 3)),
    case("tokens unsorted", "indices", VALUE, "value", "follows 5", "ascending", **tokens(5, 3)),
    case("tokens repeated", "indices", VALUE, "value", "follows 5", "ascending", **tokens(5, 5)),
    case("length of tokens", "lengths", VALUE, "value", "3", "0 to 2", **tokens(1, 5, lengths=3)),
    case("negative length of tokens", "lengths", VALUE, "value", "-1", "0 to 2", **tokens(1, 5, lengths=-1)),
    case(
        "tokens for other heads",
        "indices",
        VALUE,
        "shape",
        "is 4",
        "2",
        selection=heddle.select.tokens(np.zeros((2, 4, 1), np.int32)),
    ),
    case(
        "tokens for another batch",
        "indices",
        VALUE,
        "shape",
        "is 3",
        "2",
        selection=heddle.select.tokens(np.zeros((3, 2, 1), np.int32)),
    ),
    case(
        "only one cu_seqlens", "cu_seqlens_k", VALUE, "shape", "not given", "needed", **PACKED | {"cu_seqlens_k": None}
    ),
    case(
        "cu_seqlens decreasing",
        "cu_seqlens_q",
        VALUE,
        "value",
        "is 2",
        "4",
        **PACKED | {"cu_seqlens_q": int32(0, 4, 2)},
    ),
    case(
        "cu_seqlens negative",
        "cu_seqlens_k",
        VALUE,
        "value",
        "is -1",
        "0",
        **PACKED | {"cu_seqlens_k": int32(-1, 4, 9)},
    ),
    case(
        "cu_seqlens beyond the tensor",
        "cu_seqlens_k",
        VALUE,
        "value",
        "10",
        "9",
        **PACKED | {"cu_seqlens_k": int32(0, 4, 10)},
    ),
    case(
        "cu_seqlens of different batches",
        "cu_seqlens_k",
        VALUE,
        "shape",
        "is 2",
        "3",
        **PACKED | {"cu_seqlens_k": int32(0, 9)},
    ),
    case(
        "cu_seqlens of int64",
        "cu_seqlens_q",
        TYPE,
        "dtype",
        "int64",
        "int32",
        **PACKED | {"cu_seqlens_q": np.array([0, 2, 6])},
    ),
    case("unknown format", "format", VALUE, "value", "'int4'", "int8-a", format="int4"),
    case("no partition", "partition", VALUE, "value", "0", "1 and above", format="int8-a", partition=0),
    case(
        "partition over requests",
        "partition",
        VALUE,
        "value",
        "2",
        "1",
        format="int8-a",
        partition=2,
        **PACKED,
    ),
    case("format of integers", "v", TYPE, "dtype", "int32", "float32", format="int8-b", v=V.astype(np.int32)),
    case("format of NaN", "k", VALUE, "value", "is nan", "finite", format="int8-b", k=np.full_like(K, np.nan)),
    case("format twice", "q", TYPE, "dtype", "QuantizedTensor", "numpy", format="int8-b", q=heddle.quantize(Q)),
    case("gradients", "q", MISSING, "unsupported", "requires grad", "detach", **RECORDED),
]


def expect(call, argument, exception, code, given, allowed):
    with pytest.raises(exception) as caught:
        call()
    error = caught.value
    assert type(error) is exception
    assert isinstance(error, heddle.HeddleError)
    assert (error.argument, error.code) == (argument, code)
    assert str(error).startswith(f"{argument}: ")
    assert given in str(error), error
    assert allowed in str(error), error


@pytest.mark.parametrize(("changes", "argument", "exception", "code", "given", "allowed"), ATTENTION)
def test_attention(changes, argument, exception, code, given, allowed):
    out = np.full((2, 6, 4, 8), 7.0, np.float32)
    arguments = {"q": Q, "k": K, "v": V, "out": out} | changes
    before = snapshot(arguments["out"])
    expect(lambda: heddle.attention(**arguments), argument, exception, code, given, allowed)
    assert snapshot(arguments["out"]) == before


def snapshot(out):
    """The bytes of an array that must not change."""
    return bytes(out.numpy().tobytes() if isinstance(out, torch.Tensor) else getattr(out, "array", np.asarray(out)))


def test_gradients_are_not_lost_without_a_word():
    q, k, v = (RECORDED[name] for name in "qkv")
    with torch.no_grad():
        expected = heddle.attention(q, k, v)
    assert not expected.requires_grad
    torch.testing.assert_close(heddle.attention(q.detach(), k.detach(), v.detach()), expected, rtol=0, atol=0)


# ---- decode and the cache --------------------------------------------------------------------------------------------

FORMATS = ["fp32", "bf16", "int8-baseline", "int8-a", "int8-b", "fp8"]
TABLE, LENS, NEW = int32([3, 0, 9], [1, 4, 9]), int32(7, 5), normal(RNG, 2, 1, 4, 16)


def filled(format="int8-a"):
    """Two requests of 7 and 5 tokens in a cache of 5 pages of 4."""
    cache = heddle.KVCache(5, 4, 2, 16, head_dim_v=8, format=format)
    k, v = normal(np.random.default_rng(1), 12, 2, 16), normal(np.random.default_rng(2), 12, 2, 8)
    cache.append(k, v, TABLE, int32(0, 0), cu_seqlens=int32(0, 7, 12))
    return cache


def state(cache):
    parts = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.q_scale, cache.value_norms)
    return [
        *(None if part is None else part.tobytes() for part in parts),
        cache.saturated,
        cache.kv_calibrated,
        cache.q_calibrated,
    ]


DECODE = [
    case("not a cache", "cache", TYPE, "dtype", "numpy array", "heddle.KVCache", cache=Q),
    case("rank of q", "q", VALUE, "shape", "rank 3", "4", q=NEW[0]),
    case("head_dim of q", "q", VALUE, "shape", "is 8", "16", q=NEW[..., :8]),
    case("heads not divisible", "q", VALUE, "shape", "3 heads", "multiples of the 2", q=NEW[:, :, :3]),
    case("integers", "q", TYPE, "dtype", "int8", "float32", q=NEW.astype(np.int8)),
    case(
        "device of q",
        "q",
        VALUE,
        "device",
        "cuda:0",
        "cpu",
        q=Producer(NEW, **ON_GPU),
        out=np.zeros((2, 1, 4, 8), np.float32),
    ),
    case("rank of the table", "block_table", VALUE, "shape", "rank 1", "2", block_table=TABLE[0]),
    case("batch of the table", "block_table", VALUE, "shape", "is 1", "2", block_table=TABLE[:1]),
    case("table of int64", "block_table", TYPE, "dtype", "int64", "int32", block_table=TABLE.astype(np.int64)),
    case(
        "page outside the cache",
        "block_table",
        VALUE,
        "value",
        "page id 5",
        "0 to 4",
        block_table=int32([3, 5, 9], [1, 4, 9]),
    ),
    case(
        "negative page", "block_table", VALUE, "value", "page id -1", "0 to 4", block_table=int32([3, 0, 9], [-1, 4, 9])
    ),
    case("lengths beyond the table", "seq_lens", VALUE, "capacity", "13", "0 to 12", seq_lens=int32(7, 13)),
    case("negative length", "seq_lens", VALUE, "value", "-1", "0 to 12", seq_lens=int32(-1, 5)),
    case("lengths of int64", "seq_lens", TYPE, "dtype", "int64", "int32", seq_lens=LENS.astype(np.int64)),
    case("lengths of another batch", "seq_lens", VALUE, "shape", "[1]", "[2]", seq_lens=LENS[:1]),
    case("lengths in a list", "seq_lens", TYPE, "dtype", "list", "numpy", seq_lens=[7, 5]),
    case("softcap", "softcap", VALUE, "value", "-2", "0", softcap=-2.0),
    case("window", "window", VALUE, "value", "-2", "0 and above", window=-2),
    case("scale", "scale", VALUE, "value", "nan", "finite", scale=np.nan),
    case("token out of range", "indices", VALUE, "value", "token 6", "0 to 4", **tokens(1, 6)),
    case("mask of another shape", "mask", VALUE, "shape", "is 3", "2", **block_mask((1, 3))),
    case("backend", "backend", MISSING, "unsupported", "sm90", "host", backend="sm90"),
    case(
        "out of another shape",
        "out",
        VALUE,
        "shape",
        "[1, 1, 4, 8]",
        "[2, 1, 4, 8]",
        out=np.zeros((1, 1, 4, 8), np.float32),
    ),
    case("out of another dtype", "out", TYPE, "dtype", "float16", "float32", out=np.zeros((2, 1, 4, 8), np.float16)),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("changes", "argument", "exception", "code", "given", "allowed"), DECODE)
def test_decode(format, changes, argument, exception, code, given, allowed):
    cache, out = filled(format), np.full((2, 1, 4, 8), 7.0, np.float32)
    before = state(cache)
    arguments = {"q": NEW, "cache": cache, "block_table": TABLE, "seq_lens": LENS, "out": out} | changes
    expect(lambda: heddle.decode(**arguments), argument, exception, code, given, allowed)
    assert state(cache) == before
    assert (out == 7.0).all()


NEW_K, NEW_V = normal(RNG, 2, 3, 2, 16), normal(RNG, 2, 3, 2, 8)
PACKED_NEW = {"k": NEW_K[0], "v": NEW_V[0]}

APPEND = [
    case("rank of k", "k", VALUE, "shape", "rank 2", "4", k=NEW_K[0, 0]),
    case("batch of k", "block_table", VALUE, "shape", "is 2", "1, as in k", k=NEW_K[:1], v=NEW_V[:1]),
    case("heads of k", "k", VALUE, "shape", "1", "2", k=NEW_K[:, :, :1]),
    case("head_dim of k", "k", VALUE, "shape", "8", "16", k=NEW_K[..., :8]),
    case("head_dim of v", "v", VALUE, "shape", "4", "8", v=NEW_V[..., :4]),
    case("tokens of v", "v", VALUE, "shape", "2", "3", v=NEW_V[:, :2]),
    case("integers", "k", TYPE, "dtype", "int32", "float32", k=NEW_K.astype(np.int32)),
    case("last axis", "v", VALUE, "layout", "stride 2", "1 (contiguous)", v=normal(RNG, 2, 3, 2, 16)[..., ::2]),
    case("mixed kinds", "v", TYPE, "dtype", "torch tensor", "numpy array", v=to_torch(NEW_V)),
    case("device of k", "k", VALUE, "device", "cuda:0", "cpu", k=Producer(NEW_K, **ON_GPU)),
    case("table too small", "block_table", VALUE, "capacity", "position 12", "0 to 11", start=int32(7, 10)),
    case("table of int64", "block_table", TYPE, "dtype", "int64", "int32", block_table=TABLE.astype(np.int64)),
    case("page outside the cache", "block_table", VALUE, "value", "page id 9", "0 to 4", start=int32(7, 6)),
    case("negative start", "start", VALUE, "value", "-1", "0", start=int32(-1, 5)),
    case("start of int64", "start", TYPE, "dtype", "int64", "int32", start=LENS.astype(np.int64)),
    case("start of another batch", "start", VALUE, "shape", "[1]", "[2]", start=LENS[:1]),
    case("cu_seqlens decreasing", "cu_seqlens", VALUE, "value", "1", "2", **PACKED_NEW, cu_seqlens=int32(0, 2, 1)),
    case("cu_seqlens beyond", "cu_seqlens", VALUE, "value", "4", "3", **PACKED_NEW, cu_seqlens=int32(0, 2, 4)),
    case(
        "cu_seqlens of int64",
        "cu_seqlens",
        TYPE,
        "dtype",
        "int64",
        "int32",
        **PACKED_NEW,
        cu_seqlens=np.array([0, 1, 3]),
    ),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("changes", "argument", "exception", "code", "given", "allowed"), APPEND)
def test_append(format, changes, argument, exception, code, given, allowed):
    cache = filled(format)
    before = state(cache)
    table = int32([3, 0, 2], [1, 4, 9])
    arguments = {"k": NEW_K, "v": NEW_V, "block_table": table, "start": LENS} | changes
    expect(lambda: cache.append(**arguments), argument, exception, code, given, allowed)
    assert state(cache) == before


@pytest.mark.parametrize("format", ["int8-baseline", "int8-a", "int8-b", "fp8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_append_of_what_cannot_be_quantized(format, value):
    cache = filled(format)
    before = state(cache)
    k = NEW_K.copy()
    k[1, 2, 1, 3] = value
    table = int32([3, 0, 2], [1, 4, 9])
    expect(lambda: cache.append(k, NEW_V, table, int32(7, 5)), "k", VALUE, "value", f"is {value}", "finite")
    expect(
        lambda: cache.append(NEW_K, k[..., :8].copy(), table, int32(7, 5)), "v", VALUE, "value", f"is {value}", "finite"
    )
    assert state(cache) == before


def test_a_cache_that_is_full():
    cache = heddle.KVCache(2, 4, 2, 16, head_dim_v=8, format="fp32")
    k, v = normal(RNG, 1, 9, 2, 16), normal(RNG, 1, 9, 2, 8)
    before = state(cache)
    expect(lambda: cache.append(k, v, int32([0, 1]), int32(0)), "block_table", VALUE, "capacity", "9", "8")
    expect(lambda: cache.append(k, v, int32([0, 1, 2]), int32(0)), "block_table", VALUE, "value", "page id 2", "0 to 1")
    assert state(cache) == before


CACHES = [
    case("no pages", "num_pages", VALUE, "value", "0", "1", num_pages=0),
    case("negative page size", "page_size", VALUE, "value", "-4", "1", page_size=-4),
    case("no heads", "num_kv_heads", VALUE, "value", "0", "1", num_kv_heads=0),
    case("no head_dim", "head_dim", VALUE, "value", "0", "1", head_dim=0),
    case("no head_dim_v", "head_dim_v", VALUE, "value", "0", "1", head_dim_v=0),
    case("head_dim of a float", "head_dim", TYPE, "dtype", "float", "integer", head_dim=16.0),
    case("a huge number", "num_pages", VALUE, "value", "100000000000000000000", "64-bit", num_pages=10**20),
    case("unknown format", "format", VALUE, "value", "'int4'", "int8-a", format="int4"),
    case("format of another type", "format", TYPE, "dtype", "NoneType", "string", format=None),
    case("partition that does not divide", "partition", VALUE, "value", "3", "4", format="int8-a", partition=3),
    case("unknown device", "device", VALUE, "value", "'tpu'", "cpu", device="tpu"),
    case("device of another type", "device", TYPE, "dtype", "int", "string", device=0),
]


@pytest.mark.parametrize(("changes", "argument", "exception", "code", "given", "allowed"), CACHES)
def test_cache(changes, argument, exception, code, given, allowed):
    arguments = {"num_pages": 5, "page_size": 4, "num_kv_heads": 2, "head_dim": 16} | changes
    expect(lambda: heddle.KVCache(**arguments), argument, exception, code, given, allowed)


def test_calibration_comes_first():
    cache = filled("int8-b")
    before = state(cache)
    with pytest.raises(HeddleValueError, match="holds tokens"):
        cache.calibrate(NEW_K, NEW_V)
    assert state(cache) == before


# ---- the rest --------------------------------------------------------------------------------------------------------


def merge(**changes):
    parts = {"outs": normal(RNG, 3, 2, 6, 4, 8), "lses": normal(RNG, 3, 2, 4, 6)} | changes
    return heddle.merge(**parts)


def quantize(**changes):
    return heddle.quantize(**{"x": K} | changes)


OTHERS = [
    case("merge rank", "outs", VALUE, "shape", "rank 3", "4, 5", call=merge, outs=Q[0]),
    case("merge rank of lses", "lses", VALUE, "shape", "rank 3", "4", call=merge, lses=normal(RNG, 2, 4, 6)),
    case(
        "merge shape of lses",
        "lses",
        VALUE,
        "shape",
        "[3, 2, 6, 4]",
        "[3, 2, 4, 6]",
        call=merge,
        lses=normal(RNG, 3, 2, 6, 4),
    ),
    case("merge of nothing", "outs", VALUE, "shape", "no parts", "1 and above", call=merge, outs=[]),
    case("merge of unequal parts", "outs", VALUE, "shape", "stack", "shape", call=merge, outs=[Q, K]),
    case(
        "merge of integers",
        "outs",
        TYPE,
        "dtype",
        "int32",
        "float32",
        call=merge,
        outs=np.zeros((3, 2, 6, 4, 8), np.int32),
    ),
    case(
        "merge lses in half",
        "lses",
        TYPE,
        "dtype",
        "float16",
        "float32",
        call=merge,
        lses=np.zeros((3, 2, 4, 6), np.float16),
    ),
    case(
        "merge of mixed kinds",
        "lses",
        TYPE,
        "dtype",
        "torch tensor",
        "numpy array",
        call=merge,
        lses=torch.zeros(3, 2, 4, 6),
    ),
    case("quantize rank", "x", VALUE, "shape", "rank 2", "3, 4", call=quantize, x=K[0, 0]),
    case("quantize integers", "x", TYPE, "dtype", "int8", "float32", call=quantize, x=K.astype(np.int8)),
    case("quantize NaN", "x", VALUE, "value", "is nan", "finite", call=quantize, x=np.full_like(K, np.nan)),
    case("quantize format", "format", VALUE, "value", "'int4'", "int8, fp8", call=quantize, format="int4"),
    case("quantize granularity", "granularity", VALUE, "value", "'head'", "'token'", call=quantize, granularity="head"),
    case(
        "quantize no partition",
        "granularity",
        VALUE,
        "value",
        "0",
        "1 and above",
        call=quantize,
        granularity=("partition", 0),
    ),
    case("quantize smooth", "smooth", TYPE, "dtype", "str", "True", call=quantize, smooth="k"),
    case("quantize static scale", "static_scale", VALUE, "value", "-1", "above 0", call=quantize, static_scale=-1.0),
    case(
        "quantize static scale per token",
        "static_scale",
        VALUE,
        "value",
        "1",
        "0",
        call=quantize,
        granularity="token",
        static_scale=1.0,
    ),
    case("quantized data", "data", TYPE, "dtype", "float32", "int8", call=heddle.QuantizedTensor, data=K, scale=ONE),
    case(
        "quantized scale",
        "scale",
        TYPE,
        "dtype",
        "float64",
        "float32",
        call=heddle.QuantizedTensor,
        data=K.astype(np.int8),
        scale=ONE.astype(np.float64),
    ),
    case("window left", "left", VALUE, "value", "-1", "0", call=heddle.select.window, left=-1),
    case("window right", "right", VALUE, "value", "-2", "0", call=heddle.select.window, left=1, right=-2),
    case("window n_global", "n_global", VALUE, "value", "-3", "0", call=heddle.select.window, left=1, n_global=-3),
    case("window of text", "left", TYPE, "dtype", "str", "integer", call=heddle.select.window, left="1"),
    case("strided width", "width", VALUE, "value", "-1", "0", call=heddle.select.strided, width=-1, stride=1),
    case("strided stride", "stride", VALUE, "value", "0", "1", call=heddle.select.strided, width=1, stride=0),
    case("mask dtype", "mask", TYPE, "dtype", "float32", "bool", call=heddle.select.block_mask, mask=Q[0, 0]),
    case(
        "mask rank", "mask", VALUE, "shape", "rank 1", "[nQ, nK]", call=heddle.select.block_mask, mask=np.ones(3, bool)
    ),
    case("mask block", "block", VALUE, "value", "0", "1", call=heddle.select.block_mask, mask=MASK, block=(0, 8)),
    case(
        "mask block of three",
        "block",
        VALUE,
        "value",
        "3",
        "(queries, keys)",
        call=heddle.select.block_mask,
        mask=MASK,
        block=(1, 2, 3),
    ),
    case(
        "tokens of int64",
        "indices",
        TYPE,
        "dtype",
        "int64",
        "int32",
        call=heddle.select.tokens,
        indices=LIST.astype(np.int64),
    ),
    case("tokens rank", "indices", VALUE, "shape", "rank 2", "[B, Hkv, n]", call=heddle.select.tokens, indices=LIST[0]),
    case(
        "lengths of int64",
        "lengths",
        TYPE,
        "dtype",
        "int64",
        "int32",
        call=heddle.select.tokens,
        indices=LIST,
        lengths=LIST[..., 0].astype(np.int64),
    ),
    case("threads", "n", VALUE, "value", "-1", "0", call=heddle.set_num_threads, n=-1),
    case("threads of text", "n", TYPE, "dtype", "str", "integer", call=heddle.set_num_threads, n="2"),
    case("instruction set", "name", VALUE, "value", "'mmx'", "portable", call=heddle.set_host_isa, name="mmx"),
    case("schedule kind", "schedule", VALUE, "value", "'fast'", "stealing", call=heddle.Schedule, kind="fast"),
    case("schedule split", "split_size", VALUE, "value", "-1", "0", call=heddle.Schedule, split_size=-1),
]


@pytest.mark.parametrize(("changes", "argument", "exception", "code", "given", "allowed"), OTHERS)
def test_other_functions(changes, argument, exception, code, given, allowed):
    changes = dict(changes)
    call = changes.pop("call")
    expect(lambda: call(**changes), argument, exception, code, given, allowed)


def test_errors_are_the_kinds_that_python_knows():
    assert issubclass(HeddleValueError, ValueError)
    assert issubclass(HeddleTypeError, TypeError)
    assert issubclass(HeddleNotImplementedError, NotImplementedError)
    assert issubclass(heddle.HeddleRuntimeError, RuntimeError)


def test_errors_survive_pickling():
    with pytest.raises(HeddleValueError) as caught:
        heddle.attention(Q, K, V, softcap=-1.0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (HeddleValueError, str(caught.value))
    assert (again.code, again.argument) == ("value", "softcap")


def test_unsupported_says_what_is_missing_and_who_has_it():
    with pytest.raises(HeddleNotImplementedError, match=r"float64.*reference"):
        heddle.attention(*(x.astype(np.float64) for x in (Q, K, V)), backend="host")
