"""Makes the helper modules beside the tests importable, whatever folder a test lives in."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

# A loaded machine is no failure: tests assert behaviour, benchmarks measure time.
settings.register_profile("graphwright", deadline=None)
settings.load_profile("graphwright")

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)
