"""heddle.torch: the operators are what the functions of heddle are, and what torch.compile can take."""

import numpy as np
import pytest
import torch

import heddle
import heddle.torch as ops
from arrays import normal, to_torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = ["bf16", "fp16", "int8-a", "int8-b", "int8-baseline", "fp8"]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and "sm90" not in heddle.available_backends():
        pytest.skip("needs a Hopper GPU and a build with CUDA")
    return request.param


@pytest.fixture(autouse=True)
def compiler():
    """What one test compiled does not count against the next."""
    torch.compiler.reset()


def tensors(rng, device, *shapes, dtype=torch.bfloat16):
    return [to_torch(normal(rng, *shape)).to(device, dtype) for shape in shapes]


def supported(call, *arguments, **options):
    """The call, or a skip where this GPU backend does not have it yet."""
    try:
        return call(*arguments, **options)
    except heddle.HeddleNotImplementedError as error:
        pytest.skip(str(error))


def check(operator, *arguments):
    torch.library.opcheck(operator, arguments)


MASKS = {
    "none": {},
    "window": {"window": (5, 0)},
    "left": {"window": 4},
    "options": {"softcap": 5.0, "scale": 0.2, "sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
    "select_window": {"select_window": (3, None, 2)},
    "strided": {"strided": (2, 3)},
    "block_mask": {"block_mask": (torch.arange(12).reshape(3, 4) % 3 != 1, (8, 8))},
    "tokens": {"tokens": torch.arange(6, dtype=torch.int32).expand(2, 2, 6)},
    "tokens and lengths": {
        "tokens": (
            torch.arange(6, dtype=torch.int32).expand(2, 2, 6),
            torch.tensor([[1, 2], [3, 6]], dtype=torch.int32),
        )
    },
}


def plain(options):
    """The same options as heddle.attention takes them."""
    options = dict(options)
    if "select_window" in options:
        options["selection"] = heddle.select.window(*options.pop("select_window"))
    if "strided" in options:
        options["selection"] = heddle.select.strided(*options.pop("strided"))
    if "block_mask" in options:
        options["selection"] = heddle.select.block_mask(*options.pop("block_mask"))
    if "tokens" in options:
        tokens = options.pop("tokens")
        options["selection"] = heddle.select.tokens(*(tokens if isinstance(tokens, tuple) else (tokens,)))
    return options


def moved(options, device):
    def move(x):
        if isinstance(x, tuple):
            return tuple(map(move, x))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {name: move(value) for name, value in options.items()}


@pytest.mark.parametrize("mask", MASKS)
def test_attention(rng, device, mask):
    q, k, v = tensors(rng, device, (2, 17, 4, 64), (2, 30, 2, 64), (2, 30, 2, 64))
    options = moved(MASKS[mask], device)
    expected, expected_lse = supported(heddle.attention, q, k, v, causal=True, return_lse=True, **plain(options))
    out, lse = ops.attention(q, k, v, causal=True, return_lse=True, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True, **options), expected, rtol=0, atol=0)
    compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, causal=True, **options), expected, rtol=0, atol=0)


def test_packed_attention(rng, device):
    q, k, v = tensors(rng, device, (20, 4, 64), (31, 2, 64), (31, 2, 64))
    cu_q = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 9, 9, 31], dtype=torch.int32, device=device)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True, "return_lse": True}
    expected, expected_lse = supported(heddle.attention, q, k, v, **options)
    out, lse = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)


def calibrated(rng, format, device, **options):
    cache = heddle.KVCache(8, 16, 2, 64, format=format, device=device, **options)
    k, v, q = tensors(rng, device, (2, 5, 2, 64), (2, 5, 2, 64), (2, 5, 4, 64))
    cache.calibrate(k, v, q)
    return cache


def steps(rng, device):
    table = torch.randperm(8, generator=torch.Generator().manual_seed(1)).reshape(2, 4).int().to(device)
    start = torch.zeros(2, dtype=torch.int32, device=device)
    return table, start, [tensors(rng, device, (2, n, 4, 64), (2, n, 2, 64), (2, n, 2, 64)) for n in (20, 1, 1, 3)]


