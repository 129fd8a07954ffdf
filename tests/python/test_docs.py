"""What the pages say is so: examples run, commands, links and paths exist, tables are what the library does."""

import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import heddle
from heddle import cli, select

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


every_page = pytest.mark.parametrize("page", PAGES, ids=by_name)


# --- examples ---


def test_examples_of_the_python_page(capsys):
    page = ROOT / "docs" / "python.md"
    examples = blocks(page, "python")
    assert len(examples) >= 7
    exec(compile("\n".join(examples), page.name, "exec"), {})
    assert "k shape k: axis 3 (head_dim) is 32; allowed is 64, as in q" in capsys.readouterr().out


def test_example_of_the_trace_page(capsys, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "docs" / "trace.md", "python")
    exec(compile(example, "trace.md", "exec"), {})
    share, *rows = capsys.readouterr().out.splitlines()
    assert 0 < float(share) < 1
    assert len(rows) == 6


def test_first_example_in_python(capsys):
    (example,) = blocks(README, "python")
    exec(compile(example, README.name, "exec"), {})
    *kernel, error = capsys.readouterr().out.split()
    assert kernel[0].endswith("/decode")
    assert 0 < float(error) < 0.05


def test_first_example_in_cpp():
    """tests/consumer builds it against the installed library, and runs it."""
    consumer = ROOT / "tests" / "consumer"
    assert blocks(README, "cpp") == [(consumer / "example.cpp").read_text()]
    (example,) = blocks(README, "cmake")
    assert set(example.splitlines()) <= set((consumer / "CMakeLists.txt").read_text().splitlines())


# --- commands, links, paths ---


@every_page
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    options = (ROOT / "cmake" / "HeddleOptions.cmake").read_text()
    fields = (ROOT / "tests" / "cpp" / "support" / "cases.cpp").read_text()
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        for word, following in itertools.pairwise([*words, ""]):
            if word == "make":
                assert following in targets, line
            elif word == "heddle" and "install" not in words:
                assert following in cli.COMMANDS, line
            elif word.startswith("-DHEDDLE_"):
                assert f"({word[2:].partition('=')[0]} " in options, line
            elif re.fullmatch(r"(bench|tests)/[\w/]+\.py", word):
                assert (ROOT / word).is_file(), line
            elif word.startswith("build/tests/"):
                assert (ROOT / "tests" / "cpp" / f"{Path(word).name}.cpp").is_file(), line
            elif word.startswith("HEDDLE_CASE="):
                for field in word.partition("=")[2].split(","):
                    assert f'visit("{field.partition("=")[0]}"' in fields, line


def test_the_advisors_command_runs(capsys):
    (line,) = [
        line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("heddle advise")
    ]
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "h100-80gb" in capsys.readouterr().out


@every_page
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page)):
        assert "://" in path or (page.parent / path).exists(), path


