"""Hosts as Grid'5000 users have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.hosts import names_in
from controller.infra import parse_infra
from controller.inventory import as_in_fleet, in_kavlan, plain, site_from, write_hosts
from controller.status import CtlError


def test_a_node_file_names_a_host_once_for_each_of_its_cores() -> None:
    text = "".join(f"parapluie-{n}.rennes.grid5000.fr\n" * 24 for n in (3, 1))
    assert names_in(text, file="f") == ("parapluie-3.rennes.grid5000.fr", "parapluie-1.rennes.grid5000.fr")


@pytest.mark.parametrize(
    ("name", "bare", "fourth"),
    [
        ("a-1.rennes.grid5000.fr", "a-1.rennes.grid5000.fr", "a-1-kavlan-4.rennes.grid5000.fr"),
        ("a-1-kavlan-12.rennes.grid5000.fr", "a-1.rennes.grid5000.fr", "a-1-kavlan-4.rennes.grid5000.fr"),
        ("a-1-kavlan-4", "a-1", "a-1-kavlan-4"),
        ("kavlan-4", "kavlan-4", "kavlan-4-kavlan-4"),
        ("a.site-kavlan-4.fr", "a.site-kavlan-4.fr", "a-kavlan-4.site-kavlan-4.fr"),
    ],
)
def test_the_suffix_of_a_kavlan_comes_and_goes(name: str, bare: str, fourth: str) -> None:
    assert (plain(name), in_kavlan(name, 4), in_kavlan(name, None)) == (bare, fourth, name)


FILE = """\
#list of nodes
a-1.r 4 400 8192
a-2-kavlan-7.r 4 400 8192
a-3.r 4 400 8192
a-4.r 4 400 8192
#list of VMs
v 1 1 1
w 1 1 1
#initial configuration
a-1.r v
(a-3.r) w
#end of configuration
"""


def test_a_files_nodes_are_found_with_and_without_the_suffix() -> None:
    infra, _ = parse_infra(FILE)
    found = as_in_fleet(
        infra, ["a-1-kavlan-4.r", "a-2.r", "a-3.r", "a-3-kavlan-4.r", "a-4-kavlan-4.r", "a-4-kavlan-5.r"]
    )
    assert [node.name for node in found.nodes] == ["a-1-kavlan-4.r", "a-2.r", "a-3.r", "a-4.r"]
    assert {vm.name: vm.node for vm in found.vms} == {"v": "a-1-kavlan-4.r", "w": "a-3.r"}
    assert [node.offline for node in found.nodes] == [False, False, True, False]
    assert as_in_fleet(infra, []) is infra


@pytest.mark.parametrize(
    ("pattern", "site"),
    [
        (None, "rennes"),
        (r"\.(\w+)\.grid5000", "rennes"),
        (r"^[a-z]+", "parapluie"),
        (r"rack(\d+)", ""),
        (r"(x)?parapluie", ""),
    ],
)
def test_a_site_is_what_a_pattern_finds(pattern: str | None, site: str) -> None:
    assert site_from(pattern)("parapluie-1-kavlan-4.rennes.grid5000.fr") == site


def test_a_pattern_that_is_none_says_so() -> None:
    with pytest.raises(CtlError, match=r"--site-from .* is no regular expression"):
        site_from("(")


def test_good_and_bad_files_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    write_hosts(path, {"h1": "no route to it\n# h9", "h2": ""})
    assert names_in(path.read_text(), file="bad") == ("h1", "h2")
    with pytest.raises(CtlError, match="No such file"):
        write_hosts(tmp_path / "none" / "bad", {})
