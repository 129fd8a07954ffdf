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


def run(device, cache_format, layers=3, **options):
    """Logits of a prompt, of a chunk and of single tokens behind it, and of all without a cache, float32 on the CPU."""
    heddle.hf.register()
    model = make_model(layers, head_dim=64).to(device)
    model.set_attn_implementation("heddle")
    ids = text(3).to(device)
    cache = heddle.hf.HeddleCache(ids.shape[1], format=cache_format)
    bounds = [0, PROMPT, PROMPT + 7, *range(PROMPT + 8, ids.shape[1] + 1)]
    with torch.inference_mode(), heddle.hf.options(**options):
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
        alone = model(ids).logits
    return torch.cat(parts, 1).cpu(), alone.cpu()


def assert_close(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.01


@pytest.mark.parametrize(
    "selection",
    [None, heddle.select.window(63, n_global=8), heddle.select.strided(32, 4)],
    ids=["dense", "window", "strided"],
)
def test_a_model_on_a_gpu_is_the_model_on_the_host(selection):
    expected = run("cpu", "fp32", selection=selection)
    assert_close(run("cuda", "fp16", dtype=torch.float16, selection=selection), expected)


@pytest.mark.parametrize("name", ["int8-baseline", "int8-a", "int8-b", "fp8"])
def test_8_bit_formats_on_a_gpu_are_those_of_the_host(name):
    """In one layer: behind it, values that lie between two whole numbers round another way."""
    expected = run("cpu", name, layers=1, kv_format=name)
    assert_close(run("cuda", name, layers=1, dtype=torch.float16, kv_format=name), expected)


def test_partitions_longer_than_a_page_of_64():
    options = {"layers": 1, "kv_format": "int8-a", "partition": 128}
    assert_close(run("cuda", "fp16", dtype=torch.float16, **options), run("cpu", "fp32", **options))


def test_8_bit_formats_of_a_padded_batch_are_refused():
    heddle.hf.register()
    model = make_model(1, head_dim=64).cuda()
    model.set_attn_implementation("heddle")
    ids = text(3).cuda()
    padding = torch.ones_like(ids)
    padding[:, :9] = 0
    with (
        torch.inference_mode(),
        heddle.hf.options(dtype=torch.float16, kv_format="fp8"),
        pytest.raises(heddle.HeddleNotImplementedError, match=r"^kv_format: fp8 in a padded batch on a GPU"),
    ):
        model(ids, attention_mask=padding)


def test_smoothed_keys_on_a_gpu_are_refused():
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^smooth: smoothed keys on a GPU"):
        run("cuda", "fp16", dtype=torch.float16, kv_format="int8-b", smooth=True)
