"""Makes the helper modules beside the tests importable, whatever folder a test lives in."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)
