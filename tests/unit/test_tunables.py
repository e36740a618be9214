"""Which settings of a host may be raised, how far, and what a fleet of a size should have."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.tunables import TUNABLES, problems
from controller.advice import Size, advice, libvirt_files

SIZES = st.builds(Size, hosts=st.integers(1, 65_536), vms=st.integers(0, 200_000), vms_on_one=st.integers(0, 4_096))


def test_every_key_is_plain_so_that_a_path_made_of_it_stays_below_proc_sys() -> None:
    for key, tunable in TUNABLES.items():
        assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", key)
        assert tunable.key == key
        assert tunable.least <= tunable.most
        assert (tunable.default is None) == (tunable.place == "sysctl")


@pytest.mark.parametrize(
    "key",
    [
        "kernel.core_pattern",
        "net.ipv4.conf.all.rp_filter",
        "../../etc/passwd",
        "net/ipv4/ip_forward",
        "net.ipv4.ip_forward\n",
        "net.ipv4..ip_forward",
        "libvirt.auth_unix_rw",
        "",
    ],
)
def test_a_key_that_is_not_on_the_list_is_named(key: str) -> None:
    assert problems({key: 1}) == [f"{key!r} is no setting that can be tuned"]


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(sorted(TUNABLES)), st.integers())
def test_only_values_within_bounds_pass(key: str, value: int) -> None:
    fits = TUNABLES[key].least <= value <= TUNABLES[key].most
    assert (not problems({key: value})) == fits


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert len(problems({"a.b": 1, "net.ipv4.ip_forward": 2, "fs.inotify.max_user_watches": 1 << 40})) == 3


@settings(derandomize=True, deadline=None)
@given(SIZES, st.booleans())
def test_what_is_advised_may_also_be_set(size: Size, forward: bool) -> None:
    given_ = advice(size, forward=forward)
    assert not problems({key: found.least for key, found in given_.items()})
    assert ("net.ipv4.ip_forward" in given_) == forward


@settings(derandomize=True, deadline=None)
@given(SIZES)
def test_the_neighbour_table_holds_every_host_and_vm_before_anything_is_collected(size: Size) -> None:
    given_ = advice(size, forward=False)
    for family in ("ipv4", "ipv6"):
        first, second, third = (given_[f"net.{family}.neigh.default.gc_thresh{n}"].least for n in (1, 2, 3))
        assert size.hosts + size.vms <= first < second < third


def test_the_figures_of_the_largest_fleet() -> None:
    size = Size(hosts=512, vms=10_240, vms_on_one=20)
    given_ = advice(size, forward=False)
    assert [given_[f"net.ipv4.neigh.default.gc_thresh{n}"].least for n in (1, 2, 3)] == [16_384, 32_768, 49_152]
    assert given_["fs.inotify.max_user_instances"].least == 256
    assert libvirt_files(size) == 1_024


def test_a_small_fleet_needs_no_more_than_the_kernel_has_of_itself() -> None:
    given_ = advice(Size(hosts=3, vms=6, vms_on_one=2), forward=False)
    assert [given_[f"net.ipv4.neigh.default.gc_thresh{n}"].least for n in (1, 2, 3)] == [128, 512, 1_024]
    assert given_["libvirt.max_client_requests"].least == 5
