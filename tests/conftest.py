"""Fixtures for all tests: test hosts, where the machine can make them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings

from deploy.testhosts import HostSpec, TestHosts, missing_requirements

# Every run tries the same examples, and none fails because the machine is busy.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# A shell starts what it runs in the background with SIGINT ignored, and all that is started from there has it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
