"""Torch tensors on a GPU: results beside them, on the stream that is current."""

import numpy as np
import pytest
import torch

import heddle
from arrays import normal, to_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("sm90" not in heddle.available_backends(), reason="needs a Hopper GPU and a build with CUDA"),
]


@pytest.fixture
def parts(rng):
    return to_torch(normal(rng, 3, 2, 500, 4, 64)), to_torch(normal(rng, 3, 2, 4, 500))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge(parts, dtype):
    outs, lses = parts[0].to(dtype), parts[1]
    expected, expected_lse = heddle.merge(outs, lses, backend="reference")
    out, lse = heddle.merge(outs.cuda(), lses.cuda())
    assert heddle.last_kernel().startswith("sm90/merge")
    assert out.device == lse.device == torch.device("cuda", 0)
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected_lse)
    strided = outs.cuda().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(heddle.merge(strided, lses.cuda())[0], out, rtol=0, atol=0)


def test_merge_runs_on_the_current_stream(parts):
    """Behind work that is still running on that stream, and without waiting for it."""
    outs, lses = (x.cuda() for x in parts)
    expected = heddle.merge(outs, lses)[0]
    late = torch.zeros_like(outs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(outs)
        out = heddle.merge(late, lses)[0]
        waited = stream.query()
    assert not waited
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_merge_in_a_graph(parts):
    outs, lses = (x.cuda() for x in parts)
    expected = heddle.merge(outs, lses)[0]
    given = torch.zeros_like(outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = heddle.merge(given, lses)[0]
    given.copy_(outs)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_other_libraries_read_through_dlpack(parts):
    cupy = pytest.importorskip("cupy")
    outs, lses = (x.cuda() for x in parts)
    with pytest.raises(heddle.HeddleNotImplementedError, match="only for torch"):
        heddle.merge(cupy.asarray(outs), cupy.asarray(lses))


def test_devices_do_not_mix(parts):
    outs, lses = parts
    with pytest.raises(heddle.HeddleValueError) as caught:
        heddle.merge(outs.cuda(), lses)
    assert (caught.value.argument, caught.value.code) == ("lses", "device")
    with pytest.raises(heddle.HeddleNotImplementedError, match="CUDA"):
        heddle.attention(*[outs[0].cuda()] * 3, backend="host")
    with pytest.raises(heddle.HeddleNotImplementedError, match="cpu"):
        heddle.select.topk(*[outs[0].cuda()] * 3, 4)
    with pytest.raises(heddle.HeddleTypeError):
        heddle.merge(outs.cuda(), np.zeros((3, 2, 4, 500), np.float32))


FORMATS = ["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"]
PARTS = ("k", "v", "k_scale", "v_scale")


def supported(call, *arguments, **options):
    """The call, or a skip where this backend does not have it yet."""
    try:
        return call(*arguments, **options)
    except heddle.HeddleNotImplementedError as error:
        pytest.skip(str(error))


def caches(format, **options):
    partition = {"partition": 4} if format == "int8-a" else {}
    return [heddle.KVCache(12, 16, 2, 64, format=format, device=d, **partition, **options) for d in ("cpu", "cuda")]


def as_bytes(part):
    part = part.cpu().contiguous().view(torch.uint8).numpy() if isinstance(part, torch.Tensor) else part
    return part.view(np.uint8)


@pytest.fixture
def table():
    return torch.randperm(12, generator=torch.Generator().manual_seed(0)).reshape(3, 4).int()


@pytest.mark.parametrize("format", FORMATS)
def test_append(rng, table, format):
    """The bits of the host's cache, and views of them as tensors of the GPU."""
    host, gpu = caches(format)
    assert (gpu.device, gpu.nbytes) == ("cuda:0", host.nbytes)
    start, gpu_start = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32, device="cuda")
    for n in (20, 1, 5):
        k, v = (to_torch(normal(rng, 3, n, 2, 64)).bfloat16() for _ in range(2))
        start = host.append(k, v, table, start)
        gpu_start = gpu.append(k.cuda(), v.cuda(), table.cuda(), gpu_start)
        assert gpu_start.is_cuda
        assert torch.equal(gpu_start.cpu(), start)
    for name in PARTS:
        expected, got = getattr(host, name), getattr(gpu, name)
        assert (expected is None) == (got is None)
        if got is not None:
            assert got.is_cuda
            np.testing.assert_array_equal(as_bytes(got), as_bytes(expected), err_msg=name)
    torch.testing.assert_close(gpu.value_norms.cpu(), to_torch(host.value_norms), rtol=2e-7, atol=0)
    assert (gpu.saturated, gpu.saturation.item()) == (host.saturated, host.saturated)
    assert gpu.kv_calibrated


def test_storage_outlives_the_cache(rng, table):
    gpu = caches("bf16")[1]
    k = to_torch(normal(rng, 3, 1, 2, 64)).bfloat16().cuda()
    gpu.append(k, k, table.cuda(), torch.zeros(3, dtype=torch.int32, device="cuda"))
    keys = gpu.k
    expected = keys.clone()
    del gpu
    torch.cuda.synchronize()
    others = [heddle.KVCache(12, 16, 2, 64, device="cuda") for _ in range(4)]
    assert torch.equal(keys, expected)
    assert all(other.k.data_ptr() != keys.data_ptr() for other in others)


def test_append_and_decode_in_a_graph(rng, table):
    """Captured once; lengths advance on the device between replays."""
    host, gpu = caches("bf16")
    table_gpu = table.cuda()
    q, k, v = (torch.zeros(3, 1, h, 64, dtype=torch.bfloat16, device="cuda") for h in (8, 2, 2))
    start = torch.zeros(3, dtype=torch.int32, device="cuda")
    seq_lens = gpu.append(k, v, table_gpu, start)
    supported(heddle.decode, q, gpu, table_gpu, seq_lens)
    start.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seq_lens = gpu.append(k, v, table_gpu, start)
        out = heddle.decode(q, gpu, table_gpu, seq_lens)
        start.copy_(seq_lens)
    host_start = torch.zeros(3, dtype=torch.int32)
    for _ in range(40):
        new = [to_torch(normal(rng, 3, 1, h, 64)).bfloat16() for h in (8, 2, 2)]
        for x, given in zip((q, k, v), new, strict=True):
            x.copy_(given)
        graph.replay()
        host_start = host.append(new[1], new[2], table, host_start)
        expected = heddle.decode(new[0], host, table, host_start, backend="reference")
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)
    assert start.tolist() == [40] * 3


