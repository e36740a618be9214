"""`make fuzz`: hostile bytes for all that reads what others wrote, until somebody stops it or its time is over.

Files that people write are drawn by their grammar; all else (targets.py) is samples with parts replaced.

Each round draws from the operating system's randomness; what fails is kept in .hypothesis and tried first the next
time, shrunk. The test suite tries the same properties on the same few hundred examples in every run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.infra import format_infra
from tests.fuzz.targets import TARGETS
from tests.unit import test_infra as infra
from tests.unit import test_profile as profile

#: One round, after which the time is looked at.
_ROUND = 2_000


def _changed(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Texts with some of their characters taken out, doubled or replaced."""

    def change(drawn: tuple[str, list[tuple[int, int, str]]]) -> str:
        text, edits = drawn
        for at, length, new in edits:
            start = at % (len(text) + 1)
            text = text[:start] + new + text[start + length :]
        return text

    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 20), st.text(max_size=6))
    return st.tuples(texts, st.lists(edit, max_size=8)).map(change)


def mutants(samples: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Samples with some of their bytes replaced by others."""

    def change(sample: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, new in edits:
            start = at % (len(sample) + 1)
            sample = sample[:start] + new + sample[start + length :]
        return sample

    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 8), st.binary(max_size=8))
    return st.builds(change, st.sampled_from(samples), st.lists(edit, max_size=4))


_INFRAS = infra.infras().map(format_infra)
_TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    **{name: (st.binary() | mutants(target.seeds), target.take) for name, target in TARGETS.items()},
    "infra": (
        st.binary()
        | st.text()
        | st.lists(st.sampled_from(infra.PIECES), max_size=200).map(" ".join)
        | _changed(_INFRAS | st.sampled_from([infra.SAMPLE, infra.DVMS]) | _INFRAS.map(infra.on_one_line)),
        infra.survives,
    ),
    "profile": (
        st.binary()
        | st.lists(st.sampled_from(profile.PIECES), max_size=200).map(lambda words: " ".join(words).encode())
        | _changed(st.just(profile.SAMPLE)).map(lambda text: text.encode("utf-8", "surrogateescape")),
        profile.survives,
    ),
}


def fuzz(name: str) -> int:
    """One round. How many inputs were tried; raises what the target raised, on the smallest input that does."""
    strategy, target = _TARGETS[name]
    tried = 0

    @settings(max_examples=_ROUND, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(data: Any) -> None:
        nonlocal tried
        tried += 1
        target(data)

    one()
    return tried


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--only", choices=sorted(_TARGETS), action="append", help="this one alone")
    arguments = parser.parse_args()
    names = arguments.only or sorted(_TARGETS)
    deadline = time.monotonic() + arguments.minutes * 60
    tried = dict.fromkeys(names, 0)
    while time.monotonic() < deadline:
        for name in names:
            tried[name] += fuzz(name)
        print(", ".join(f"{name}: {count:,} inputs" for name, count in tried.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
