"""PNG files: a sequence of chunks, each with its length, its name and a checksum."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

__all__ = ["first_rows", "written"]

_BEGINNING = b"\x89PNG\r\n\x1a\n"
# Numbers per pixel, by the header's colour type: grey, RGB, palette, grey and RGB with transparency.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def written(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the file of chunks, each a name and its content; the empty chunk at the end is added."""
    return _BEGINNING + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in (*parts, (b"IEND", b""))
    )


def first_rows(png: bytes, rows: int) -> bytes:
    """Return the first rows of a picture.

    Args:
        png: the file; 8 bits per number, not interlaced.
        rows: the number of rows to keep, in pixels.

    Raises:
        ValueError: it is no such file, or has fewer rows.
    """
    parts = list(_parts(png))
    width, height, *form = struct.unpack(">IIBBBBB", parts[0][1])
    bits, kind, _, _, interlaced = form
    if (bits, interlaced) != (8, 0) or rows > height:
        raise ValueError(
            f"a PNG of {rows} rows or more, 8 bits and not interlaced is expected, got {height} and {form}"
        )
    # A row begins with its filter, which refers to earlier rows only.
    kept = rows * (1 + width * _CHANNELS[kind])
    pixels = zlib.decompress(b"".join(content for name, content in parts if name == b"IDAT"))[:kept]
    header = struct.pack(">IIBBBBB", width, rows, *form)
    others = [part for part in parts[1:] if part[0] not in (b"IDAT", b"IEND")]
    return written([(b"IHDR", header), *others, (b"IDAT", zlib.compress(pixels, 9))])


def _parts(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    if not png.startswith(_BEGINNING):
        raise ValueError(f"this is no PNG: it begins with {png[:8]!r}")
    place = len(_BEGINNING)
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        place += 12 + length
