"""Files as other tools of the format write them read as their columns say."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.infra import Infra, format_infra, load_infra, parse_infra

DATA = Path(__file__).parent / "data"


def read(name: str) -> Infra:
    infra, warnings = load_infra(DATA / name)
    assert warnings == ()
    return infra


def vms(infra: Infra) -> dict[str, tuple[object, ...]]:
    return {
        vm.name: (vm.vcpus, vm.cpu, vm.cpu_wanted, vm.memory, vm.memory_wanted, vm.cpu_cap, vm.node, vm.sleeping)
        for vm in infra.vms
    }


def test_dvms_counts_in_percent_and_mib() -> None:
    infra = read("dvms.conf")
    assert [(node.name, node.cpus, node.cpu_capacity, node.memory, node.offline) for node in infra.nodes] == [
        ("node1", 4, 400, 16192, False),
        ("node2", 4, 400, 16192, True),
        ("node3", 8, 800, 32384, False),
    ]
    assert vms(infra) == {
        "vm-0": (1, 0, 0, 2048, 2048, None, "node1", False),
        "vm-1": (1, 0, 0, 2048, 2048, None, None, False),
        "vm-2": (2, 25, 80, 4096, 4096, None, "node1", False),
        "vm-3": (4, 100, 0, 1024, 2048, 150, "node3", True),
        "vm-4": (1, 5, 5, 512, 512, None, None, False),
    }


def test_entropy_has_tabs_four_columns_and_a_plan_after_the_configuration() -> None:
    infra = read("entropy.conf")
    assert [(node.name, node.cpus, node.cpu_capacity, node.memory) for node in infra.nodes] == [
        (f"WN{n}", 2, 2, 3580) for n in (1, 2, 3)
    ]
    assert vms(infra) == {
        "job1.0": (1, 1, 1, 512, 512, None, "WN1", False),
        "job1.1": (1, 0, 1, 512, 512, None, "WN2", False),
        "job2.0": (1, 1, 0, 2048, 1024, None, None, False),
        "job2.1": (1, 0, 0, 2048, 2048, None, "WN1", True),
    }


def test_a_document_has_lost_its_line_breaks() -> None:
    infra = read("one-line.conf")
    assert [(node.name, node.offline) for node in infra.nodes] == [("suno-1", False), ("suno-2", True)]
    assert vms(infra) == {
        "vm00": (1, 1, 1, 1, 1, None, "suno-1", False),
        "vm01": (1, 1, 4, 1, 1, None, None, False),
        "vm02": (2, 3, 3, 2, 2, 10, "suno-1", True),
    }


@pytest.mark.parametrize("name", ["dvms.conf", "entropy.conf", "one-line.conf"])
def test_each_is_written_so_that_it_reads_back_equal(name: str) -> None:
    assert parse_infra(format_infra(read(name)))[0] == read(name)
