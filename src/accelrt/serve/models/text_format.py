"""Read protobuf's text format into plain data, with no schema and no protobuf: what ``config.pbtxt`` is written in.

Only what configurations use is read: messages in braces or angle brackets, lists in square brackets, text (adjacent
pieces are joined), numbers, ``true`` and ``false``, names of enumerations, and comments. Extensions, ``Any`` and hex
floats are refused. Sizes and nesting are bounded, since the file may be hostile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from accelrt.errors import RequestError

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 16
MAX_FIELDS = 100_000

Message: TypeAlias = "dict[str, list[Any]]"
"""Every value of each field, in order: scalars (str, int, float, bool, `Word`) and messages."""


class Word(str):
    """A bare word that is neither true nor false: the name of an enumeration's value."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+|\#[^\n]*)
    |(?P<line>\n)
    |(?P<number>[-]?(?:0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?f?)(?![A-Za-z0-9_]))
    |(?P<word>-?[A-Za-z_][A-Za-z0-9_]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>[{}<>\[\]:,;])""",
    re.VERBOSE | re.ASCII,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", "'": "'", '"': '"'}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)
_CLOSING = {"{": "}", "<": ">"}


def parse(text: str) -> Message:
    """Read a message.

    Raises:
        RequestError: It is not text format, or larger or deeper than what is read; says the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"A configuration of {len(text)} characters is more than the {MAX_CHARACTERS} that are read."
        )
    return _Parser(list(_tokens(text))).whole()


def _tokens(text: str) -> Iterator[_Token]:
    line, at = 1, 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise RequestError(f"Line {line} of the configuration cannot be read at {text[at : at + 20]!r}.")
        kind = found.lastgroup or ""
        if kind == "line":
            line += 1
        elif kind != "space":
            yield _Token(kind, found.group(), line)
        at = found.end()


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens, self._at, self._fields = tokens, 0, 0

    def whole(self) -> Message:
        message = self._message("", 0)
        if self._at < len(self._tokens):
            raise self._unexpected("the end")
        return message

    def _message(self, end: str, depth: int) -> Message:
        if depth > MAX_DEPTH:
            raise RequestError(f"The configuration nests more than {MAX_DEPTH} deep.")
        message: Message = {}
        while (token := self._peek()) is not None and token.text != end:
            if token.kind != "word" or token.text.startswith("-"):
                raise self._unexpected("the name of a field")
            self._at += 1
            values = message.setdefault(token.text, [])
            values.extend(self._values(depth))
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise RequestError(f"The configuration has more than {MAX_FIELDS} fields.")
            if (after := self._peek()) is not None and after.kind == "mark" and after.text in ",;":
                self._at += 1
        return message

    def _values(self, depth: int) -> list[Any]:
        """Read what follows the name of a field: a value, or a list of them."""
        colon = self._skip(":")
        token = self._peek()
        if token is not None and token.text == "[" and token.kind == "mark":
            self._at += 1
            values: list[Any] = []
            while not self._skip("]"):
                if values and not self._skip(","):
                    raise self._unexpected("',' or ']'")
                values.append(self._value(depth))
                self._fields += 1
            return values
        if not colon and (token is None or token.text not in _CLOSING):
            raise self._unexpected("':' or a message")
        return [self._value(depth)]

    def _value(self, depth: int) -> Any:
        token = self._peek()
        if token is None:
            raise self._unexpected("a value")
        if token.kind == "mark" and token.text in _CLOSING:
            self._at += 1
            message = self._message(_CLOSING[token.text], depth + 1)
            if not self._skip(_CLOSING[token.text]):
                raise self._unexpected(repr(_CLOSING[token.text]))
            return message
        if token.kind == "text":
            pieces = []
            while (piece := self._peek()) is not None and piece.kind == "text":
                pieces.append(_unescaped(piece))
                self._at += 1
            return "".join(pieces)
        if token.kind == "number":
            self._at += 1
            return _number(token)
        if token.kind == "word":
            self._at += 1
            return {"true": True, "false": False}.get(token.text, Word(token.text))
        raise self._unexpected("a value")

    def _peek(self) -> _Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _skip(self, mark: str) -> bool:
        token = self._peek()
        if token is None or token.kind != "mark" or token.text != mark:
            return False
        self._at += 1
        return True

    def _unexpected(self, wanted: str) -> RequestError:
        token = self._peek()
        if token is None:
            return RequestError(f"The configuration ends where {wanted} should be.")
        return RequestError(f"Line {token.line} of the configuration has {token.text[:40]!r} where {wanted} should be.")


def _number(token: _Token) -> int | float:
    text = token.text
    try:
        if re.fullmatch(r"-?0[xX][0-9a-fA-F]+", text):
            return int(text, 16)
        if re.fullmatch(r"-?[0-9]{1,20}", text):
            return int(text)
        return float(text.removesuffix("f"))
    except ValueError:
        raise RequestError(f"Line {token.line} of the configuration has {text[:40]!r}, which is no number.") from None


def _unescaped(token: _Token) -> str:
    def one(found: re.Match[str]) -> str:
        code = found.group(1)
        if code in _ESCAPES:
            return _ESCAPES[code]
        if code[0] == "x" and len(code) > 1:
            return chr(int(code[1:], 16))
        if code[0] in "01234567":
            return chr(int(code, 8))
        raise RequestError(f"Line {token.line} of the configuration has an escape \\{code} that is not known.")

    return _ESCAPE.sub(one, token.text[1:-1])
