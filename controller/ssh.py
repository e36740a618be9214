"""The user's own OpenSSH: how it reaches hosts, which keys it knows, and the SSH agent that a bootstrap forwards.

The client and its configuration are used as they are (ssh_config(5)): `ssh -G` says what it would do for a
host, and sessions from the service node leave everything to it. For sessions from one host to another what
it said goes along, with the known_hosts lines of that one host; the user's private key stays on the service
node.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fnmatch
import hashlib
import hmac
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from agent.seed_frames import Route, Terms
from agent.seed_session import Command, ssh_options

# What ssh may be given as a host: it must be no option and nothing that a shell or a ProxyCommand would take apart.
NAME = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%\[\]-]{0,254}")
KEY_LIFETIME = 4 * 3600  # seconds that a private agent holds the keys, should it ever outlive the run
DEADLINE = 20.0  # seconds for a helper program that has nothing to wait for
LOOSE = ("no", "off", "false")  # values of StrictHostKeyChecking that take any key


class SshError(Exception):
    """The user's SSH cannot be used as it is; the message is one sentence."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What `ssh -G` says about a host."""

    settings: Mapping[str, str]
    identity_files: tuple[str, ...]

    def get(self, name: str) -> str:
        """A setting, or an empty string where it is unset or `none`."""
        value = self.settings.get(name, "")
        return "" if value == "none" else value

    @property
    def proxied(self) -> bool:
        """Whether the host is reached through something that only the service node has."""
        return bool(self.get("proxyjump") or self.get("proxycommand") or self.get("knownhostscommand"))

    @property
    def processes(self) -> int:
        """How many ssh processes a session takes: each jump is one more."""
        jumps = self.get("proxyjump")
        if jumps:
            return 1 + len(jumps.split(","))
        return 2 if re.search(r"\bssh\b", self.get("proxycommand")) else 1

    @property
    def known_hosts_files(self) -> list[Path]:
        """Where the host's key may be known, the user's files first."""
        words = (self.get("userknownhostsfile") + " " + self.get("globalknownhostsfile")).split()
        return [Path(word).expanduser() for word in words if "%" not in word]


class KnownHosts:
    """Lines of known_hosts files (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT), found by host."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Read whole files' texts."""
        self._plain: dict[str, list[str]] = {}
        self._hashed: list[tuple[bytes, bytes, str]] = []
        self._patterns: list[tuple[list[str], str]] = []
        for text in texts:
            for line in text.splitlines():
                self._add(line.strip())

    def _add(self, line: str) -> None:
        words = line.split()
        if not words or line.startswith("#"):
            return
        names = words[1] if words[0].startswith("@") and len(words) > 1 else words[0]
        if names.startswith("|1|"):
            with contextlib.suppress(ValueError):
                salt, digest = (base64.b64decode(part, validate=True) for part in names[3:].split("|"))
                self._hashed.append((salt, digest, line))
        elif any(mark in names for mark in "*?!"):
            self._patterns.append((names.lower().split(","), line))
        else:
            for name in names.lower().split(","):
                self._plain.setdefault(name, []).append(line)

    def lines(self, name: str) -> list[str]:
        """The lines that concern `name`, which is a host name, an address, or `[either]:port`."""
        name = name.lower()
        found = list(self._plain.get(name, ()))
        for salt, digest, line in self._hashed:
            if hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest):
                found.append(line)
        for patterns, line in self._patterns:
            refused = any(_matches(name, p[1:]) for p in patterns if p.startswith("!"))
            if not refused and any(_matches(name, p) for p in patterns if not p.startswith("!")):
                found.append(line)
        return found


def _matches(name: str, pattern: str) -> bool:
    # Brackets are no character class in known_hosts: they stand around a name with a port.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def parse_settings(output: str) -> Resolved:
    """Read what `ssh -G` prints: a keyword and its value a line."""
    settings: dict[str, str] = {}
    files = []
    for line in output.splitlines():
        name, _, value = line.partition(" ")
        settings.setdefault(name.lower(), value.strip())
        if name.lower() == "identityfile":
            files.append(value.strip())
    return Resolved(settings=settings, identity_files=tuple(files))


def route(resolved: Resolved, known: KnownHosts) -> Route | None:
    """How another host reaches this one, or None where only the service node can: through its proxy, or to learn a key.

    A host whose key is not known is left to the service node as well: there, the user's ssh decides about
    it and remembers.
    """
    hostname, port, alias = resolved.get("hostname"), int(resolved.get("port") or 22), resolved.get("hostkeyalias")
    strict = resolved.get("stricthostkeychecking") or "ask"
    if resolved.proxied or not NAME.fullmatch(hostname):
        return None
    names = [alias] if alias else [f"[{hostname}]:{port}", hostname] if port != 22 else [hostname]
    lines = tuple(dict.fromkeys(line for name in names for line in known.lines(name)))
    if not lines and strict not in LOOSE:
        return None
    return Route(hostname=hostname, port=port, user=resolved.get("user"), strict=strict, alias=alias, known_hosts=lines)


