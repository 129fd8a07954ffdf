"""Calls from several Python threads, beside Torch, and after a fork."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import heddle
from arrays import normal, to_torch


def run(code: str, *arguments: str, **environment: str) -> str:
    """The output of a Python process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_threads_do_not_interfere(rng):
    """Different calls at once give the bits that they give alone."""
    q, k, v = normal(rng, 2, 70, 4, 64), normal(rng, 2, 90, 2, 64), normal(rng, 2, 90, 2, 64)
    table, lens = np.arange(12, dtype=np.int32).reshape(2, 6), np.array([90, 61], np.int32)
    cache = heddle.KVCache(12, 16, 2, 64, format="int8-b")
    cache.append(k, v, table, np.zeros(2, np.int32))
    mask = heddle.select.block_mask(np.tri(3, 3, dtype=bool), 32)
    calls = [
        lambda: heddle.attention(q, k, v, causal=True),
        lambda: heddle.attention(*(to_torch(x) for x in (q, k, v)), window=(9, 9)).numpy(),
        lambda: heddle.attention(q, k, v, selection=mask),
        lambda: heddle.attention(q, k, v, format="int8-a", smooth=True),
        lambda: heddle.decode(q[:, :2], cache, table, lens),
        lambda: heddle.decode(q[:, :1], cache, table, lens, backend="reference"),
        lambda: heddle.quantize(k, "fp8").dequantize(),
    ]
    expected = [call() for call in calls]
    order = np.random.default_rng(3).integers(0, len(calls), 300)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, result in zip(order, pool.map(lambda i: calls[i](), order), strict=True):
            np.testing.assert_array_equal(result, expected[i])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_few_row_tiles_split_their_keys(rng, kv_heads):
    """A chunk of more rows than a row tile has, on long keys: the same bits on any number of threads."""
    q, k, v = normal(rng, 1, 21, 32, 40), normal(rng, 1, 5000, kv_heads, 40), normal(rng, 1, 5000, kv_heads, 40)
    expected, expected_lse = heddle.attention(q, k, v, causal=True, return_lse=True, backend="reference")
    results = []
    for threads in (1, 2, 3):
        heddle.set_num_threads(threads)
        try:
            results.append(heddle.attention(q, k, v, causal=True, return_lse=True))
        finally:
            heddle.set_num_threads(0)
    for out, lse in results:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


def test_errors_and_kernels_belong_to_their_thread(rng):
    q = normal(rng, 1, 4, 2, 8)
    barrier = threading.Barrier(4)

    def work(i):
        barrier.wait()
        for _ in range(50):
            heddle.attention(q, q, q, backend=("host", "reference")[i % 2])
            assert heddle.last_kernel().startswith(("host", "reference")[i % 2])
            with pytest.raises(heddle.HeddleValueError) as caught:
                heddle.attention(q, q, q, softcap=-float(i + 1))
            assert f"-{i + 1}" in str(caught.value)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_python_runs_while_heddle_computes(rng):
    q = normal(rng, 1, 3000, 8, 64)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    heddle.attention(q, q, q)
    end = time.perf_counter()
    done.set()
    ticker.join()
    inside = sum(start < t < end for t in ticks)
    # Were the interpreter held, no tick would fall inside but the first and the last.
    assert inside > 3, f"{inside} ticks in {end - start:.3f} s"


def test_appends_and_decodes_of_one_cache(rng):
    """Requests grow while others are read: nobody sees half of an append."""
    cache = heddle.KVCache(40, 4, 2, 16, format="int8-a", partition=2)
    tables = np.arange(40, dtype=np.int32).reshape(4, 1, 10)
    zero = np.zeros(1, np.int32)
    new = normal(rng, 4, 40, 2, 16)
    cache.calibrate(new, new)
    q = normal(rng, 1, 1, 4, 16)

    def grow(b):
        lens = zero
        for t in range(40):
            lens = cache.append(new[b : b + 1, t : t + 1], new[b : b + 1, t : t + 1], tables[b], lens)
            heddle.decode(q, cache, tables[b], lens)
        return heddle.decode(q, cache, tables[b], lens)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(grow, range(4)))
    alone = heddle.KVCache(40, 4, 2, 16, format="int8-a", partition=2)
    alone.calibrate(new, new)
    cache = alone
    for b in range(4):
        np.testing.assert_array_equal(grow(b), together[b])


@pytest.mark.parametrize("first", ["torch", "heddle"])
def test_one_openmp_runtime_beside_torch(first):
    """Two runtimes would be two pools of threads that fight for the same cores."""
    second = {"torch": "heddle", "heddle": "torch"}[first]
    runtimes = run(
        """
        import importlib, sys
        first, second = map(importlib.import_module, sys.argv[1:])
        import heddle, numpy, torch
        x = torch.randn(1, 300, 8, 64)
        heddle.attention(x, x, x), torch.randn(500, 500) @ torch.randn(500, 500)
        names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
        print(*names)
        """,
        first,
        second,
    )
    assert len(runtimes.split()) == 1, runtimes


@pytest.mark.parametrize("first", ["torch", "heddle"])
def test_the_number_of_threads_is_that_of_torch(first):
    code = """
        import importlib, sys
        importlib.import_module(sys.argv[1])
        import heddle, torch
        before = heddle.num_threads()
        torch.set_num_threads(2)
        after = heddle.num_threads()
        heddle.set_num_threads(3)
        chosen = heddle.num_threads()
        heddle.set_num_threads(0)
        print(before, after, chosen, heddle.num_threads())
        """
    assert run(code, first, OMP_NUM_THREADS="1") == "1 2 3 2"


def test_a_forked_child_computes(rng):
    """OpenMP's pool does not survive a fork; one thread does."""
    output = run(
        """
        import os, signal
        import numpy as np
        import heddle

        q = np.random.default_rng(0).standard_normal((1, 300, 8, 64)).astype(np.float32)
        expected = heddle.attention(q, q, q)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), heddle.num_threads())
        else:
            signal.alarm(60)
            same = np.array_equal(heddle.attention(q, q, q), expected) and heddle.num_threads() == 1
            os._exit(0 if same else 1)
        """,
        OMP_NUM_THREADS="2",
    )
    assert output == "0 2"
