"""heddle.advise and `heddle advise`: what a model's attention costs, and what to try first."""

import json
import os
import subprocess
import sys
import types

import pytest

import heddle
from heddle import Machine, cli

MODEL = {"num_layers": 80, "num_q_heads": 64, "num_kv_heads": 8, "head_dim": 128}
TOY = Machine(name="toy", bandwidth=1e9, fp32=1e9, bf16=2e9, int8=4e9, fp8=8e9, memory=1e12)


def find(advice, **wanted):
    return next(c for c in advice.costs if all(getattr(c, name) == value for name, value in wanted.items()))


@pytest.mark.parametrize("kv_heads", [64, 8])
def test_cache_bytes_of_a_large_model(kv_heads):
    """80 layers, 64 KV heads of 128, 128,000 tokens: 335.5 GB in bf16, 167.8 GB in INT8; with 8 KV heads an eighth."""
    advice = heddle.advise(**{**MODEL, "num_kv_heads": kv_heads}, seq_len=128_000, machine="h100-80gb")
    share = kv_heads / 64
    assert find(advice, format="bf16", phase="decode").kv_bytes == 335.54432e9 * share
    for format in ("int8-baseline", "int8-a", "int8-b", "fp8"):
        assert find(advice, format=format, phase="prefill").kv_bytes == 167.77216e9 * share
    assert advice.decode.fits == (kv_heads == 8)


def test_what_it_returns():
    advice = heddle.advise(**MODEL, seq_len=4096, machine=TOY, window=255, n_global=4, density=0.5)
    assert len(advice.costs) == 2 * 7 * 7
    assert {c.phase for c in advice.costs} == {"prefill", "decode"}
    assert len({c.pattern for c in advice.costs}) == 7
    flash = find(advice, pattern="flash", phase="prefill", format="bf16")
    assert flash == advice.prefill
    assert flash.pairs == 4096 * 4097 // 2
    assert flash.operations == 80 * 64 * flash.pairs * 4 * 128
    assert flash.seconds == pytest.approx(flash.operations / 2e9)
    assert not flash.memory_bound
    step = find(advice, pattern="flash", phase="decode", format="bf16")
    assert step == advice.decode
    assert step.pairs == 4096
    window = find(advice, pattern="window 255 + 4 global", phase="prefill")
    assert window.pairs == sum(min(p + 1, 256) + min(max(p - 255, 0), 4) for p in range(4096))
    blocks = find(advice, pattern="blocks of 128, 50%", phase="prefill", format="bf16")
    assert blocks.seconds == pytest.approx(flash.seconds / 2, rel=1e-3)
    assert find(advice, pattern="scores in memory", phase="prefill").score_bytes == 64 * 4096**2 * 2


def test_the_advice_follows_the_problem():
    kinds = {**MODEL, "seq_len": 128_000, "machine": "h100-80gb"}
    today = heddle.advise(**kinds)
    assert today.memory.startswith("fits")
    assert "First: format int8-a" in today.decode_speed
    scores = heddle.advise(**kinds, materialized=True)
    assert "First: flash attention" in scores.memory
    assert "First: flash attention" in scores.prefill_speed
    assert "First: format int8-a" in heddle.advise(**kinds, other_bytes=50e9).memory
    assert "fast enough" in heddle.advise(**kinds, decode_target=1.0).decode_speed
    assert "First: top-512" in heddle.advise(**kinds, format="int8-a", budget=512).decode_speed


def test_it_is_plain_data():
    advice = heddle.advise(**MODEL, seq_len=1000, machine=TOY)
    again = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert again["machine"]["bandwidth"] == 1e9
    assert again["workload"]["seq_len"] == 1000
    assert again["decode"]["kv_bytes"] == advice.decode.kv_bytes
    assert len(again["costs"]) == len(advice.costs)


def test_the_report_shows_every_format_and_pattern():
    advice = heddle.advise(**MODEL, seq_len=1_000_000, machine=TOY)
    text = str(advice)
    names = {c.format for c in advice.costs} | {c.pattern for c in advice.costs}
    assert all(name in text for name in names)
    assert "327.7 GB" in text
    assert "*: more than the machine's memory" in text
    assert all(f"{what}: " in text for what in ("Memory", "Prefill", "Decode"))
    assert "*:" not in str(heddle.advise(**MODEL, seq_len=1000, machine=TOY))


