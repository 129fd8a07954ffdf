"""heddle inside transformers' models on a GPU: the numbers of the same model on the host."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")

import heddle  # noqa: E402
import heddle.hf  # noqa: E402
from tiny_model import make_model, text  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("sm90" not in heddle.available_backends(), reason="needs a Hopper GPU and a build with CUDA"),
]

PROMPT = 300


def run(device, cache_format, **options):
    """Logits of a prompt, of a chunk and of single tokens behind it, float32 on the CPU."""
    heddle.hf.register()
    model = make_model(head_dim=64).to(device)
    model.set_attn_implementation("heddle")
    ids = text(3).to(device)
    cache = heddle.hf.HeddleCache(ids.shape[1], format=cache_format)
    bounds = [0, PROMPT, PROMPT + 7, *range(PROMPT + 8, ids.shape[1] + 1)]
    with torch.inference_mode(), heddle.hf.options(**options):
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
        alone = model(ids).logits
    return torch.cat(parts, 1).cpu(), alone.cpu()


@pytest.mark.parametrize("name", ["dense", "window", "strided", "int8-baseline", "int8-a", "int8-b", "fp8"])
def test_a_model_on_a_gpu_is_the_model_on_the_host(name):
    selections = {"window": heddle.select.window(63, n_global=8), "strided": heddle.select.strided(32, 4)}
    options = {"selection": selections.get(name), "kv_format": name if name.startswith(("int8", "fp8")) else None}
    expected = run("cpu", options["kv_format"] or "fp32", **options)
    got = run("cuda", options["kv_format"] or "fp16", dtype=torch.float16, **options)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_smoothed_keys_on_a_gpu_are_refused():
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^smooth: smoothed keys on a GPU"):
        run("cuda", "fp16", dtype=torch.float16, kv_format="int8-b", smooth=True)
