"""controller/ssh.py: what the user's OpenSSH says about hosts, and what of it goes along to others."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent import seed_frames
from controller import ssh
from controller.ssh import KnownHosts, Resolved, Ssh, SshError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"


def resolved(**settings: str) -> Resolved:
    return Resolved(settings={"hostname": "h1", "port": "22", "user": "root", **settings}, identity_files=())


@pytest.fixture
def keyed(tmp_path: Path) -> Mapping[str, Path]:
    """Identity files: one open, one with a passphrase."""
    files = {}
    for name, passphrase in (("open", ""), ("closed", "secret")):
        files[name] = tmp_path / name
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(files[name])]
        subprocess.run(words, check=True)
    return files


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "", "a b", "a;b", "a\nb", "$(x)", "a'b", "a/b", "user@h"])
def test_a_name_that_ssh_or_a_shell_could_take_apart_is_refused(name: str) -> None:
    with pytest.raises(SshError, match="not a host name"):
        asyncio.run(Ssh().resolve(name))


def test_the_users_configuration_and_login_are_honoured(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host h1\n HostName 198.18.0.1\n Port 2222\n IdentityFile /k/one\n IdentityFile /k/two\n")
    found = asyncio.run(Ssh(config, "admin").resolve("h1"))
    assert (found.get("hostname"), found.get("port"), found.get("user")) == ("198.18.0.1", "2222", "admin")
    assert found.identity_files == ("/k/one", "/k/two")
    assert found.processes == 1


def test_a_configuration_that_ssh_refuses_is_reported(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("NoSuchThing yes\n")
    with pytest.raises(SshError, match="ssh does not accept its configuration"):
        asyncio.run(Ssh(config).resolve("h1"))


def test_each_jump_is_a_process_more() -> None:
    assert resolved(proxyjump="a,b").processes == 3
    assert resolved(proxycommand="ssh -W %h:%p gate").processes == 2
    assert resolved(proxycommand="nc %h %p").processes == 1


@pytest.mark.parametrize("setting", ["proxyjump", "proxycommand", "knownhostscommand"])
def test_a_host_behind_a_proxy_is_started_from_the_service_node(setting: str) -> None:
    known = KnownHosts([f"h1 {KEY}"])
    assert ssh.route(resolved(**{setting: "gate"}), known) is None
    assert ssh.route(resolved(**{setting: "none"}), known) is not None


def test_a_host_takes_its_known_keys_along_and_no_others() -> None:
    known = KnownHosts([f"h1,198.18.0.1 {KEY}\nh2 {KEY}2\n", f"@revoked h1 {KEY}3\n# h1 comment\n"])
    way = ssh.route(resolved(stricthostkeychecking="true"), known)
    assert way == seed_frames.Route(
        hostname="h1",
        port=22,
        user="root",
        strict="true",
        known_hosts=(f"h1,198.18.0.1 {KEY}", f"@revoked h1 {KEY}3"),
    )


def test_a_host_on_another_port_is_known_by_it() -> None:
    known = KnownHosts([f"[h1]:2222 {KEY}\nh1 {KEY}2\n[h1]:3333 {KEY}3"])
    way = ssh.route(resolved(port="2222"), known)
    assert way
    assert way.known_hosts == (f"[h1]:2222 {KEY}", f"h1 {KEY}2")


def test_a_host_with_an_alias_is_known_by_it() -> None:
    way = ssh.route(resolved(hostkeyalias="cluster"), KnownHosts([f"h1 {KEY}\ncluster {KEY}2"]))
    assert way
    assert (way.alias, way.known_hosts) == ("cluster", (f"cluster {KEY}2",))


@pytest.mark.parametrize(
    ("strict", "shared"), [("ask", False), ("true", False), ("accept-new", False), ("false", True)]
)
def test_a_host_whose_key_is_unknown_is_left_to_the_users_own_ssh(strict: str, *, shared: bool) -> None:
    way = ssh.route(resolved(stricthostkeychecking=strict), KnownHosts([]))
    assert (way is not None) is shared


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("name", ["h1", "H1.Example", "[h1]:2222", "x.lab", "no.lab", "198.18.0.1", "absent"])
def test_known_hosts_are_found_as_ssh_keygen_finds_them(tmp_path: Path, name: str, *, hashed: bool) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(
        f"h1,198.18.0.1 {KEY}\n[h1]:2222 {KEY}\nh1.example {KEY}\n@cert-authority h1 {KEY}\n"
        + ("" if hashed else f"*.lab,!no.lab {KEY}\n@cert-authority *.example {KEY}\n")
    )
    if hashed:
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, capture_output=True)
    # ssh looks for names in lower case, whatever is typed; ssh-keygen leaves that to its caller.
    words = ["ssh-keygen", "-F", name.lower(), "-f", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    theirs = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert sorted(KnownHosts([file.read_text()]).lines(name)) == sorted(theirs)


async def forwarded(files: list[Path], *, only: bool = False) -> tuple[str, str, str]:
    """The socket, the problem, and what the agent behind the socket holds."""
    settings = {"identitiesonly": "yes"} if only else {}
    wanted = Resolved(settings=settings, identity_files=tuple(map(str, files)))
    async with ssh.forwarded_agent(wanted) as (socket, problem):
        done = await asyncio.to_thread(
            subprocess.run,
            ["ssh-add", "-L"],
            capture_output=True,
            text=True,
            env={**os.environ, "SSH_AUTH_SOCK": socket},
            check=False,
        )
    return socket, problem, done.stdout


def public(file: Path) -> str:
    return Path(f"{file}.pub").read_text().split()[1]


def test_a_private_agent_holds_the_identity_file_and_ends_with_the_run(
    keyed: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    socket, problem, held = asyncio.run(forwarded([keyed["open"], keyed["closed"]]))
    assert (problem, public(keyed["open"]) in held, public(keyed["closed"]) in held) == ("", True, False)
    assert not Path(socket).exists()
    assert not Path(socket).parent.exists()


def test_without_a_usable_key_no_agent_is_forwarded(keyed: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert asyncio.run(forwarded([]))[:2] == (
        "",
        "there is no SSH agent with a key, and no identity file to fill one with",
    )
    socket, problem, _ = asyncio.run(forwarded([keyed["closed"]]))
    assert (socket, problem) == ("", "the identity files cannot be read without a passphrase: load one with ssh-add")


async def with_users_agent(
    files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, *, only: bool
) -> tuple[str, str]:
    """The user's agent holds the closed key; returns its socket and the one that is forwarded."""
    async with ssh._private_agent([str(files["open"])]) as (users, _):
        monkeypatch.setenv("SSH_AUTH_SOCK", users)
        return users, (await forwarded([files["open"]], only=only))[0]


def test_the_users_own_agent_is_forwarded_where_it_has_the_key(
    keyed: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    users, used = asyncio.run(with_users_agent(keyed, monkeypatch, only=False))
    assert used == users


def test_where_only_named_keys_are_to_be_offered_an_agent_with_just_those_is_forwarded(
    keyed: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    users, used = asyncio.run(with_users_agent(keyed, monkeypatch, only=True))
    assert used
    assert used != users


def test_a_session_forwards_the_agent_or_forbids_it() -> None:
    terms = seed_frames.Terms(fleet="f1")
    with_agent = Ssh().command("h1", "true", terms, "/run/agent")
    assert "-A" in with_agent.argv
    assert with_agent.env["SSH_AUTH_SOCK"] == "/run/agent"
    assert with_agent.argv[-3:] == ("--", "h1", "true")
    assert "-a" in Ssh().command("h1", "true", terms, "").argv