@pytest.mark.parametrize("kind", ["file", "mapping", "object", "nested"])
def test_the_shape_comes_from_a_config(kind, tmp_path):
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    if kind == "file":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        config = path
    elif kind == "object":
        config = types.SimpleNamespace(**config, head_dim=None)
    elif kind == "nested":
        config = {"text_config": types.SimpleNamespace(**config)}
    advice = heddle.advise(config=config, seq_len=8192, machine=TOY)
    shape = {name: advice.workload[name] for name in MODEL}
    assert shape == {"num_layers": 30, "num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    # What is given goes before what the config says.
    assert heddle.advise(config=config, num_layers=1, seq_len=8192, machine=TOY).workload["num_layers"] == 1


def test_kv_heads_default_to_query_heads():
    advice = heddle.advise(num_layers=1, num_q_heads=4, head_dim=64, seq_len=100, machine=TOY)
    assert advice.decode.kv_bytes == 100 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("argument", "change", "kind"),
    [
        ("num_layers", {"num_layers": 0}, heddle.HeddleValueError),
        ("num_layers", {"num_layers": None}, heddle.HeddleValueError),
        ("num_layers", {"num_layers": 1.5}, heddle.HeddleTypeError),
        ("num_q_heads", {"num_q_heads": 63}, heddle.HeddleValueError),
        ("seq_len", {"seq_len": -1}, heddle.HeddleValueError),
        ("seq_len", {"seq_len": "long"}, heddle.HeddleTypeError),
        ("dtype", {"dtype": "int4"}, heddle.HeddleTypeError),
        ("format", {"format": "int4"}, heddle.HeddleValueError),
        ("window", {"window": -1}, heddle.HeddleValueError),
        ("n_global", {"n_global": -1}, heddle.HeddleValueError),
        ("strided", {"strided": (1, 0)}, heddle.HeddleValueError),
        ("strided", {"strided": 5}, heddle.HeddleTypeError),
        ("density", {"density": 2}, heddle.HeddleValueError),
        ("density", {"density": float("nan")}, heddle.HeddleValueError),
        ("block", {"block": 0}, heddle.HeddleValueError),
        ("budget", {"budget": -1}, heddle.HeddleValueError),
        ("other_bytes", {"other_bytes": -1.0}, heddle.HeddleValueError),
        ("other_bytes", {"other_bytes": "much"}, heddle.HeddleTypeError),
        ("decode_target", {"decode_target": float("inf")}, heddle.HeddleValueError),
        ("causal", {"causal": "yes"}, heddle.HeddleTypeError),
        ("machine", {"machine": "abacus"}, heddle.HeddleValueError),
        ("machine", {"machine": 7}, heddle.HeddleTypeError),
        ("machine", {"machine": Machine(name="idle", bandwidth=0.0, bf16=1e9)}, heddle.HeddleValueError),
        ("machine", {"machine": Machine(name="idle", bandwidth=1e9)}, heddle.HeddleValueError),
        ("config", {"config": "/nowhere/config.json"}, heddle.HeddleValueError),
    ],
)
def test_bad_arguments(argument, change, kind):
    with pytest.raises(kind) as error:
        heddle.advise(**{**MODEL, "seq_len": 1000, "machine": TOY, **change})
    assert error.value.argument == argument
    assert str(error.value).startswith(f"{argument}: ")


def test_known_machines():
    machines = Machine.known()
    assert "h100-80gb" in {machine.name for machine in machines}
    for machine in machines:
        assert machine.source
        assert Machine.named(machine.name) == machine


def test_this_machine_is_measured():
    host = Machine.named("host")
    assert "measured" in host.source
    assert heddle.host_isa() in host.name
    assert host.workers == heddle.num_threads()
    assert all(1e7 < rate < 1e15 for rate in (host.bandwidth, host.fp32, host.bf16, host.int8))
    assert host.memory > 1e8


def test_command(capsys):
    model = ["--layers", "80", "--heads", "64", "--kv-heads", "64", "--head-dim", "128"]
    assert cli.main(["advise", *model, "--tokens", "128000", "--machine", "h100-80gb"]) == 0
    out = capsys.readouterr().out
    assert "335.5 GB" in out
    assert "167.8 GB" in out
    assert "over 3 such machines" in out


def test_command_json(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}))
    given = ["--memory-gb", "1", "--bandwidth-gbs", "100", "--fp32-gflops", "50"]
    arguments = ["--config", str(path), "--tokens", "2048", "--machine", "a100-80gb", *given, "--json"]
    assert cli.main(["advise", *arguments]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["machine"]["memory"], out["machine"]["bandwidth"], out["machine"]["fp32"]) == (1e9, 100e9, 50e9)
    assert out["machine"]["source"].startswith("fp32, memory, bandwidth given; else NVIDIA A100")
    assert out["workload"]["num_kv_heads"] == 4
    assert out["decode"]["kv_bytes"] == 2 * 2048 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "10", "--machine", "h100-80gb"], "num_layers"),
        (["--tokens", "10", "--machine", "abacus"], "h100-80gb"),
        ([], "--tokens"),
    ],
)
def test_command_refuses_without_a_traceback(arguments, words):
    command = [sys.executable, "-m", "heddle", "advise", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert words in process.stderr
    assert "Traceback" not in process.stderr


def test_command_without_rich():
    """Tables are plain text where rich is not installed, and where nobody looks."""
    code = "import sys; sys.modules['rich'] = None; from heddle.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "advise",
        "--layers",
        "1",
        "--heads",
        "1",
        "--head-dim",
        "64",
        "--tokens",
        "99",
        "--machine",
        "h100-80gb",
    ]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "Patterns, with a bf16 cache" in process.stdout


def test_command_on_a_terminal():
    """Rich draws the tables; every number is still there."""
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "heddle", "advise", "--layers", "80", "--heads", "64", "--head-dim", "128"]
    command += ["--tokens", "128000", "--machine", "h100-80gb"]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "140"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 0, process.stderr
    assert "\x1b[" in process.stdout
    assert all(text in process.stdout for text in ("335.5 GB", "167.8 GB", "window 1024 + 64 global", "2.097 TB"))
