"""Members of tar and zip archives by name: a small index on disk, and bounded reading at an offset.

The index of an archive is one array of [6, members] unsigned 64-bit numbers, sorted by the hash of the names: hash,
offset, stored bytes, bytes, CRC-32, method. It is mapped, not loaded: 48 bytes a member, shared by all processes.
"""

import hashlib
import os
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from haplovl.pictures import ImageError

MEMBER_LIMIT = 1 << 28
"""Most bytes of one member, unpacked: 256 MiB."""
SUFFIXES = (".tar", ".zip")
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
UNREADABLE = 255
"""Stands for every way of packing that is not read: encryption, other methods, links, sparse files."""


class ArchiveError(ValueError):
    """An archive that is damaged; the message says how."""


def write_index(archive: Path, folder: Path) -> str:
    """Writes the index of an archive into `folder`; returns what is wrong with it, nothing where it is whole.

    What lies before the damage can be read.
    """
    rows, damage = array("Q"), ""
    try:
        for name, *row in _zip_members(archive) if archive.suffix == ".zip" else _tar_members(archive):
            # A zip whose beginning is missing has members before its first byte.
            fine = all(0 <= number < 1 << 62 for number in row)
            rows.extend((_hash(name), *(row if fine else (0, 0, 0, 0, UNREADABLE))))
    except ArchiveError as error:
        damage = str(error)
    index = np.frombuffer(rows, dtype=np.uint64).reshape(-1, 6).T
    folder.mkdir(parents=True, exist_ok=True)
    # A stable sort: where a name comes twice, both stay neighbours.
    np.save(folder / f"{archive.name}.npy", np.ascontiguousarray(index[:, np.argsort(index[0], kind="stable")]))
    return damage


def read_index(folder: Path, archive: str) -> np.ndarray:
    """The index of the archive of this name, mapped.

    Raises:
        ImageError: it is missing or damaged.
    """
    try:
        # As a plain array: slices of a memmap object cost more than the search.
        return np.asarray(np.load(folder / f"{archive}.npy", mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ImageError(f"the archive {archive} has no readable index: {error}") from None


def find_member(index: np.ndarray, name: str) -> tuple[int, ...]:
    """Offset, stored bytes, bytes, CRC-32 and method of the member `name`, or of `name` without its first folder.

    The second is how LLaVA's records name the members of COCO's and GQA's archives.

    Raises:
        ImageError: there is none, or more than one.
    """
    for candidate in (name, name.partition("/")[2]):
        key = np.uint64(_hash(candidate))
        first, last = (int(np.searchsorted(index[0], key, side)) for side in ("left", "right"))
        if last - first > 1:
            raise ImageError(f"the archive holds {last - first} members of this name")
        if candidate and last > first:
            return tuple(int(value) for value in index[1:, first])
    raise ImageError("the archive has no such member")


def read_member(archive: Path, index: np.ndarray, name: str) -> bytes:
    """The bytes of one member of an archive.

    Raises:
        ImageError: there is none of that name, or more than one, it is too large, packed in a way that is not read, or
            damaged.
    """
    offset, stored, size, crc, method = find_member(index, name)
    if method == UNREADABLE:
        raise ImageError("the member is a link, encrypted, out of place or packed in an unknown way")
    if max(stored, size) > MEMBER_LIMIT:
        raise ImageError(f"the member has {max(stored, size)} bytes, more than the limit of {MEMBER_LIMIT}")
    try:
        with archive.open("rb") as file:
            if archive.suffix == ".zip":
                offset = _zip_data(file.fileno(), offset)
            if offset + stored > os.fstat(file.fileno()).st_size:
                raise ImageError("the archive ends inside the member")
            data = os.pread(file.fileno(), stored, offset)
    except OSError as error:
        raise ImageError(f"the archive cannot be read: {error.strerror}") from None
    data = _inflated(data, size) if method == DEFLATED else data
    if archive.suffix == ".zip" and zlib.crc32(data) != crc:
        raise ImageError("the member is damaged: its checksum is wrong")
    return data


def _hash(name: str) -> int:
    plain = str(PurePosixPath(name)) if name[:1] == "." or "//" in name or "/." in name else name  # no ./ and no //
    return int.from_bytes(hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=8).digest())


def _inflated(data: bytes, size: int) -> bytes:
    """Unpacks at most the announced size: what a bomb holds beyond it is never made."""
    unpacker = zlib.decompressobj(-15)
    try:
        whole = unpacker.decompress(data, size) if size else b""
    except zlib.error as error:
        raise ImageError(f"the member is damaged: {error}") from None
    if len(whole) < size or (size and not unpacker.eof and unpacker.decompress(unpacker.unconsumed_tail, 1)):
        raise ImageError("the member does not have the size that the archive announces")
    return whole


def _zip_data(handle: int, offset: int) -> int:
    """Where a member's bytes begin: behind its own header, whose name may differ in length from the directory's."""
    header = os.pread(handle, 30, offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ImageError("the archive is damaged: a member has no header where the directory says")
    return offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _zip_members(path: Path) -> Iterator[tuple]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # zipfile raises NotImplementedError, struct.error, … on directories made to confuse it.
    except Exception as error:
        raise ArchiveError(f"no zip archive, or damaged: {error}") from None
    for member in members:
        if member.is_dir():
            continue
        known = member.compress_type in (STORED, DEFLATED) and not member.flag_bits & 1
        method = member.compress_type if known else UNREADABLE
        yield member.filename, member.header_offset, member.compress_size, member.file_size, member.CRC, method


def _tar_members(path: Path) -> Iterator[tuple]:
    for member in tar_members(path):
        whole = member.isreg() and member.sparse is None
        method = STORED if whole else UNREADABLE
        yield member.name, member.offset_data, member.size, member.size, 0, method


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files (and links) of an uncompressed tar in order, without keeping them.

    Raises:
        ArchiveError: it is no tar, compressed, or damaged; members before the damage come first.
    """
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as archive:
            end = -1
            while (member := archive.next()) is not None:
                archive.members.clear()
                # A negative size would lead tarfile back to where it was, for ever (CVE-2025-8194).
                if member.size < 0 or archive.offset <= end:
                    raise ArchiveError(f"the member '{member.name:.100}' claims an impossible size")
                end = archive.offset
                if member.isdir():
                    continue
                if member.isreg() and member.offset_data + member.size > length:
                    raise ArchiveError(f"the archive ends inside the member '{member.name:.100}'")
                yield member
            end = archive.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(512).strip(b"\0"):
                raise ArchiveError(f"the archive is damaged after {end} bytes")
    except ArchiveError:
        raise
    # tarfile raises ValueError, OverflowError, … on headers made to confuse it.
    except Exception as error:
        packed = path.read_bytes()[:2] == b"\x1f\x8b" if length < 1 << 30 else False
        hint = "; it is compressed: unpack it with gunzip" if packed else ""
        raise ArchiveError(f"no tar archive, or damaged: {error}{hint}") from None
