"""Domains of others, as hosts tell of them: whose they are, and what a host that lies can do with its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from controller import tables
from controller.foreign import foreign
from controller.results import Result
from protocol.outcomes import Exited, Lost, Output
from protocol.vms import VmPower
from tests.unit import fake_service as fake

UUID = "11111111-2222-4333-8444-555555555555"


def domain(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "uuid": UUID, "power": "running", **more}


def said(*domains: dict[str, Any], hosts: tuple[str, ...] = ("h0",)) -> Result:
    return Result(hosts, Exited(0), Output(out=json.dumps(domains).encode()))


def test_each_is_told_by_who_made_it_and_vms_on_record_are_not_among_them() -> None:
    status = fake.status(fake.host(0), vms=[fake.vm("vm0", "h0", deployment="lab")])
    found, wrong = foreign(
        [
            said(
                domain("vm0", owner="/a", deployment="lab", mine=True),
                domain("vm1", owner="/a", deployment="lab", mine=True),
                domain("vm0", owner="/b", deployment="lab"),
                domain("legacy"),
            )
        ],
        status,
    )
    assert [(one.name, one.whose) for one in found] == [
        ("legacy", "not Canopy's"),
        ("vm0", "lab of another fleet (/b)"),
        ("vm1", "lab, not on record"),
    ]
    assert wrong == []


def test_hosts_that_agree_have_one_each_and_those_that_said_nothing_none() -> None:
    lost = Result(("h2",), Lost("gone"), Output())
    found, wrong = foreign([said(domain("a"), hosts=("h1", "h0")), lost], fake.status())
    assert [(one.host, one.name) for one in found] == [("h0", "a"), ("h1", "a")]
    assert wrong == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"[",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        json.dumps([domain("x" * 254)]).encode(),
        json.dumps([domain("x", uuid="../../etc")]).encode(),
        json.dumps([domain("x", power="flying")]).encode(),
        json.dumps([domain("x", root=True)]).encode(),
    ],
)
def test_an_answer_that_no_agent_gives_is_said_and_costs_no_other_host_its_own(answer: bytes) -> None:
    bad = Result(("h9",), Exited(0), Output(out=answer))
    found, [wrong] = foreign([bad, said(domain("a"))], fake.status())
    assert [(one.host, one.name) for one in found] == [("h0", "a")]
    assert wrong.startswith("h9: its answer is none that an agent gives")


def test_names_can_not_write_to_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\n"
    found, _ = foreign([said(domain(evil, owner=evil, deployment=evil))], fake.status())
    shown = tables.vms(fake.status(), found)
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2
    assert found[0].power is VmPower.RUNNING
