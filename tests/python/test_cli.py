"""The command line: `heddle`, as a person types it."""

import subprocess
import sys
import textwrap

import pytest

import heddle
from heddle import cli


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    code = f"{textwrap.dedent(before)}\nimport sys\nfrom heddle.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"heddle {heddle.__version__}\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert heddle.__version__ in out
    assert all(name in out for name in [*heddle.available_backends(), heddle.host_isa(), "numpy", "torch"])
    assert f"threads          {heddle.num_threads()}" in out


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("info", "advise", "trace", "indexer", "study", "demo"))


@pytest.mark.parametrize("arguments", [[], ["dance"], ["--fast"], ["info", "--fast"]])
def test_wrong_usage(arguments):
    process = run(*arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: heddle")
    assert "Traceback" not in process.stderr


def test_it_runs_as_a_module():
    process = subprocess.run([sys.executable, "-m", "heddle", "--version"], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == f"heddle {heddle.__version__}"


def test_a_missing_extra_is_one_line():
    process = run("demo", before="import sys\nsys.modules['transformers'] = sys.modules['torch'] = None")
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert "pip install 'heddle-attention[demo]'" in process.stderr


def test_a_refusal_is_one_line():
    process = run("info", before="import os\nos.environ['HEDDLE_ISA'] = 'mmx'")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "mmx" in process.stderr
