"""Reading a model file into a Program: ONNX, or a `torch.export` archive (.pt2). Nothing in the file is ever executed."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .capture import capture
from .errors import CaptureError
from .program import Program


def load_program(path: str | Path, input_shapes: dict[str, tuple[int, ...]] | None = None) -> Program:
    """Reads a model file.

    Args:
        path: an ONNX file, or an archive written by `torch.export.save`.
        input_shapes: ONNX only: shapes for inputs with symbolic dimensions other than the batch.

    Raises:
        CaptureError: no such file, a damaged file, a pickle (which could run code), or a model that cannot be captured.
    """
    path = Path(path)
    if path.is_dir():
        raise CaptureError(f"'{path}' is a folder; give an .onnx file, a .pt2 archive or the name of a reference model")
    if not path.is_file():
        raise CaptureError(f"no model file at '{path}'; give an .onnx file, a .pt2 archive or the name of a reference model")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x80\x02" or head[:1] == b"\x80":
        raise CaptureError(_pickle_advice(path))
    if head == b"PK\x03\x04":
        if input_shapes:
            raise CaptureError(f"'{path}' is an exported program, whose input shapes are fixed; --input-shape is for ONNX files")
        return _load_exported(path)
    from .onnx_import import capture_onnx  # onnx is only needed for ONNX files

    return capture_onnx(path, input_shapes=input_shapes)


def _pickle_advice(path: Path) -> str:
    return (
        f"'{path}' is a Python pickle, which can run code when it is read, and holds no graph; "
        "save the model with torch.export.save(torch.export.export(model, inputs), 'model.pt2') or export it to ONNX"
    )


def _load_exported(path: Path) -> Program:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            broken = archive.testzip()
    except zipfile.BadZipFile as error:
        raise CaptureError(f"'{path}' is a damaged or truncated archive ({error}); export the model again") from error
    if broken is not None:
        raise CaptureError(f"'{path}' is damaged: '{broken}' fails its checksum; export the model again")
    if any(name.endswith("data.pkl") for name in names) and not any("models/" in name for name in names):
        raise CaptureError(_pickle_advice(path))
    if not any("models/" in name or name.startswith("serialized_exported_program") for name in names):
        artifact = "a graphwright artifact: give the model that it was made from" if "manifest.json" in names else None
        raise CaptureError(f"'{path}' is {artifact or 'an archive without a model: give an .onnx file or a .pt2 archive'}")
    with _weights_only(), _quiet():
        try:
            exported = torch.export.load(path)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            if "check the warnings above" in reason:  # they are a traceback
                reason = "its contents do not deserialize; export the model again"
            raise CaptureError(f"'{path}' is not a program that torch.export.load accepts safely: {reason}") from error
    return capture(exported, name=path.stem)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's own warnings of what it then raises off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Forces weights-only unpickling: torch.export.load falls back to full unpickling by itself otherwise."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    previous = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous
