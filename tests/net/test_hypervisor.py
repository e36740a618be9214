"""agent.hypervisor, agent.kvmprobe and agent.ping against what this machine has."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.embedded import EmbeddedError, embedded_root, prepare_embedded
from agent.hypervisor import Hypervisor, Unavailable, Unusable, load_libvirt
from agent.kvmprobe import probe_kvm
from agent.ping import ping
from agent.vmfiles import VmFiles
from agent.vmwatch import VmWatch

DEADLINE_S = 30.0


def test_importing_the_agents_vm_part_does_not_load_libvirt() -> None:
    code = "import sys, agent.vms; sys.exit('libvirt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_missing_binding_is_said_at_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_libvirt(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", no_libvirt)
    with pytest.raises(Unusable, match="apt-get install python3-libvirt"):
        load_libvirt()

    async def scenario() -> None:
        hypervisor = Hypervisor("qemu:///system", on_link=lambda _: None, on_event=lambda: None)
        with pytest.raises(Unavailable, match="apt-get install python3-libvirt"):
            await hypervisor.call(lambda libvirt: libvirt.getType(), DEADLINE_S)
        await hypervisor.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_an_embedded_hypervisor_is_set_up_to_need_no_other_daemon(tmp_path: Path) -> None:
    root = Path("/tmp") / tmp_path.name
    try:
        prepare_embedded(f"qemu:///embed?root={root}")
        assert 'stdio_handler = "file"' in (root / "etc" / "qemu.conf").read_text()
        (root / "etc" / "qemu.conf").write_text("# a person's own settings\n")
        prepare_embedded(f"qemu:///embed?root={root}")
        assert (root / "etc" / "qemu.conf").read_text() == "# a person's own settings\n"
    finally:
        for path in (root / "etc" / "qemu.conf", root / "etc", root):
            path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("qemu:///embed?root=relative", "absolute"),
        ("qemu:///embed", "absolute"),
        (f"qemu:///embed?root=/{'x' * 60}", "10 bytes too long"),
    ],
)
def test_an_embedded_hypervisor_that_cannot_work_is_refused_with_the_reason(uri: str, problem: str) -> None:
    with pytest.raises(EmbeddedError, match=problem):
        prepare_embedded(uri)


def test_only_embedded_uris_have_a_root() -> None:
    assert embedded_root("qemu:///embed?root=/a/b") == "/a/b"
    assert [embedded_root(uri) for uri in ("qemu:///system", "test:///default", "test:///embed?root=/a")] == [None] * 3


def test_the_probe_of_kvm_ends_and_says_why() -> None:
    answer = asyncio.run(asyncio.wait_for(probe_kvm(), DEADLINE_S))
    assert "/dev/kvm" in answer.why
    if not Path("/dev/kvm").exists():
        assert answer.usable is False


def test_ping_tells_who_answers_and_returns_as_soon_as_all_have() -> None:
    async def scenario() -> None:
        answers = await ping(["127.0.0.1", "127.0.0.2"], DEADLINE_S * 10)
        if answers["127.0.0.1"] is None:
            pytest.skip("this user may not ping: root may, and all may where net.ipv4.ping_group_range is wide")
        assert answers == {"127.0.0.1": True, "127.0.0.2": True}

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_ping_of_what_nobody_has_ends_with_its_deadline() -> None:
    # No packet leaves: Linux sends none to that address from a socket without SO_BROADCAST.
    async def scenario() -> None:
        assert await ping([], DEADLINE_S) == {}
        answers = await ping(["255.255.255.255"], 0.1)
        assert not answers["255.255.255.255"]

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_watch_that_failed_is_closed_like_any_other(tmp_path: Path) -> None:
    """Whoever leaves a host closes it first, and must not be kept by what came of it."""

    def fail(_: object) -> None:
        raise RuntimeError("nobody listens any more")

    async def scenario() -> None:
        files = VmFiles(tmp_path)
        watch = VmWatch("test:///default", str(tmp_path), files, is_busy=lambda _: False, on_change=fail, poll_s=0.01)
        await watch.close()
        watch.hypervisor()
        assert watch._task is not None
        watch._report = fail  # type: ignore[assignment,method-assign]
        await asyncio.wait({watch._task})
        await watch.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))
