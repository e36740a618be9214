"""PROTOCOL.md says what the code does, as far as a table can say it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec

from protocol import limits, messages, trust
from protocol.commands import Body, Quiet
from protocol.messages import Kind, Manner
from protocol.outcomes import Outcome

_TEXT = (Path(limits.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")


def _table(first_heading: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    lines = _TEXT.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def _direction(type_: type) -> tuple[str, str]:
    moves = type_ in messages.MOVE_UPWARDS, type_ in messages.MOVE_DOWNWARDS
    if any(moves):
        return "both" if all(moves) else "up" if moves[0] else "down", "move"
    up = type_ in messages.UPWARDS | messages.BULK_UPWARDS
    down = type_ in messages.DOWNWARDS | messages.BULK_DOWNWARDS
    bulk = type_ in messages.BULK_UPWARDS | messages.BULK_DOWNWARDS
    if not up and not down and not bulk:
        return "up" if type_ in messages.PULL_UPWARDS else "down", "pull"
    return "both" if up and down else "up" if up else "down", "bulk" if bulk else "control"


def test_each_kind_stands_there_with_its_number_direction_link_and_fields() -> None:
    code = []
    for kind in Kind:
        type_ = messages.TYPES[kind]
        fields = ", ".join(field.name for field in msgspec.structs.fields(type_))
        code.append([str(int(kind)), kind.name, *_direction(type_), fields])
    page = [[*row[:4], row[4].removesuffix(" (and the blob)")] for row in _table("number")]
    assert page == code


def test_each_limit_stands_there_with_its_value() -> None:
    page = {name: float(value.replace(",", "")) for name, value in _table("limit")}
    assert page == {name: float(value) for name, value in vars(limits).items() if name.isupper()}


def test_no_limit_is_named_that_is_none() -> None:
    names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", _TEXT))
    known = {name for name in vars(limits) if name.isupper()} | set(Kind.__members__)
    assert names - known == set()


def test_each_outcome_stands_there_with_its_fields() -> None:
    code = [
        [_tag(type_), ", ".join(field.name for field in msgspec.structs.fields(type_))] for type_ in get_args(Outcome)
    ]
    assert [row[:2] for row in _table("outcome")] == code


def _tag(type_: type) -> str:
    info = msgspec.inspect.type_info(type_)
    assert isinstance(info, msgspec.inspect.StructType)
    return str(info.tag)


def test_each_command_is_named_and_the_quiet_ones_are_called_so() -> None:
    quiet = {_tag(type_) for type_ in get_args(Quiet)}
    for type_ in get_args(Body):
        assert f"`{_tag(type_)}" in _TEXT
    sentence = next(line for line in _TEXT.splitlines() if "**quiet**" in line)
    assert all(f"`{tag}`" in sentence for tag in quiet)


def test_each_manner_is_named_with_its_number() -> None:
    for manner in Manner:
        assert f"{int(manner)} ({manner.name.lower()}:" in _TEXT


def test_the_prefixes_of_what_is_signed_are_those_of_the_code() -> None:
    for prefix in (trust._COMMAND, trust._CLOCK):
        assert f"`{prefix.decode()}`".replace("\0", "\\0") in _TEXT


def test_the_present_version_is_the_one_that_stands_there() -> None:
    assert limits.VERSION_MIN == limits.VERSION_MAX
    assert f"The present version is {limits.VERSION_MAX}, and the only one." in _TEXT