@pytest.mark.parametrize("format", FORMATS)
def test_append_and_decode(rng, device, format):
    """Steps through compiled operators leave the same cache and results as the methods."""
    partition = {"partition": 4} if format == "int8-a" else {}
    seed = rng.bit_generator.state
    plain_cache = calibrated(rng, format, device, **partition)
    rng.bit_generator.state = seed
    cache = calibrated(rng, format, device, **partition)
    parts = ops.tensors_of(cache)
    assert all(part.data_ptr() == ops.tensors_of(cache)[i].data_ptr() for i, part in enumerate(parts[:4]))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, v, cache, table, start):
        seq_lens = ops.append(k, v, cache, table, start)
        return (*ops.decode(q, cache, table, seq_lens, return_lse=True), seq_lens)

    table, start, inputs = steps(rng, device)
    expected_start = start
    for q, k, v in inputs:
        expected_start = plain_cache.append(k, v, table, expected_start)
        expected, expected_lse = supported(heddle.decode, q, plain_cache, table, expected_start, return_lse=True)
        out, lse, start = step(q, k, v, parts, table, start)
        torch.testing.assert_close(start, expected_start, rtol=0, atol=0)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    for part, expected in zip(parts[:6], ops.tensors_of(plain_cache)[:6], strict=True):
        if part is not None:
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
    assert cache.saturated == plain_cache.saturated


def cascade(rng, device):
    """A cache of two requests, their queries and own tokens, one prefix of both and a level with one for each."""
    cache = calibrated(rng, "bf16", device)
    table, start, inputs = steps(rng, device)
    _, k, v = inputs[0]
    cache.append(k, v, table, start)
    (q,) = tensors(rng, device, (2, 1, 4, 64))
    lens = torch.tensor([[16], [7]], dtype=torch.int32, device=device)
    shared = heddle.SharedPrefix(table[:1, :1], lens[0])
    own = heddle.SharedPrefix(table[:, 1:2], torch.cat([lens[1], lens[1] - 7]), [0, 1, 2])
    return q, cache, table[:, 2:], torch.tensor([3, 4], dtype=torch.int32, device=device), [shared, own]


def test_decode_cascade(rng, device):
    q, cache, table, lens, prefixes = cascade(rng, device)
    options = {"softcap": 3.0, "return_lse": True}
    expected, expected_lse = supported(heddle.decode_cascade, q, cache, table, lens, prefixes, **options)
    parts = ops.tensors_of(cache)
    for call in (ops.decode_cascade, torch.compile(ops.decode_cascade, backend="aot_eager", fullgraph=True)):
        out, lse = call(q, parts, table, lens, prefixes, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
        without = call(q, parts, table, lens, prefixes, softcap=3.0)
        torch.testing.assert_close(without, expected, rtol=0, atol=0)
        alone = call(q, parts, table, lens, [])
        torch.testing.assert_close(alone, heddle.decode(q, cache, table, lens), rtol=0, atol=0)
    for numbers in ([0, 1, 2, 2], [0, 2]):
        with pytest.raises(heddle.HeddleValueError) as caught:
            ops.decode_cascade(q, parts, table, lens, [prefixes[1]._replace(cu_requests=numbers), prefixes[0]])
        assert caught.value.argument == "prefixes[0].block_table"


def test_page_lists(rng, device):
    q, cache, table, _, _ = cascade(rng, device)
    table = torch.cat([table, table], 1)
    lens = torch.tensor([40, 64], dtype=torch.int32, device=device)
    indices = torch.tensor([[[0, 2]], [[1, 3]]], dtype=torch.int32, device=device)
    counts = torch.tensor([[1], [2]], dtype=torch.int32, device=device)
    parts = ops.tensors_of(cache)
    compiled = torch.compile(ops.decode, backend="aot_eager", fullgraph=True)
    for pages in (indices, (indices, counts)):
        selection = heddle.select.page_list(*(pages if isinstance(pages, tuple) else (pages,)))
        expected = supported(heddle.decode, q, cache, table, lens, selection=selection)
        torch.testing.assert_close(compiled(q, parts, table, lens, pages=pages), expected, rtol=0, atol=0)


def test_packed_append(rng, device):
    cache, plain_cache = (heddle.KVCache(8, 16, 2, 64, device=device) for _ in range(2))
    k, v = tensors(rng, device, (12, 2, 64), (12, 2, 64))
    table, start, _ = steps(rng, device)
    cu_seqlens = torch.tensor([0, 3, 11], dtype=torch.int32, device=device)
    seq_lens = ops.append(k, v, ops.tensors_of(cache), table, start, cu_seqlens=cu_seqlens)
    assert seq_lens.tolist() == [3, 8]
    plain_cache.append(k, v, table, start, cu_seqlens=cu_seqlens)
    assert torch.equal(ops.tensors_of(cache).k, ops.tensors_of(plain_cache).k)


@pytest.mark.parametrize(
    "case", ["attention", "packed", "block mask", "decode", "int8 decode", "cascade", "append", "int8 append", "merge"]
)
def test_opcheck(rng, device, case):
    """Schema, fake kernels, autograd registration and tracing, as PyTorch's own checker sees them."""
    q, k, v = tensors(rng, device, (2, 17, 4, 64), (2, 30, 2, 64), (2, 30, 2, 64))
    none = (True, None, None, 0.0, None, None, "", [], [], True, "auto", "auto", 0)
    library = torch.ops.heddle
    if case == "attention":
        supported(library.attention, q, k, v, None, None, *none)
        check(library.attention.default, q, k, v, None, None, *none)
        check(library.attention.default, q, k, v, None, None, *none[:9], False, *none[10:])
    elif case == "packed":
        cu_seqlens = torch.tensor([0, 7, 17], dtype=torch.int32, device=device)
        arguments = (q[0], k[0], v[0], cu_seqlens, cu_seqlens, *none)
        supported(library.attention, *arguments)
        check(library.attention.default, *arguments)
    elif case == "block mask":
        mask = torch.ones(3, 4, dtype=torch.bool, device=device)
        arguments = (q, k, v, None, None, *none[:6], "block_mask", [8, 8], [mask], *none[9:])
        supported(library.attention, *arguments)
        check(library.attention.default, *arguments)
    elif case == "cascade":
        q, cache, table, lens, prefixes = cascade(rng, device)
        levels = [p.block_table for p in prefixes], [p.seq_lens for p in prefixes], [0, 2, 0, 1, 2], [2, 3]
        options = (True, 0.0, None, None, True, "auto", "auto", 0)
        arguments = (q, table, lens, *ops.tensors_of(cache), *levels, *options)
        supported(library.decode_cascade, *arguments)
        check(library.decode_cascade.default, *arguments)
    elif case == "merge":
        outs, lses = tensors(rng, device, (3, 2, 5, 4, 64), (3, 2, 4, 5), dtype=torch.float32)
        check(library.merge.default, outs, lses, "auto")
    else:
        cache = ops.tensors_of(calibrated(rng, "int8-a" if "int8" in case else "bf16", device))
        table, start, inputs = steps(rng, device)
        arguments = (inputs[0][1], inputs[0][2], table, start, None, *cache)
        if "append" in case:
            check(library.append.default, *arguments)
        else:
            seq_lens = library.append(*arguments)
            supported(library.decode, q, table, seq_lens, *cache, *none)
            check(library.decode.default, q, table, seq_lens, *cache, *none)


def test_gradients_do_not_pass(rng):
    q, k, v = tensors(rng, "cpu", (1, 3, 2, 16), (1, 3, 2, 16), (1, 3, 2, 16))
    out = ops.attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match=r"does not require grad|autograd"):
        out.float().sum().backward()


