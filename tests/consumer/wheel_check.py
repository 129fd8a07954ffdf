"""Runs in an environment that holds the installed wheel and numpy, nothing else: the package works and starts fast."""

import importlib.util
import subprocess
import sys
import time

assert importlib.util.find_spec("torch") is None, "this check is about an environment without torch"

seconds = []
for _ in range(3):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", "import heddle"], check=True)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", "import numpy"], check=True)
    seconds.append((bare - start, time.perf_counter() - bare))
import_seconds, numpy_seconds = min(seconds)
assert import_seconds < 0.5, f"import heddle takes {import_seconds:.2f} s afresh (numpy {numpy_seconds:.2f} s)"

import numpy as np  # noqa: E402

import heddle  # noqa: E402

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 6, heads, 8), dtype=np.float32) for heads in (4, 2, 2))
out = heddle.attention(q, k, v, causal=True)
scores = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
scores[..., np.triu_indices(6, 1)[0], np.triu_indices(6, 1)[1]] = -np.inf
p = np.exp(scores - scores.max(-1, keepdims=True))
expected = np.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

subprocess.run([sys.executable.replace("/python", "/heddle"), "--help"], check=True, stdout=subprocess.DEVNULL)
print(f"wheel: heddle {heddle.__version__} from {heddle.__file__}, import {import_seconds:.2f} s")
