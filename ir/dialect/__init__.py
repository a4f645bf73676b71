"""The `gw::` dialect: the few ops ATen lacks, each with ONE exact meaning, written in torch.

Backends are right when they equal these functions bit for bit. Importing this package registers the ops as
`torch.ops.gw.<name>`; `gw` below is that namespace.
"""

from __future__ import annotations

import torch

from . import codebook, exact, fake, fp8, integer, packed, sparse, tokens

gw = torch.ops.gw

__all__ = ["codebook", "exact", "fake", "fp8", "gw", "integer", "packed", "sparse", "tokens"]