def test_refusals(rng):
    q, k, v = tensors(rng, "cpu", (1, 3, 2, 16), (1, 3, 2, 16), (1, 3, 2, 16))
    with pytest.raises(heddle.HeddleValueError, match="selection: several"):
        ops.attention(q, k, v, strided=(1, 2), tokens=torch.zeros(1, 2, 1, dtype=torch.int32))
    with pytest.raises(heddle.HeddleValueError, match="calibrate"):
        ops.tensors_of(heddle.KVCache(4, 16, 2, 16, format="int8-b"))
    with pytest.raises(heddle.HeddleValueError) as caught:
        ops.attention(q, k[..., :8], v)
    assert caught.value.argument == "k"


def test_a_cache_over_the_callers_arrays(rng):
    """KVCache.over works in place, checks its parts, and keeps them alive."""
    own = heddle.KVCache(4, 8, 2, 16, format="int8-a")
    parts = {
        name: np.zeros_like(getattr(own, name))
        for name in ("k", "v", "value_norms", "saturation", "k_scale", "v_scale")
    }
    k, v = normal(rng, 2, 9, 2, 16), normal(rng, 2, 9, 2, 16)
    table, start = np.arange(4, dtype=np.int32).reshape(2, 2), np.zeros(2, np.int32)
    for cache in (own, heddle.KVCache.over(**parts, format="int8-a")):
        cache.append(k, v, table, start)
    for name, part in parts.items():
        np.testing.assert_array_equal(part, getattr(own, name), err_msg=name)
    again = heddle.KVCache.over(**parts, format="int8-a")
    seq_lens = np.full(2, 9, np.int32)
    q = normal(rng, 2, 1, 4, 16)
    np.testing.assert_array_equal(heddle.decode(q, again, table, seq_lens), heddle.decode(q, own, table, seq_lens))
    for name, bad in (
        ("v", parts["v"][:, :1]),
        ("k_scale", parts["k_scale"].astype(np.float64)),
        ("value_norms", np.zeros((2, 4, 8), np.float32).transpose(1, 0, 2)),
        ("q_scale", np.zeros(1, np.float32)),
        ("v_scale", None),
    ):
        with pytest.raises(heddle.HeddleError) as caught:
            heddle.KVCache.over(**{**parts, name: bad}, format="int8-a")
        assert caught.value.argument == name
    read_only = parts["k"].view()
    read_only.flags.writeable = False
    with pytest.raises(heddle.HeddleValueError, match="read-only"):
        heddle.KVCache.over(**{**parts, "k": read_only}, format="int8-a")
