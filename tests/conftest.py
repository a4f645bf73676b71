"""Makes the helper modules beside the tests importable, whatever folder a test lives in, and starts long files first."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A loaded machine is no failure: tests assert behaviour, benchmarks measure time.
settings.register_profile("graphwright", deadline=None)
settings.load_profile("graphwright")

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)

#: Files of more than half a minute, the longest first. Test processes take whole files in this order, so that at the end of a
#: run none is left alone with a long one.
LONG_FILES = (
    "tests/test_reference_transformers.py",
    "tests/test_reference_cnns.py",
    "tests/test_bit_search.py",
    "tests/kernels/test_tiles.py",
    "tests/kernels/test_packed.py",
    "tests/test_onnx_backend.py",
    "tests/test_cli.py",
    "tests/kernels/test_neon.py",
    "tests/test_zoo.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: garbage collections need not look through it again and again (a tenth of the run)."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
