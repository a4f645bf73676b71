"""Hashes of content: which program, which samples, which options a result belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .printer import print_program
from .program import Program


def content_key(*parts: Any) -> str:
    """A hash of tensors, programs, samples and anything with a stable repr (numbers, texts, tuples, frozen dataclasses)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_digest(part).encode())
    return digest.hexdigest()[:32]


def program_hash(program: Program) -> str:
    """A hash of the graph and of every parameter's bytes: which model a plan is for."""
    return content_key(print_program(program), *program.parameters().values())


def _digest(part: Any) -> str:
    if isinstance(part, torch.Tensor):
        content = part.detach().cpu().contiguous()
        bits = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{tuple(content.shape)}{content.dtype}{bits.hexdigest()}"
    if isinstance(part, Program):
        return program_hash(part)
    if isinstance(part, (list, tuple)):
        return f"[{','.join(_digest(p) for p in part)}]"
    return repr(part)