@every_page
def test_paths_exist(page):
    for path in re.findall(r"`((?:bench|cmake|cpp|cuda|docs|python|tests|third_party)/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


# --- the table of what is supported ---


def arrays(dtype=np.float32, q_heads=4, kv_heads=2, dim=8, dim_v=8):
    rng = np.random.default_rng(1)
    shapes = ((2, 6, q_heads, dim), (2, 9, kv_heads, dim), (2, 9, kv_heads, dim_v))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def check(result):
    assert np.isfinite(np.asarray(result, np.float64)).all()


def attend(backend, *operands, **options):
    check(heddle.attention(*(operands or arrays()), backend=backend, **options))


def causal(backend):
    attend(backend)
    attend(backend, causal=True)


def block_masks(backend):
    for block, shape in itertools.product(((3, 2), (128, 128)), ((), (1,), (2,), (4,), (1, 1), (2, 1), (2, 2), (2, 4))):
        blocks = (-(-6 // block[0]), -(-9 // block[1]))
        attend(backend, selection=select.block_mask(np.ones((*shape, *blocks), bool), block))


def token_lists(backend):
    for shape in ((2, 2, 3), (2, 6, 2, 3)):
        indices = np.broadcast_to(np.array([0, 4, 7], np.int32), shape)
        attend(backend, selection=select.tokens(indices))


def page_lists(backend):
    q, k, v = arrays()
    cache = heddle.KVCache(10, 4, 2, 8)
    pages = np.arange(8, dtype=np.int32).reshape(2, 4)
    lengths = cache.append(k, v, pages, np.zeros(2, np.int32))
    lists = np.array([[[0, 1]], [[1, -1]]], np.int32)
    check(heddle.decode(q, cache, pages, lengths, selection=heddle.select.page_list(lists), backend=backend))


def chosen_tokens(backend):
    q, k, v = arrays()
    index = (q[:, :, :3], k[:, :, 0], np.ones((2, 6, 3), np.float32))
    for selection in (
        *(select.topk(q, k, v, 3, metric) for metric in ("qk", "oam", "loo")),
        select.pages(q, k, v, 4, page_size=2),
        select.indexer(*index, 3),
    ):
        attend(backend, causal=True, selection=selection)


def chosen_blocks(backend):
    q, k, v = arrays()
    for selection in (
        select.stem(q, k, v, 2, block=2, stride=2, n_first=1, n_last=1),
        select.block_topk(q, k, budget=2, block=2),
        select.xattention(q, k, block=2, stride=2),
        select.vertical_slash(q, k, vertical=1, slash=1, block=2),
    ):
        attend(backend, causal=True, selection=selection)


def strided_views(backend):
    q, k, v = (np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)[:, ::-1] for x in arrays())
    attend(backend, q, k, v)


def packed(backend):
    q, k, v = (x[0] for x in arrays())
    lengths = {"cu_seqlens_q": np.array([0, 2, 6], np.int32), "cu_seqlens_k": np.array([0, 4, 9], np.int32)}
    attend(backend, q, k, v, **lengths)


def floats(backend):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        attend(backend, *arrays(dtype))


def quantized_kv(backend):
    q, k, v = arrays()
    for format, granularity in itertools.product(("int8", "fp8"), ("tensor", "token", ("partition", 4))):
        if format == "fp8":
            pytest.importorskip("ml_dtypes")
        attend(backend, q, *(heddle.quantize(x, format, granularity) for x in (k, v)))


def caches(backend):
    for format in FORMATS:
        if format not in ("fp32", "fp16") and "int8" not in format:
            pytest.importorskip("ml_dtypes")
        q, k, v = arrays()
        cache = heddle.KVCache(8, 4, 2, 8, format=format)
        pages = np.arange(8, dtype=np.int32).reshape(2, 4)
        lengths = cache.append(k, v, pages, np.zeros(2, np.int32))
        check(heddle.decode(q, cache, pages, lengths, backend=backend))


def softmax_options(backend):
    out = heddle.attention(*arrays(), softcap=5.0, sinks=np.zeros(4, np.float32), return_lse=True, backend=backend)
    for part in out:
        check(part)


def groups(backend):
    for q_heads, kv_heads, dim_v in ((1, 1, 8), (4, 4, 3), (7, 1, 8), (6, 2, 20)):
        attend(backend, *arrays(q_heads=q_heads, kv_heads=kv_heads, dim_v=dim_v))


def sampled(backend, format="fp32", **options):
    q, k, v = arrays()
    cache = heddle.KVCache(8, 4, 2, 8, format=format, feature_major=True)
    pages = np.arange(8, dtype=np.int32).reshape(2, 4)
    lengths = cache.append(k, v, pages, np.zeros(2, np.int32))
    for method in ("iid", "stratified", "systematic", "systematic_tile"):
        check(heddle.decode(q, cache, pages, lengths, sampling=heddle.Sampling(method, 4, **options), backend=backend))


def bernoulli(backend):
    for queries in (4, ("stratified", 4)):
        sampled(backend, "int8-a", bernoulli=queries)


def merged(backend):
    parts = [heddle.attention(*arrays(), return_lse=True) for _ in range(2)]
    for part in heddle.merge([out for out, _ in parts], [lse for _, lse in parts], backend=backend):
        check(part)


def shared(backend):
    q, k, v = arrays()
    cache = heddle.KVCache(10, 4, 2, 8)
    pages = np.arange(8, dtype=np.int32).reshape(2, 4)
    lengths = cache.append(k, v, pages, np.zeros(2, np.int32))
    check(heddle.decode_cascade(q, cache, pages, lengths, [(pages[:1], lengths[:1])], backend=backend))


def schedules(backend):
    for kind, split_size in itertools.product(("tile", "static", "stealing"), (0, 64)):
        attend(backend, schedule=heddle.Schedule(kind, split_size))


FORMATS = ("fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8")
ROWS: dict[str, Callable[[str], None]] = {
    "all keys, causal": causal,
    "window": lambda backend: attend(backend, window=(3, 1)),
    "window + global tokens": lambda backend: attend(backend, selection=select.window(3, 1, n_global=2)),
    "strided": lambda backend: attend(backend, selection=select.strided(2, 3)),
    "block mask: any block, per batch, KV head or query head": block_masks,
    "token list, per request or per query": token_lists,
    "page list, per request (decode)": page_lists,
    "chosen at run time, tokens: by QK, OAM, leave-one-out, page bounds, DSA indexer": chosen_tokens,
    "chosen at run time, blocks: by Stem, block top-k, XAttention, vertical-slash": chosen_blocks,
    "contiguous, any strides": strided_views,
    "packed (ragged) batch": packed,
    "float32, float16, bfloat16": floats,
    "float64": lambda backend: attend(backend, *arrays(np.float64)),
    "K and V int8 or fp8: per tensor, token, partition": quantized_kv,
    "q int8, scores in whole numbers": lambda backend: attend(backend, format="int8-b"),
    "K smoothing": lambda backend: attend(backend, format="int8-b", smooth=True),
    f"paged cache: {', '.join(FORMATS)}": caches,
    "softcap, sinks, lse": softmax_options,
    "group sizes of any kind, Dv other than D": groups,
    "head dimensions above 576": lambda backend: attend(backend, *arrays(dim=600)),
    "sampled values: iid, stratified, systematic, by tile; kept keys": lambda backend: sampled(
        backend, n_sink=1, n_recent=1, n_top=1
    ),
    "Bernoulli scores": bernoulli,
    "merge of partial results": merged,
    "shared prefixes (cascade decode)": shared,
    "tile, static, stealing; split size": schedules,
}

# What the GPU has, which test_gpu.py and tests/cpp/test_cuda_fuzz.cpp run.
SM90 = {
    "all keys, causal": "yes",
    "window": "yes",
    "window + global tokens": "yes",
    "strided": "prefill, 16-bit decode in pages of 8 n",
    "block mask: any block, per batch, KV head or query head": "prefill",
    "token list, per request or per query": "decode, per request",
    "page list, per request (decode)": "yes",
    "contiguous, any strides": "prefill, strides of whole 16 bytes",
    "packed (ragged) batch": "prefill",
    "float32, float16, bfloat16": "float16, bfloat16",
    f"paged cache: {', '.join(FORMATS)}": "all but fp32; head dimensions 64, 96, 128, 192, 256",
    "softcap, sinks, lse": "yes",
    "group sizes of any kind, Dv other than D": "any group; Dv other than D: prefill, 16-bit decode in pages of 8 n",
    "merge of partial results": "float32, float16, bfloat16",
    "shared prefixes (cascade decode)": "as decode",
    "tile, static, stealing; split size": "yes; split size in decode",
}


def supported() -> list[tuple[str, str, str]]:
    """(row, backend, cell) of the README's table."""
    lines = re.search(r"^\| \| host \|.*?\n\n", README.read_text(), flags=re.MULTILINE | re.DOTALL).group().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    header, _, *rows = table
    return [(row[0], header[i], row[i]) for row in rows if not row[0].startswith("**") for i in range(1, len(header))]


def test_every_row_of_the_table_is_run():
    assert [row for row, backend, _ in supported() if backend == "host"] == list(ROWS)


@pytest.mark.parametrize(("row", "backend", "cell"), supported())
def test_what_is_supported(row, backend, cell):
    if cell == "no":
        with pytest.raises(heddle.HeddleNotImplementedError):
            ROWS[row](backend)
    elif backend == "sm90":
        assert cell == SM90[row]
    else:
        assert cell in ("yes", "no effect")
        ROWS[row](backend)


# --- figures ---


@pytest.fixture(scope="module")
def readme_table():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_records(readme_table):
    assert readme_table.main(["--check"]) == 0


def test_figures_of_the_study_are_those_of_its_record(monkeypatch):
    for package in ("transformers", "matplotlib", "pyarrow", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import study_table

    assert study_table.main(["--check"]) == 0
    name, record = study_table.newest(ROOT / "bench" / "results")
    assert name in (ROOT / "docs" / "study.md").read_text()
    changed = record | {"seconds": record["seconds"] + 600}
    assert study_table.render(name, changed) != study_table.render(name, record)


def test_a_figure_that_drifts_is_noticed(readme_table, monkeypatch, tmp_path):
    changed = tmp_path / "README.md"
    changed.write_text(README.read_text().replace(readme_table.END, f"1000 x faster\n{readme_table.END}"))
    monkeypatch.setattr(readme_table, "README", changed)
    assert readme_table.main(["--check"]) == 1
    assert readme_table.main([]) == 0
    assert changed.read_text() == README.read_text()


def host_record(date: str, ratios: dict[str, float], isa: str = "amx", **more) -> dict:
    result = {"ours": {"label": "heddle fp32", "gflop_per_s": 50.0}, "against": {"label": "PyTorch fp32 [B,H,S,D]"}}
    return {
        "command": "python bench/host.py",
        "date": date,
        "device": {
            "processor": "P",
            "isa": isa,
            "threads": 2,
            "load_average": [0.1],
            "torch": {"version": "9", "isa": "X"},
        },
        "versions": {},
        "revision": {"commit": "0123456789abcdef", "dirty": False},
        "complete": True,
        "results": [{**result, "name": name, "ratio_of_medians": ratio} for name, ratio in ratios.items()],
    } | more


def test_figures_of_made_up_records(readme_table, tmp_path):
    point = "prefill/fp32/{}/d{}/s{}"
    ratios = {
        point.format(mask, 64, s): r for mask, s, r in (("full", 1024, 1.5), ("causal", 1024, 0.9), ("causal", 2048, 2))
    }
    ratios["decode/fp32/1x32768/page16/torch"] = 11.4
    records = {
        "old": host_record("2026-01-01", {point.format("full", 64, 1024): 77.0}),
        "new": host_record("2026-01-02", ratios),
        "part": host_record("2026-01-03", {point.format("full", 64, 1024): 88.0}, complete=False),
        "slow": host_record("2026-01-01", {point.format("full", 128, 4096): 3.25}, isa="avx2"),
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    figures = readme_table.render(readme_table.newest(tmp_path))
    expected = (
        "| fp32 prefill, full and causal, D 64, S 1024 and 2048 | 3 | 50 GFLOP/s | PyTorch fp32 | 0.90 to 2.00 x |"
    )
    assert expected in figures
    assert "| fp32 decode, 1 x 32768 keys, pages of 16 | 1 | 50 GFLOP/s | PyTorch fp32 | 11 x |" in figures
    assert "[new.json](bench/results/new.json), 2026-01-02, `python bench/host.py`, revision 0123456789ab" in figures
    assert "77" not in figures
    assert "88" not in figures
    assert figures.index("0.90 to 2.00") < figures.index("<summary>slow.json</summary>") < figures.index("3.25 x")
