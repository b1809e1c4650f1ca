"""Bodies before they are parsed: compression with a limit, and how deep JSON goes."""

from __future__ import annotations

import re
import zlib

import numpy as np

from accelrt.errors import RequestError, RequestTooLarge

# A string without an end goes to the end of the text, and nothing is tried twice: the time is linear whatever the text
# is. All that needs no change is one match, so that there are few pieces to put together.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
_BARE = re.compile(rb"(?:" + _STRING + rb'|[^"NI-]++|-(?!Infinity\b))++|(-?\bInfinity\b|\bNaN\b)', re.DOTALL)
_ALL_BUT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_STEPS = np.zeros(256, np.int64)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_BLOCK = 2**16
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

MOST_MEMBERS = 16
"""Pieces of gzip one after another in a body: each of them costs a copy of what follows it."""

MOST_BARE = 200_000
"""Numbers without a word in JSON that are put in quotes in one text; it takes a microsecond for each."""

SMALLEST_COMPRESSED = 1024
"""Bytes of a reply below which compression would save no packet."""


def decompressed(body: bytes | bytearray | memoryview, encoding: str, limit: int) -> bytes:
    """Return a body without its ``Content-Encoding``.

    Args:
        body: As it came.
        encoding: The header's value: ``gzip``, ``deflate`` or ``identity``.
        limit: Bytes that it may have; what would be larger is given up there, whatever it would grow to.

    Raises:
        RequestError: Another encoding, or bytes that are not of it.
        RequestTooLarge: It passes the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return bytes(body)
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise RequestError(f"The content encoding {encoding[:40]!r} is not known.", hint="Send gzip or deflate.")
    window = _GZIP_OR_ZLIB
    if encoding == "deflate" and not _is_zlib(body):
        window = -zlib.MAX_WBITS  # deflate without zlib's frame, as some clients understand the word
    parts: list[bytes] = []
    size, rest = 0, bytes(body)
    try:
        while rest:
            if len(parts) == MOST_MEMBERS:
                raise RequestError(f"The body has more than {MOST_MEMBERS} pieces of {encoding}.")
            stream = zlib.decompressobj(window)
            part = stream.decompress(rest, limit + 1 - size)
            size += len(part)
            if size > limit:
                raise RequestTooLarge(f"The body has more than {limit} bytes when decompressed.")
            if not stream.eof:
                raise RequestError(f"The {encoding} body ends too early.")
            parts.append(part)
            rest = stream.unused_data
    except zlib.error as error:
        raise RequestError(f"The body is not {encoding}: {error}.") from None
    return b"".join(parts)


def _is_zlib(body: bytes | bytearray | memoryview) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0


def accepted(header: str) -> str:
    """Return ``gzip``, ``deflate`` or nothing: what an ``Accept-Encoding`` asks for and this server can do."""
    wanted = {}
    for item in header.lower().split(","):
        name, _, parameter = item.partition(";")
        wanted[name.strip()] = parameter.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return next((name for name in ("gzip", "deflate") if wanted.get(name)), "")


def compressed(body: bytes, encoding: str) -> bytes:
    """Return a body in an encoding of `accepted`; fast rather than small, as it is on the way of an answer."""
    window = 16 + zlib.MAX_WBITS if encoding == "gzip" else zlib.MAX_WBITS
    stream = zlib.compressobj(1, wbits=window)
    return stream.compress(body) + stream.flush()


def guard_depth(text: bytes, limit: int) -> None:
    """Refuse JSON whose lists and objects lie more than ``limit`` deep within each other.

    It looks at brackets only, and needs no valid JSON.

    Raises:
        RequestTooLarge: It is deeper.
    """
    if text.count(b"[") + text.count(b"{") <= limit:
        return
    if b"\\" in text:
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")  # what is escaped, so that each quote is one
    structure = np.frombuffer(text.translate(None, _ALL_BUT_STRUCTURE), np.uint8)
    depth, quotes = 0, 0
    for start in range(0, structure.size, _BLOCK):
        block = structure[start : start + _BLOCK]
        within = (quotes + np.cumsum(block == ord('"'))) % 2
        depths = depth + np.cumsum(np.where(within, 0, _STEPS[block]))
        if depths.max() > limit:
            raise RequestTooLarge(f"The JSON is nested deeper than {limit}, which is the limit.")
        depth, quotes = int(depths[-1]), int(within[-1])


def quote_not_finite(text: bytes) -> bytes | None:
    """Return JSON with bare ``NaN``, ``Infinity`` and ``-Infinity`` in quotes, None where there are none, or too many.

    They are no JSON, but Python's and RapidJSON's writers make them, and clients of the protocol are built on these.
    """
    if not 0 < text.count(b"NaN") + text.count(b"Infinity") <= MOST_BARE:
        return None
    return _BARE.sub(lambda match: match[0] if match[1] is None else b'"' + match[1] + b'"', text)
