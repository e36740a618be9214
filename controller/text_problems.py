"""Errors and warnings in a text that a person wrote, each with its line and column.

Parsers say where a problem is by a row's offset in the text and a token's number in that row, which cost nothing
to remember. `Problems.located` finds the lines and columns at the end and goes over each row once, so that a text
of nothing but errors costs no more than a good one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property

import msgspec

#: So many problems, and as many warnings, are kept with their place; further ones are only counted.
MAX_PROBLEMS = 10_000
#: So many are shown in the text of an error: more than two screens help nobody.
MAX_SHOWN = 100

_TOKEN = re.compile(r"\S+")


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One error. `line` and `column` count from 1, in characters and without a byte-order mark.

    `token` is empty where something is missing; it is cut at 80 characters.
    """

    file: str
    line: int
    column: int
    token: str
    expected: str

    def __str__(self) -> str:
        token = f"{self.token!r}: " if self.token else ""
        return f"{self.file}:{self.line}:{self.column}: {token}expected {self.expected}"


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One warning, at a place like a `Problem`'s."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class TextError(Exception):
    """A text that says nothing certain.

    `problems` are in the order of the text; `total` counts those beyond MAX_PROBLEMS too, which are not kept.
    """

    def __init__(self, problems: Iterable[Problem], warnings: Iterable[Notice] = (), total: int = 0) -> None:
        self.problems = tuple(problems)
        self.warnings = tuple(warnings)
        self.total = max(total, len(self.problems))
        # Warnings are part of the text: a misspelt header is only a warning, and the cause of many errors.
        warned = [f"warning: {line}" for line in shown(self.warnings)]
        super().__init__("\n".join([*shown(self.problems, self.total), *warned]))


def shown(items: Iterable[object], total: int = 0) -> list[str]:
    """The first MAX_SHOWN of `items` as text, and a line that counts the rest."""
    texts = [str(item) for item in items]
    lines = texts[:MAX_SHOWN]
    left = max(total, len(texts)) - len(lines)
    return [*lines, f"and {left} more"] if left else lines


def some(names: Sequence[str]) -> str:
    """The first ten of `names`, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def cut(text: str) -> str:
    """What is shown of a token: 80 characters, with bytes that are no UTF-8 as escapes, so that it prints."""
    return text[:80].encode("utf-8", "backslashreplace").decode()


class Problems:
    """What was found in `text` so far. `file` is the name that messages say."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.total = 0
        self._problems: list[tuple[int, int, str]] = []
        self._notices: list[tuple[int, str]] = []

    @property
    def notices_full(self) -> bool:
        return len(self._notices) >= MAX_PROBLEMS

    def add(self, row: int, index: int, expected: str) -> None:
        """A problem with token `index` (from 0) of those from offset `row` on; -1 where something is missing."""
        self.total += 1
        if self.total <= MAX_PROBLEMS:
            self._problems.append((row, index, expected))

    def warn(self, row: int, text: str) -> None:
        """A warning about the first token at or after offset `row`."""
        if not self.notices_full:
            self._notices.append((row, text))

    def located(self) -> tuple[Problem, ...]:
        """All problems, in the order of the text."""
        located = []
        row, count = -1, -1
        tokens = _TOKEN.finditer("")
        token: re.Match[str] | None = None
        for at, index, expected in sorted(self._problems, key=lambda problem: problem[:2]):
            if at != row:
                row, count, tokens, token = at, -1, _TOKEN.finditer(self.text, at), None
            while count < index:
                token, count = next(tokens), count + 1
            line, column = self.position(at if token is None else token.start())
            text = "" if token is None else cut(token[0])
            located.append(Problem(file=self.file, line=line, column=column, token=text, expected=expected))
        return tuple(located)

    def notices(self) -> tuple[Notice, ...]:
        """All warnings, in the order of the text."""
        found = []
        for at, text in sorted(self._notices):
            token = _TOKEN.search(self.text, at)
            line, column = self.position(at if token is None else token.start())
            found.append(Notice(file=self.file, line=line, column=column, text=text))
        return tuple(found)

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(found.end() for found in re.finditer("\n", self.text))]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column, both from 1, of an offset in the text."""
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1
