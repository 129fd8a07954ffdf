import numpy as np
import pytest

import arrays
import heddle


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)


@pytest.fixture(params=["reference", "host"])
def backend(request):
    return request.param


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    """Makes arrays of one library out of numpy arrays."""
    return {"numpy": lambda x: x, "torch": arrays.to_torch}[request.param]


@pytest.fixture
def default_threads():
    """Puts back what a test changes for the whole process."""
    yield
    heddle.set_num_threads(0)
    heddle.set_host_isa("auto")
