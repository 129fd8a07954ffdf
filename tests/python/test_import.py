"""What `import heddle` takes: little time, and numpy alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import heddle


def python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_import_takes_less_than_half_a_second():
    code = "import time; start = time.perf_counter(); import heddle; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(5)) < 0.5


def test_import_brings_numpy_alone():
    code = """
        import sys
        import numpy
        before = set(sys.modules)
        import heddle
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - {"heddle", "numpy", *sys.stdlib_module_names}))
        """
    assert python(code) == ""


def test_numpy_alone_is_enough():
    """Everything but what needs a dtype that numpy lacks, which says so."""
    code = """
        import sys
        sys.modules["torch"] = sys.modules["ml_dtypes"] = None
        import numpy as np
        import heddle
        x = np.ones((1, 6, 2, 8), np.float32)
        assert heddle.attention(x, x, x, format="int8-a", return_lse=True)[0].shape == x.shape
        table, zero = np.array([[0, 1]], np.int32), np.zeros(1, np.int32)
        for format in ("bf16", "fp8", "int8-b", "fp16"):
            cache = heddle.KVCache(2, 4, 2, 8, format=format)
            lens = cache.append(x, x, table, zero)
            assert heddle.decode(x[:, :1], cache, table, lens).shape == (1, 1, 2, 8)
            assert cache.value_norms.shape == (2, 2, 4)
        try:
            heddle.KVCache(2, 4, 2, 8).k
        except heddle.HeddleNotImplementedError as error:
            print(error)
        """
    assert python(code) == "dtype: numpy has no bfloat16 of its own: pip install ml_dtypes"


def test_the_package_is_typed():
    package = Path(heddle.__file__).parent
    assert (package / "py.typed").exists()
    stubs = (package / "_core.pyi").read_text()
    for name in dir(heddle._core):
        if not name.startswith("_"):
            assert f"class {name}" in stubs or f"def {name}(" in stubs or f"\n{name}: " in stubs, name
    for kind in (heddle.KVCache, heddle.QuantizedTensor, heddle.Schedule):
        body = stubs.partition(f"class {kind.__name__}:")[2].partition("\nclass ")[0]
        for name in dir(kind):
            if not name.startswith("_"):
                assert f"def {name}(" in body, f"{kind.__name__}.{name}"


def test_an_instruction_set_is_chosen_by_the_environment():
    code = "import heddle; print(heddle.host_isa())"
    environment = os.environ | {"HEDDLE_ISA": "portable"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert output.stdout.strip() == "portable"
