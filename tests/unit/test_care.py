"""What an agent answers to `check host` and `tune host`, and what no signed command can make it do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from agent.care import Care
from agent.identity import HostDirectory
from agent.look import presence
from agent.tuning import Tuner
from protocol.checks import HostFacts, TuneAnswer
from protocol.commands import Body, Setting, TuneHost
from protocol.outcomes import Exited, Refused
from tests.unit.test_tuning import FORWARD, INSTANCES, NEIGHBOURS, Host

_T = TypeVar("_T")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def with_care(host: Host, act: Callable[[Care], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        directory = HostDirectory(host.directory)
        directory.enrol("127.0.0.1")
        care = Care(directory, "test:///default", host.tuner())
        try:
            return await act(care)
        finally:
            await care.close(undo=False)

    return asyncio.run(run())


def tune(host: Host, body: TuneHost) -> tuple[object, TuneAnswer | None]:
    outcome, output = with_care(host, lambda care: care.tune(body))
    return outcome, msgspec.json.decode(output.out, type=TuneAnswer) if output.out else None


def test_settings_are_raised_and_put_back(host: Host) -> None:
    outcome, answer = tune(host, TuneHost(settings=(Setting(NEIGHBOURS, 4096),)))
    assert (outcome, host.value(NEIGHBOURS)) == (Exited(0), 4096)
    assert answer is not None
    assert [(one.before, one.after) for one in answer.tuned] == [(128, 4096)]
    assert tune(host, TuneHost(undo=True))[0] == Exited(0)
    assert host.value(NEIGHBOURS) == 128


@pytest.mark.parametrize(
    "key", ["kernel.core_pattern", "../../../etc/passwd", "net/ipv4/ip_forward", "libvirt.auth_tcp"]
)
def test_a_key_of_the_networks_choosing_is_refused_and_all_that_comes_with_it(host: Host, key: str) -> None:
    before = host.sysctl(INSTANCES).read_text()
    outcome, answer = tune(host, TuneHost(settings=(Setting(INSTANCES, 512), Setting(key, 1), Setting(FORWARD, 7))))
    assert isinstance(outcome, Refused)
    assert repr(key) in outcome.why
    assert f"{FORWARD} can be 1 to 1, not 7" in outcome.why
    assert answer is None
    assert host.sysctl(INSTANCES).read_text() == before


def test_a_key_that_is_named_twice_is_refused(host: Host) -> None:
    outcome, _ = tune(host, TuneHost(settings=(Setting(INSTANCES, 1 << 40), Setting(INSTANCES, 512))))
    assert isinstance(outcome, Refused)
    assert host.value(INSTANCES) == 128


def test_what_fails_on_the_host_is_an_answer_with_the_reason(host: Host) -> None:
    host.sysctl_d.rmdir()
    outcome, answer = tune(host, TuneHost(settings=(Setting(INSTANCES, 512),)))
    assert outcome == Exited(1)
    assert answer is not None
    assert answer.problem == "there is no /etc/sysctl.d: make it, then try again"


@pytest.mark.parametrize(
    "settings",
    [[["k" * 101, 1]], [["", 1]], [["k", -1]], [["k", 1 << 63]], [["k"]], [["k", 1, 2]], [["k", "1"]], [["k", 1]] * 65],
)
def test_a_command_that_is_larger_or_odder_than_that_is_malformed(settings: list[object]) -> None:
    body = msgspec.msgpack.encode({"type": "tune host", "settings": settings})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(body, type=Body)


def test_a_host_tells_of_itself_whatever_it_lacks(host: Host) -> None:
    outcome, output = with_care(host, lambda care: care.check())
    facts = msgspec.json.decode(output.out, type=HostFacts)
    assert outcome == Exited(0)
    assert facts.arrived_ms <= facts.answered_ms
    assert facts.settings[INSTANCES] == 128
    assert facts.interface == "lo"
    assert (facts.libvirt.uri, facts.libvirt.daemon) == ("test:///default", "")
    assert facts.rooms[0].path == str(host.directory)


def test_what_was_cut_short_is_repaired_and_a_broken_journal_ends_no_agent(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    def cut(step: str) -> None:
        if step.startswith(INSTANCES):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.tuner(cut).apply({INSTANCES: 512})
    assert host.value(INSTANCES) == 512
    with_care(host, lambda care: care.repair())
    assert host.value(INSTANCES) == 128
    (host.directory / "tuning").write_bytes(b"{")
    with_care(host, lambda care: care.repair())
    assert "what was there before is not known" in caplog.text


def test_an_agent_that_is_purged_puts_back_what_it_raised(host: Host) -> None:
    host.tuner().apply({INSTANCES: 512})

    async def run() -> None:
        await Care(HostDirectory(host.directory), None, Tuner(host.directory, root=host.root)).close(undo=True)

    asyncio.run(run())
    assert host.value(INSTANCES) == 128


def test_a_part_of_the_kernel_is_told_from_one_that_is_not_known(tmp_path: Path) -> None:
    modules = tmp_path / "lib" / "modules" / os.uname().release
    assert presence("vxlan", root=tmp_path) is None
    modules.mkdir(parents=True)
    (modules / "modules.builtin").write_text("kernel/net/bridge/bridge.ko\n")
    (modules / "modules.dep").write_text(
        "kernel/drivers/net/vxlan.ko.xz: kernel/net/udp_tunnel.ko.xz\nkernel/drivers/vhost/vhost-net.ko: a/tun.ko\n"
    )
    (tmp_path / "sys" / "class" / "misc" / "tun").mkdir(parents=True)
    found = {name: presence(name, root=tmp_path) for name in ("bridge", "vxlan", "vhost_net", "udp_tunnel", "tun")}
    assert found == {
        "bridge": "loaded",
        "vxlan": "available",
        "vhost_net": "available",
        "udp_tunnel": "missing",
        "tun": "missing",
    }
    assert presence("tun", "net/tun", root=tmp_path) == "loaded"
