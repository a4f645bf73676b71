"""Writing files: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import OutputError


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuses an output path before long work starts.

    Raises:
        OutputError: the folder does not exist or cannot be written, the path is a folder, or a file is in the way.
    """
    folder = path.parent if str(path.parent) else Path()
    if not folder.is_dir():
        raise OutputError(f"cannot write '{path}': the folder '{folder}' does not exist; create it first")
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder; name a file inside it")
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' exists already; choose another name or pass --overwrite (overwrite=True)")
    _probe(folder, path)


def check_folder(path: Path) -> None:
    """Refuses a folder that output shall go to and that could not be made, before long work starts; makes nothing.

    Raises:
        OutputError: a file is in the way, or a folder above cannot be written.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise OutputError(f"cannot write to the folder '{path}': '{there}' is a file; name another folder")
    _probe(there, path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there already is kept. Raises OutputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{path}': {error.strerror}; name another folder") from error


def _probe(folder: Path, path: Path) -> None:
    """Asks the file system itself: mode bits do not tell of read-only or virtual ones. The file is gone at once."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write '{path}': no file can be made in '{folder}' ({error.strerror})") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: readers see the old file or the new one, never a part."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}") from error
    finally:
        # Gone after a successful rename; still there after an error or an interrupt.
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
