"""What happens in the situations of `golden/` is what stands there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.golden import DIRECTORY, STORIES, path, text
from tests.sim.words import Story


@pytest.mark.parametrize("tell", STORIES, ids=lambda tell: tell.__name__)
def test_it_happens_as_it_stands_there(tell: Callable[[], Story]) -> None:
    assert text(tell) == path(tell).read_text(encoding="utf-8"), "if that is meant: python -m tests.sim.golden --write"


def test_no_story_stands_there_that_nobody_tells() -> None:
    assert {file for file in DIRECTORY.iterdir() if file.suffix == ".txt"} == {path(tell) for tell in STORIES}


def test_the_page_beside_them_names_each() -> None:
    page = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert all(path(tell).name in page for tell in STORIES)
