"""Registration of one `gw::` op: schema, reference implementation and shape rule in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("gw", "FRAGMENT")

Function = Callable[..., Any]


def define(schema: str, shape: Function) -> Callable[[Function], Function]:
    """Registers the decorated reference implementation under `gw::<schema>`; `shape` computes the fake result."""
    name = schema.split("(", 1)[0]

    def register(reference: Function) -> Function:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gw::{name}", shape, lib=LIBRARY)
        return reference

    return register
