"""The name -> IP file, and the block in /etc/hosts that follows it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agent.etchosts import EtcHostsError, follow, leave
from controller.names import names_text
from controller.on_record import Vm


def vm(name: str, ip: str, deployment: str = "d") -> Vm:
    return Vm(deployment=deployment, name=name, host="h0", ip=ip, mac="", vcpus=1, memory_mib=64)


def test_it_is_in_the_form_of_hosts_sorted_by_address_under_its_version() -> None:
    vms = [vm("b", "198.18.0.10"), vm("a", "198.18.0.9"), vm("c", "9.0.0.1")]
    text = "# canopy lab-1, version 7\n9.0.0.1\tc\n198.18.0.9\ta\n198.18.0.10\tb\n"
    assert names_text("lab-1", 7, vms) == text
    assert names_text("lab-1", 7, reversed(vms)) == text
    assert names_text("lab-1", 1, []) == "# canopy lab-1, version 1\n"


def test_a_name_of_two_deployments_is_lost_in_neither() -> None:
    vms = [vm("a", "10.0.0.2"), vm("a", "10.0.0.1", "e"), vm("b", "10.0.0.3", "e")]
    assert names_text("lab-1", 1, vms).splitlines()[1:] == ["10.0.0.1\ta.e", "10.0.0.2\ta a.d", "10.0.0.3\tb"]


MINE = "127.0.0.1\tlocalhost\n10.9.9.9\tkept"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(MINE)
    path.chmod(0o640)
    return path


def names(tmp_path: Path, version: int, *vms: Vm, wanted: bool = True) -> Path:
    path = tmp_path / "vms.hosts"
    path.write_text(names_text("lab-1", version, vms, in_etc_hosts=wanted))
    return path


def test_the_block_follows_the_file_and_nothing_else_changes(tmp_path: Path, etc: Path) -> None:
    assert not follow(names(tmp_path, 1, vm("a", "10.0.0.1"), wanted=False), "lab-1", etc)
    assert etc.read_text() == MINE
    assert follow(names(tmp_path, 2, vm("a", "10.0.0.1")), "lab-1", etc)
    assert etc.read_text() == (
        f"{MINE}\n# canopy lab-1: begin\n# canopy lab-1, version 2, also in /etc/hosts\n10.0.0.1\ta\n"
        "# canopy lab-1: end\n"
    )
    etc.write_text(etc.read_text() + "10.8.8.8\tlater\n")
    assert follow(names(tmp_path, 3, vm("b", "10.0.0.2")), "lab-1", etc)
    assert "10.0.0.1" not in etc.read_text()
    assert {"10.0.0.2\tb", "10.8.8.8\tlater", "10.9.9.9\tkept"} <= set(etc.read_text().splitlines())
    assert not follow(tmp_path / "vms.hosts", "lab-1", etc), "what is right is not written again"
    assert stat.S_IMODE(etc.stat().st_mode) == 0o640
    assert follow(names(tmp_path, 4, wanted=False), "lab-1", etc)
    assert etc.read_text() == f"{MINE}\n10.8.8.8\tlater\n"
    assert sorted(os.listdir(tmp_path)) == ["hosts", "vms.hosts"]


def test_two_fleets_have_a_block_each(tmp_path: Path, etc: Path) -> None:
    follow(names(tmp_path, 1, vm("a", "10.0.0.1")), "lab-1", etc)
    follow(names(tmp_path, 1, vm("b", "10.0.0.2")), "lab-2", etc)
    leave("lab-1", etc)
    assert "\ta\n" not in etc.read_text()
    assert "\tb\n" in etc.read_text()


def test_a_block_whose_end_somebody_cut_off_is_not_taken_for_the_rest_of_the_file(tmp_path: Path, etc: Path) -> None:
    etc.write_text("# canopy lab-1: begin\n10.0.0.1\ta\n10.9.9.9\tkept\n")
    follow(names(tmp_path, 1, vm("b", "10.0.0.2")), "lab-1", etc)
    leave("lab-1", etc)
    assert etc.read_text() == "10.0.0.1\ta\n10.9.9.9\tkept\n"


def test_a_file_that_is_not_there_is_made_and_one_that_can_t_be_says_so(tmp_path: Path) -> None:
    assert follow(names(tmp_path, 1, vm("a", "10.0.0.1")), "lab-1", tmp_path / "new")
    assert "10.0.0.1\ta\n" in (tmp_path / "new").read_text()
    with pytest.raises(EtcHostsError, match="can't be changed"):
        follow(names(tmp_path, 1, vm("a", "10.0.0.1")), "lab-1", tmp_path)
