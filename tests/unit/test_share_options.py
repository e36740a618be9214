"""Shares of hosts and VMs, as options have them: `--max-fail 2%`, `--batch 10%`, `--min-up 95%`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from controller.shares import at_a_time, needed, share
from controller.status import CtlError, ExitStatus


@pytest.mark.parametrize(
    ("text", "of", "count"),
    [
        ("5%", 100, 5),
        ("2%", 10, 0),
        ("0%", 10, 0),
        ("0", 10, 0),
        ("100%", 7, 7),
        ("3", 7, 3),
        ("9", 7, 9),
        ("5%", 0, 0),
    ],
)
def test_what_may_fail_is_rounded_down(text: str, of: int, count: int) -> None:
    assert share("--max-fail", text, of) == count


@pytest.mark.parametrize(("text", "of", "count"), [("10%", 64, 6), ("1%", 10, 1), ("7", 3, 7), ("50%", 0, 1)])
def test_a_batch_is_rounded_down_and_one_at_least(text: str, of: int, count: int) -> None:
    assert at_a_time("--batch", text, of) == count


@pytest.mark.parametrize(
    ("text", "of", "count"),
    [
        ("95%", 64, 60),
        ("95%", 3, 2),
        ("95%", 1, 1),
        ("99.9%", 1000, 999),
        ("100%", 7, 7),
        ("0%", 7, 0),
        ("0", 7, 0),
        ("7", 7, 7),
    ],
)
def test_a_minimum_is_rounded_down_and_one_at_least_unless_nothing_is_asked_for(text: str, of: int, count: int) -> None:
    assert needed("--min-up", text, of) == count


@pytest.mark.parametrize(
    ("take", "text"),
    [(take, text) for take in (share, at_a_time, needed) for text in ("101%", "-1", "half", "", "1.5", "95 %", "1e1")]
    + [(at_a_time, "0"), (at_a_time, "0%"), (needed, "8")],
)
def test_a_share_that_is_none_names_its_option(take: Callable[[str, str, int], int], text: str) -> None:
    with pytest.raises(CtlError, match="--wave") as caught:
        take("--wave", text, 7)
    assert caught.value.status == ExitStatus.USAGE