def test_calls_run_on_the_current_stream(rng, table):
    """Behind work that is still running on that stream, and without waiting for it."""
    gpu = caches("bf16")[1]
    table_gpu, start = table.cuda(), torch.zeros(3, dtype=torch.int32, device="cuda")
    k = to_torch(normal(rng, 3, 2, 2, 64)).bfloat16().cuda()
    gpu.append(torch.zeros_like(k), torch.zeros_like(k), table_gpu, start)
    late = torch.zeros_like(k)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(k)
        seq_lens = gpu.append(late, late, table_gpu, start)
        waited = stream.query()
    assert not waited
    stream.synchronize()
    assert seq_lens.tolist() == [2, 2, 2]
    assert torch.equal(gpu.k[table_gpu[1, 0].long(), :, :2], k[1].transpose(0, 1))


def test_validation_names_the_request(rng, table):
    gpu = caches("bf16")[1]
    k = to_torch(normal(rng, 3, 2, 2, 64)).bfloat16().cuda()
    q = to_torch(normal(rng, 3, 1, 4, 64)).bfloat16().cuda()
    start = torch.zeros(3, dtype=torch.int32, device="cuda")
    bad_table = table.clone()
    bad_table[2, 0] = 99
    heddle.set_validation(True)
    try:
        assert heddle.validation()
        with pytest.raises(heddle.HeddleValueError, match="99 of request 2"):
            gpu.append(k, k, bad_table.cuda(), start)
        seq_lens = gpu.append(k, k, table.cuda(), start)
        with pytest.raises(heddle.HeddleValueError, match="99 of request 2"):
            heddle.decode(q, gpu, bad_table.cuda(), seq_lens)
        with pytest.raises(heddle.HeddleValueError, match="65 for request 1") as caught:
            heddle.decode(q, gpu, table.cuda(), torch.tensor([2, 65, 2], dtype=torch.int32, device="cuda"))
        assert (caught.value.argument, caught.value.code) == ("seq_lens", "capacity")
        indices = torch.tensor([1, 0], dtype=torch.int32, device="cuda").expand(3, 2, 2)
        with pytest.raises(heddle.HeddleValueError, match="ascending"):
            heddle.decode(q, gpu, table.cuda(), seq_lens, selection=heddle.select.tokens(indices))
        cu_seqlens = torch.tensor([0, 2, 1], dtype=torch.int32, device="cuda")
        with pytest.raises(heddle.HeddleValueError, match="entry 2 is 1"):
            heddle.attention(q[:, 0], k[:, 0], k[:, 0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    finally:
        heddle.set_validation(False)


def test_tables_of_the_host_are_refused(rng, table):
    gpu = caches("bf16")[1]
    k = to_torch(normal(rng, 3, 2, 2, 64)).bfloat16().cuda()
    with pytest.raises(heddle.HeddleValueError) as caught:
        gpu.append(k, k, table, torch.zeros(3, dtype=torch.int32, device="cuda"))
    assert (caught.value.argument, caught.value.code) == ("block_table", "device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (40, 0)}], ids=str)
def test_attention(rng, dtype, options):
    q, k, v = (to_torch(normal(rng, 2, s, h, 128)).to(dtype) for s, h in ((300, 8), (333, 2), (333, 2)))
    expected, expected_lse = heddle.attention(q, k, v, return_lse=True, backend="reference", **options)
    out, lse = supported(heddle.attention, q.cuda(), k.cuda(), v.cuda(), return_lse=True, **options)
    assert heddle.last_kernel().startswith("sm90/attention")
    assert (out.is_cuda, out.dtype) == (True, dtype)
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_decode(rng, table, format):
    host, gpu = caches(format)
    k, v = (to_torch(normal(rng, 3, 50, 2, 64)).bfloat16() for _ in range(2))
    q = to_torch(normal(rng, 3, 2, 8, 64)).to(torch.float16 if format == "fp16" else torch.bfloat16)
    for cache in (host, gpu):
        where = cache.device
        cache.calibrate(k.to(where), v.to(where), q.to(where))
        seq_lens = cache.append(k.to(where), v.to(where), table.to(where), torch.zeros(3, dtype=torch.int32).to(where))
    lengths = torch.tensor([50, 0, 17], dtype=torch.int32)
    expected, expected_lse = heddle.decode(q, host, table, lengths, return_lse=True, backend="reference")
    out, lse = supported(heddle.decode, q.cuda(), gpu, table.cuda(), lengths.cuda(), return_lse=True)
    assert heddle.last_kernel().startswith("sm90/decode")
    assert seq_lens.tolist() == [50, 50, 50]
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
@pytest.mark.parametrize("options", [{}, {"window": (90, 0)}, {"schedule": heddle.Schedule(split_size=64)}], ids=str)
def test_page_lists(rng, format, page_size, options):
    """Pages that each KV head chose, the last of a request short, padded or with lengths."""
    pages = 256 // page_size
    partition = {"partition": min(4, page_size)} if format == "int8-a" else {}
    host, gpu = (
        heddle.KVCache(3 * pages, page_size, 2, 64, format=format, device=d, **partition) for d in ("cpu", "cuda")
    )
    table = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(1)).reshape(3, pages).int()
    k, v = (to_torch(normal(rng, 3, 203, 2, 64)).bfloat16() for _ in range(2))
    q = to_torch(normal(rng, 3, 2, 6, 64)).to(torch.float16 if format == "fp16" else torch.bfloat16)
    for cache in (host, gpu):
        where = cache.device
        cache.calibrate(k.to(where), v.to(where), q.to(where))
        cache.append(k.to(where), v.to(where), table.to(where), torch.zeros(3, dtype=torch.int32).to(where))
    seq_lens = torch.tensor([203, 0, 130], dtype=torch.int32)
    indices = torch.full((3, 2, pages), -1, dtype=torch.int32)
    lengths = torch.zeros(3, 2, dtype=torch.int32)
    for b, head in np.ndindex(3, 2):
        there = -(-int(seq_lens[b]) // page_size)
        chosen = np.flatnonzero(rng.random(there) < 0.6)
        indices[b, head, : len(chosen)] = to_torch(chosen.astype(np.int32))
        lengths[b, head] = len(chosen)
    expected, expected_lse = heddle.decode(
        q,
        host,
        table,
        seq_lens,
        selection=heddle.select.page_list(indices),
        return_lse=True,
        backend="reference",
        **options,
    )
    garbage = torch.where(indices < 0, 0x7FFFFFFF, indices)
    for given in (
        heddle.select.page_list(indices.cuda()),
        heddle.select.page_list(garbage.cuda(), lengths.cuda()),
    ):
        out, lse = heddle.decode(
            q.cuda(), gpu, table.cuda(), seq_lens.cuda(), selection=given, return_lse=True, **options
        )
        assert heddle.last_kernel().startswith("sm90/decode")
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-3, atol=1e-3)


def test_page_lists_are_validated(rng, table):
    gpu = caches("bf16")[1]
    q = to_torch(normal(rng, 3, 1, 4, 64)).bfloat16().cuda()
    seq_lens = torch.tensor([33, 5, 64], dtype=torch.int32, device="cuda")
    heddle.set_validation(True)
    try:
        for pages, message in (([2, 1], "page 1 at 1 of request 0, KV head 0 follows 2"), ([0, 3], "page 3 at 1")):
            selection = heddle.select.page_list(torch.tensor(pages, dtype=torch.int32, device="cuda").expand(3, 2, 2))
            with pytest.raises(heddle.HeddleValueError, match=message) as caught:
                heddle.decode(q, gpu, table.cuda(), seq_lens, selection=selection)
            assert caught.value.argument == "indices"
    finally:
        heddle.set_validation(False)


@pytest.mark.parametrize("format", FORMATS[3:])
def test_quality_is_the_hosts(rng, format):
    """The same error of a quantized cache, within rounding, whoever decodes."""
    table, zero = torch.arange(16, dtype=torch.int32).reshape(1, 16), torch.zeros(1, dtype=torch.int32)
    k, v = (to_torch(normal(rng, 1, 1000, 2, 64)).bfloat16() for _ in range(2))
    q = to_torch(normal(rng, 1, 16, 8, 64)).bfloat16()
    exact = heddle.attention(q, k, v, causal=True, backend="reference").float()
    errors = []
    for device in ("cpu", "cuda"):
        cache = heddle.KVCache(16, 64, 2, 64, format=format, device=device)
        cache.calibrate(k.to(device), v.to(device), q.to(device))
        seq_lens = cache.append(k.to(device), v.to(device), table.to(device), zero.to(device))
        out = supported(heddle.decode, q.to(device), cache, table.to(device), seq_lens).cpu().float()
        errors.append((torch.linalg.vector_norm(out - exact) / torch.linalg.vector_norm(exact)).item())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_plan_for_the_layers_of_a_step(rng, table):
    """Made once a step and captured with it, it follows the lengths and gives the bits that decode gives alone."""
    gpu = caches("bf16")[1]
    table_gpu = table.cuda()
    k = to_torch(normal(rng, 3, 60, 2, 64)).bfloat16().cuda()
    q = to_torch(normal(rng, 3, 1, 8, 64)).bfloat16().cuda()
    seq_lens = gpu.append(k, k, table_gpu, torch.zeros(3, dtype=torch.int32, device="cuda"))
    expected = supported(heddle.decode, q, gpu, table_gpu, seq_lens)
    plan = heddle.plan_decode(q, gpu, table_gpu, seq_lens)
    for _ in range(3):
        assert torch.equal(heddle.decode(q, gpu, table_gpu, seq_lens, plan=plan), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        heddle.plan_decode(q, gpu, table_gpu, seq_lens, plan=plan)
        outs = [heddle.decode(q, gpu, table_gpu, seq_lens, plan=plan) for _ in range(3)]
    for lengths in ([60, 60, 60], [1, 0, 60], [33, 59, 2]):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = heddle.decode(q, gpu, table_gpu, seq_lens)
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_cascade(rng, format):
    """Two levels of shared prefixes, captured once, with lengths that change between replays."""
    host, gpu = caches(format)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).int()
    # A prefix of two pages for all, two of two and one for some, and own tokens of one page a request.
    tables = [table[:2].reshape(1, 2), table[2:6].reshape(2, 2), table[6:10].reshape(4, 1)]
    for t in tables:
        k, v = (to_torch(normal(rng, len(t), t.shape[1] * 16, 2, 64)).bfloat16() for _ in range(2))
        start = torch.zeros(len(t), dtype=torch.int32)
        host.append(k, v, t, start)
        gpu.append(k.cuda(), v.cuda(), t.cuda(), start.cuda())
    q = to_torch(normal(rng, 4, 2, 8, 64)).to(torch.float16 if format == "fp16" else torch.bfloat16)
    sinks = to_torch(normal(rng, 8))
    cu = [None, [0, 1, 4]]

    def lens(own, shared, middle):
        return [torch.tensor(x, dtype=torch.int32) for x in (shared, middle, own)]

    steps = [lens([16, 2, 9, 7], [32], [32, 5]), lens([3, 4, 16, 2], [1], [0, 17]), lens([2, 2, 2, 2], [0], [31, 32])]
    device = [x.cuda() for x in steps[0]]
    options = {"sinks": sinks.cuda(), "softcap": 5.0, "return_lse": True}

    def call():
        prefixes = [(tables_gpu[i], device[i], cu[i]) for i in range(2)]
        return heddle.decode_cascade(q_gpu, gpu, tables_gpu[2], device[2], prefixes, **options)

    tables_gpu, q_gpu = [t.cuda() for t in tables], q.cuda()
    supported(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for step in steps:
        for x, y in zip(device, step, strict=True):
            x.copy_(y)
        graph.replay()
        prefixes = [(tables[i], step[i], cu[i]) for i in range(2)]
        expected, expected_lse = heddle.decode_cascade(
            q, host, tables[2], step[2], prefixes, backend="reference", **options | {"sinks": sinks}
        )
        torch.testing.assert_close(out.cpu(), expected, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-2, atol=1e-2)


# Offsets beyond 2^31 elements, and a row of a million keys.
@pytest.mark.parametrize(("heads", "dim", "options"), [(1, 64, {}), (20, 128, {"window": (1023, 0)})], ids=str)
def test_a_million_tokens(heads, dim, options):
    tokens = 1 << 20
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = supported(heddle.attention, q, k, v, causal=True, **options)
    for row in (0, 1, 127, 65_537, tokens - 1):
        for head in {0, heads - 1}:
            begin = max(0, row - 1023) if options else 0
            keys, values = (x[0, begin : row + 1, head].double() for x in (k, v))
            weights = torch.softmax(keys @ q[0, row, head].double() / dim**0.5, dim=0)
            expected = weights @ values
            assert (out[0, row, head] - expected).norm() < 0.01 * expected.norm()
