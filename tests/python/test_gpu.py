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
        heddle.attention(*[outs[0].cuda()] * 3)
    with pytest.raises(heddle.HeddleTypeError):
        heddle.merge(outs.cuda(), np.zeros((3, 2, 4, 500), np.float32))
