"""Fixtures for all tests: test hosts, where the machine can make them."""

from __future__ import annotations

import compileall
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import Scheduling

from deploy.testhosts import HostSpec, TestHosts, missing_requirements
from tests.sharing import FromBothEnds, put_in_order

# Every run tries the same examples, and none fails because the machine is busy.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# A shell starts what it runs in the background with SIGINT ignored, and all that is started from there has it so.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest: compile once what hundreds of agents, services and `ctl` import.

    Without bytecode (a fresh clone, PYTHONDONTWRITEBYTECODE) each of them takes 90 ms of CPU more to start, and 1 MB.
    """
    if not hasattr(config, "workerinput"):  # pytest-xdist's processes come after this one
        for package in ("protocol", "agent", "controller"):
            compileall.compile_dir(Path(__file__).parents[1] / package, quiet=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called by pytest: the order of the tests."""
    put_in_order(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Called by pytest-xdist: who runs what, where there are several processes."""
    return FromBothEnds(config, log) if config.getoption("dist") == "loadfile" else None


MakeTestHosts = Callable[[Sequence[HostSpec | str]], TestHosts]


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


def need_test_hosts(*, libvirt: bool = False) -> None:
    """Skip the test where no test hosts can be made, saying why; in CI (environment variable CI) fail instead."""
    missing = missing_requirements(libvirt=libvirt)
    if missing and _in_ci():
        pytest.fail(f"CI must run every test, but {missing}")
    if missing:
        pytest.skip(missing)


@contextlib.contextmanager
def _factory() -> Iterator[MakeTestHosts]:
    with contextlib.ExitStack() as fleets:

        def make(specs: Sequence[HostSpec | str]) -> TestHosts:
            wanted = [HostSpec(spec) if isinstance(spec, str) else spec for spec in specs]
            need_test_hosts(libvirt=any(spec.libvirt for spec in wanted))
            return fleets.enter_context(TestHosts(wanted))

        yield make


@pytest.fixture
def testhosts() -> Iterator[MakeTestHosts]:
    """Makes fleets that end with the test: ``fleet = testhosts(["h1", HostSpec("h2", mode="hung")])``."""
    with _factory() as make:
        yield make


@pytest.fixture(scope="module")
def testhosts_module() -> Iterator[MakeTestHosts]:
    """Like ``testhosts``, for fleets that all tests of a module share."""
    with _factory() as make:
        yield make
