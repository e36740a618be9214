"""When hosts are asked to go where they were planned."""

from __future__ import annotations

from controller.homing import DOUBT, SETTLE, may_go_home
from protocol.limits import SILENT_AFTER


def test_a_host_goes_home_as_soon_as_its_parent_is_back_and_settled() -> None:
    assert not may_go_home(20.0 + SETTLE / 2, host_since=10.0, parent_since=20.0)
    assert may_go_home(20.0 + SETTLE, host_since=10.0, parent_since=20.0)


def test_a_host_does_not_go_back_to_a_parent_that_may_have_fallen_silent() -> None:
    """It left it, and the root has not heard of any fault: so a cut cable looks, until silence is noticed."""
    assert not may_go_home(10.0 + SILENT_AFTER, host_since=10.0, parent_since=0.0)
    assert may_go_home(10.0 + DOUBT, host_since=10.0, parent_since=0.0)


def test_both_having_come_at_once_is_no_sign_that_the_parent_is_well() -> None:
    assert not may_go_home(10.0 + SETTLE, host_since=10.0, parent_since=10.0)
