"""The planted faults of `make sim-mutants` still fit the code that they are planted in."""

from __future__ import annotations

from pathlib import Path

import pytest

import protocol
from tests.sim.mutants import MUTANTS, Mutant, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_changes_one_place_into_code_that_is_code(mutant: Mutant) -> None:
    text = (Path(protocol.__file__).parent / mutant.file).read_text(encoding="utf-8")
    changed = planted(mutant, text)
    assert changed != text
    compile(changed, mutant.file, "exec")


def test_no_two_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
