import atexit
import logging
import os
import shutil
import tempfile

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["LITGEN_CACHE"] = CACHE = tempfile.mkdtemp(prefix="litgen-cache-")  # tests' real features are not the user's
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # LightningCLI's own


@pytest.fixture(autouse=True)
def no_global_seed():
    """The run's seed is an environment variable: what one test sets must not reach the next."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def lightning_speaks():
    """Benchmarks silence Lightning; what one test silences the next may want to hear."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_collection_modifyitems(items):
    """The longest first, so that no process waits at the end for another."""
    items.sort(key=lambda item: ("test_notebooks" not in item.nodeid, item.get_closest_marker("slow") is None))