class Ssh:
    """The user's client, with the options given to ctl."""

    def __init__(self, config: Path | None = None, login: str = "") -> None:
        """`config` is the file of -F, `login` the user of -l."""
        self._base = ["ssh"]
        if config:
            self._base += ["-F", str(config)]
        if login:
            self._base += ["-l", login]
        self._known: dict[tuple[Path, ...], KnownHosts] = {}

    async def resolve(self, name: str) -> Resolved:
        """What the configuration says about a host; raises SshError."""
        if not NAME.fullmatch(name):
            raise SshError("not a host name")
        try:
            status, output, errors = await _run([*self._base, "-G", "--", name], {})
        except OSError as error:
            raise SshError(f"ssh cannot be run: {error.strerror}; install the OpenSSH client") from error
        except TimeoutError:
            raise SshError(f"ssh did not read its configuration within {DEADLINE:.0f} s: see to Match exec") from None
        if status:
            said = errors.strip().splitlines()
            raise SshError(f"ssh does not accept its configuration: {said[-1] if said else f'exit {status}'}")
        return parse_settings(output)

    def known(self, resolved: Resolved) -> KnownHosts:
        """The known hosts that concern a host, each file read once."""
        files = tuple(resolved.known_hosts_files)
        if files not in self._known:
            texts = []
            for path in files:
                with contextlib.suppress(OSError):
                    texts.append(path.read_text(errors="replace"))
            self._known[files] = KnownHosts(texts)
        return self._known[files]

    def command(self, name: str, remote: str, terms: Terms, agent: str) -> Command:
        """The session to a host; `agent` is the socket to forward, empty for none."""
        argv = [*self._base, "-A" if agent else "-a", *ssh_options(terms, {}), "--", name, remote]
        return Command(argv=tuple(argv), env={**os.environ, **({"SSH_AUTH_SOCK": agent} if agent else {})})


@contextlib.asynccontextmanager
async def forwarded_agent(resolved: Resolved) -> AsyncIterator[tuple[str, str]]:
    """An SSH agent to forward while a bootstrap lasts: its socket, or an empty one and why there is none.

    It is the user's own, if that holds the keys that the configuration names. Otherwise one is started for
    the run, filled from the identity files that need no passphrase, and ended with the run.
    """
    named = resolved.get("identityagent")
    socket = named if named.startswith("/") else os.environ.get("SSH_AUTH_SOCK", "")
    held = await _keys_of_agent(socket) if socket else set()
    files = _existing(resolved.identity_files)
    wanted = await _public_keys(files)
    # An agent with many keys may offer too many before the right one; here the configuration says which it is.
    picky = resolved.get("identitiesonly") in ("yes", "true") and files
    if held and not picky and (not wanted or held & wanted):
        yield socket, ""
        return
    async with _private_agent(files) as (own, problem):
        if own:
            yield own, ""
        elif held:
            yield socket, ""
        else:
            yield "", problem


def _existing(files: Iterable[str]) -> list[str]:
    return [str(path) for path in (Path(file).expanduser() for file in files) if path.is_file()]


async def _keys_of_agent(socket: str) -> set[str]:
    status, output, _ = await _run(["ssh-add", "-L"], {"SSH_AUTH_SOCK": socket})
    return _blobs(output) if status == 0 else set()


async def _public_keys(files: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for file in files:
        status, output, _ = await _run(["ssh-keygen", "-y", "-P", "", "-f", file], {})
        found |= _blobs(output) if status == 0 else _published(file)
    return found


def _published(file: str) -> set[str]:
    """The public key beside an identity file that has a passphrase."""
    try:
        return _blobs(Path(file + ".pub").read_text(errors="replace"))
    except OSError:
        return set()


def _blobs(text: str) -> set[str]:
    return {words[1] for words in map(str.split, text.splitlines()) if len(words) > 1}


@contextlib.asynccontextmanager
async def _private_agent(files: Sequence[str]) -> AsyncIterator[tuple[str, str]]:
    """An ssh-agent that holds `files`; it ends with its command (ssh-agent(1)), and so with this process."""
    if not files:
        yield "", "there is no SSH agent with a key, and no identity file to fill one with"
        return
    directory = tempfile.mkdtemp(prefix="canopy-")
    socket = str(Path(directory, "agent"))
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        process = await asyncio.create_subprocess_exec(
            *("ssh-agent", "-a", socket, "sh", "-c", "echo $SSH_AGENT_PID; exec cat"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        if process.stdin is None or process.stdout is None:
            raise SshError("ssh-agent was started without pipes")
        stack.push_async_callback(process.wait)
        stack.callback(process.stdin.close)
        pid = int(await asyncio.wait_for(process.stdout.readline(), DEADLINE) or 0)
        stack.callback(_terminate, pid)
        words = ["ssh-add", "-q", "-t", str(KEY_LIFETIME), *files]
        # Without a terminal and without a program to ask, ssh-add skips the keys that have a passphrase.
        await _run(words, {"SSH_AUTH_SOCK": socket, "SSH_ASKPASS_REQUIRE": "never"})
        if await _keys_of_agent(socket):
            yield socket, ""
        else:
            yield "", "the identity files cannot be read without a passphrase: load one with ssh-add"


def _terminate(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


async def _run(words: Sequence[str], env: Mapping[str, str]) -> tuple[int, str, str]:
    """Run a helper program that must not ask anything; returns its status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), DEADLINE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace"), errors.decode(errors="replace")
