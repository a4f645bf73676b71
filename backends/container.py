"""The zip file under a `model.gw`: stored members only, every byte of it covered by a SHA-256.

The writer is the standard library's; the reader accepts exactly what the writer makes and nothing else, so that it needs no
inflation, no search for the end record and no extra fields, and the C++ reader (runtime/container.cc) stays as small. Members
are covered by the hashes in `manifest.json`. The seal in the zip comment covers the rest: it is the hash of the file without
the comment and without the data of all members but the manifest, so each byte is hashed once.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.errors import ArtifactError, OutputError

MANIFEST = "manifest.json"
SEAL_PREFIX = b"graphwright seal sha256:"
SEAL_SIZE = len(SEAL_PREFIX) + 64
#: Plain zip ends here; no library of a compressed network comes near.
SIZE_LIMIT = (1 << 32) - 1
MEMBER_LIMIT = 1000

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_AGAIN = "copy or build the artifact again"


@dataclass(frozen=True)
class Entry:
    """One member: its name and where its data lies in the file."""

    name: str
    start: int
    end: int


def pack(members: Mapping[str, bytes]) -> bytes:
    """The container's bytes; the same members give the same bytes. `members` holds `manifest.json`.

    Raises:
        ArtifactError: a member name the format does not allow, or too many members. OutputError: more than 4 GiB.
    """
    total = sum(len(data) + 2 * len(name) + 128 for name, data in members.items())
    if total > SIZE_LIMIT:
        raise OutputError(f"the artifact would take {total} bytes; the format holds 4 GiB: put fewer targets into one file")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in (MANIFEST, *(n for n in members if n != MANIFEST)):
            archive.writestr(zipfile.ZipInfo(name), members[name])
        archive.comment = SEAL_PREFIX + b"0" * 64
    data = buffer.getbuffer()
    try:
        entries = _directory(data)
    except _Damage as error:
        raise ArtifactError(f"cannot put these members into an artifact: {error}") from error
    data[-64:] = _seal(data, entries).encode()
    return buffer.getvalue()


def unpack(data: bytes, source: str) -> dict[str, memoryview]:
    """Member name -> data, once the seal holds. `source` names the file in errors. Member hashes are the caller's to check.

    Raises:
        ArtifactError: truncated, damaged, or a zip this format does not allow.
    """
    view = memoryview(data)
    try:
        entries = _directory(view)
    except (_Damage, struct.error) as error:
        raise ArtifactError(f"'{source}' is not a whole graphwright artifact: {error}; {_AGAIN}") from error
    stored = bytes(view[-64:])
    if _seal(view, entries).encode() != stored:
        raise ArtifactError(f"'{source}' is damaged: its manifest or structure does not match its seal; {_AGAIN}")
    return {entry.name: view[entry.start : entry.end] for entry in entries}


class _Damage(Exception):
    pass


def _expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise _Damage(complaint)


def _directory(data: memoryview) -> list[Entry]:
    """Members in file order. Every header is checked against its twin, so the two views of a zip cannot differ."""
    end = len(data) - SEAL_SIZE - _END.size
    _expect(end >= 0 and data[end : end + 4] == b"PK\5\6", "it is truncated, or not a .gw file")
    _, disk, start_disk, here, count, size, start, comment = _END.unpack_from(data, end)
    _expect(comment == SEAL_SIZE and data[-SEAL_SIZE:-64] == SEAL_PREFIX, "it carries no seal")
    _expect(disk == start_disk == 0 and here == count <= MEMBER_LIMIT and start + size == end, "its end record is wrong")
    entries: list[Entry] = []
    at, position = start, 0
    for _ in range(count):
        _expect(at + _CENTRAL.size <= end, "its directory ends early")
        magic, _, *common, name_length, extra, remark, _, _, _, offset = _CENTRAL.unpack_from(data, at)
        at += _CENTRAL.size
        raw = bytes(data[at : at + name_length])
        at += name_length
        entries.append(_entry(data, raw, magic == b"PK\1\2", common, offset, extra + remark, position, start))
        position = entries[-1].end
    _expect(at == end and position == start, "its directory does not match its members")
    _expect(len({e.name for e in entries}) == count, "two members have one name")
    _expect(count > 0 and entries[0].name == MANIFEST, f"it does not start with {MANIFEST}")
    return entries


def _entry(
    data: memoryview, raw: bytes, signed: bool, common: list[int], offset: int, extras: int, position: int, limit: int
) -> Entry:
    """`common` are the fields that a central and a local header share: version, flags, method, time, date, CRC, sizes."""
    name = raw.decode("ascii", "backslashreplace")
    _expect(_NAME.fullmatch(name) is not None, f"member name {name!r} is not allowed")
    _, flags, method, _, _, _, packed, size = common
    _expect(signed and extras == 0 and flags == 0, f"the header of '{name}' is wrong")
    _expect(method == 0 and packed == size, f"'{name}' is compressed; members are stored")
    _expect(offset == position and offset + _LOCAL.size <= limit, f"'{name}' is not where the directory says")
    magic, *local, name_length, extra = _LOCAL.unpack_from(data, offset)
    start = offset + _LOCAL.size + name_length
    twin = magic == b"PK\3\4" and local == common and extra == 0 and data[start - name_length : start] == raw
    _expect(twin, f"the two headers of '{name}' differ")
    _expect(start + size <= limit, f"'{name}' reaches past the end")
    return Entry(name, start, start + size)


def _seal(data: memoryview, entries: list[Entry]) -> str:
    digest = hashlib.sha256()
    position = 0
    for entry in entries:
        if entry.name != MANIFEST:
            digest.update(data[position : entry.start])
            position = entry.end
    digest.update(data[position:-SEAL_SIZE])
    return digest.hexdigest()
