"""One SSH session with a seed at its far end: the ssh process, the way in, and why it failed if it did."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence

import msgspec

from agent.seed_frames import MAX_UP, BadFrame, Terms, Up, up

MARKER = b"CANOPY-SEED 1"
NO_PYTHON = b"CANOPY-NONE"
NOISE = 1 << 18  # bytes that login scripts may print ahead of the seed's first word
STDERR = 1 << 13  # bytes of ssh's standard error that are kept, the last ones
EXIT_GRACE = 5.0  # seconds for ssh to say why it ends


class Failed(Exception):
    """A host cannot be started; the message is one sentence."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """An ssh command: argument vector and environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def ssh_options(terms: Terms, more: Mapping[str, str]) -> list[str]:
    """The options that every session of a bootstrap has."""
    options = {
        "BatchMode": "yes",  # sessions run side by side: nobody could tell which one asks
        "ConnectTimeout": str(max(1, round(terms.connect_timeout))),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ControlMaster": "no",  # a shared connection would outlive its session, and the agent's forwarding with it
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "RequestTTY": "no",
        "LogLevel": "INFO",  # below it, ssh does not say why it fails
        **more,
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def remote_command(seed: bytes) -> str:
    """What sshd is to run: find a Python, and have it read the seed from standard input.

    It is the same for every host, holds nothing from outside, and no quote or exclamation mark inside, so
    that csh and fish pass it on unchanged too. The distribution's own Python comes first: it alone can
    import the distribution's libvirt module.
    """
    size = len(seed)
    python = (
        "import os,sys;sys.version_info<(3,10) and sys.exit(86);b=bytearray();"
        f"[b.extend(os.read(0,{size}-len(b)) or sys.exit(87)) for _ in iter(lambda:len(b)<{size},False)];"
        "exec(bytes(b))"
    )
    names = "/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 python3.10 /usr/local/bin/python3"
    return (
        f"exec sh -c 'f=;r=;for n in {names};do p=$(command -v $n)||continue;"
        'q=$(readlink -f "$p" 2>/dev/null||echo "$p");case " $r " in *" $q "*)continue;;esac;r="$r $q";'
        f'"$p" -I -c "{python}";s=$?;case $s in 2|86|126|127);;*)exit $s;;esac;f="$f $p";done;'
        'v=;for p in $f;do v="$v, ${p##*/} $("$p" -c "import sys;print(sys.version.split()[0])")";done;'
        f'echo;echo "{NO_PYTHON.decode()}$v"\''
    )


_REASONS: Sequence[tuple[str, str]] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "host key verification failed: the key has changed; if that is right, drop the old one with ssh-keygen -R",
    ),
    (
        r"(?i)host key is known for|host key verification failed",
        "host key verification failed: the host's key is not known; log in once with ssh, or add it to known_hosts",
    ),
    (
        r"(?i)could not resolve hostname.*(name or service not known|no address associated)",
        "no such host name",
    ),
    (
        r"(?i)too many authentication failures",
        "too many authentication failures: set IdentitiesOnly and IdentityFile for this host in the SSH configuration",
    ),
    (
        r"(?i)permission denied \(([a-z0-9,-]+)\)",
        "permission denied ({0}): give the host a key that the SSH agent or configuration holds",
    ),
    (r"(?i)this account is currently not available|nologin", "the account may not log in"),
)  # the same starter would be told the same again
_PASSING: Sequence[tuple[str, str]] = (
    (r"(?i)could not resolve hostname", "the host's name could not be resolved"),
    (r"(?i)connection refused", "connection refused"),
    (r"(?i)connection (to .* )?timed out|operation timed out", "no answer to SSH within {timeout:g} s"),
    (r"(?i)no route to host", "no route to host"),
    (r"(?i)network is unreachable", "network is unreachable"),
    (r"(?i)connection (closed|reset) by|kex_exchange_identification", "the host closed the SSH connection"),
)


def why(stderr: bytes, status: int | None, timeout: float) -> tuple[str, bool]:
    """One sentence for a session that ended early, and whether trying again is of no use.

    Equal causes give equal sentences, so that hosts can be grouped by them.
    """
    text = stderr.decode(errors="replace")
    for pattern, reason in (*_REASONS, *_PASSING):
        if found := re.search(pattern, text):
            return reason.format(*found.groups(), timeout=timeout), (pattern, reason) in _REASONS
    lines = text.strip().splitlines()
    said = f": {printable(lines[-1])}" if lines else ""
    return f"ssh ended with {status}{said}", False


def printable(text: str, limit: int = 200) -> str:
    """A host's words, without what a terminal would obey."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:limit]


class Session:
    """One ssh process and the seed at its far end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Take over a process with pipes for all three streams."""
        if not (process.stdin and process.stdout and process.stderr):
            raise ValueError("ssh was started without pipes")
        self._process = process
        self._input = process.stdin
        self._output = process.stdout
        self._stderr = bytearray()
        self._listening = asyncio.create_task(self._listen(process.stderr))

    @classmethod
    async def open(cls, command: Command) -> Session:
        """Start ssh in a process group of its own, so that its proxies end with it."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=command.env,
            start_new_session=True,
            limit=NOISE,
        )
        return cls(process)

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while part := await stream.read(4096):
            self._stderr += part
            del self._stderr[:-STDERR]

    async def write(self, content: bytes) -> None:
        """Send bytes; a seed that is gone shows on the next read."""
        self._input.write(content)
        with contextlib.suppress(ConnectionError):
            await self._input.drain()

    def post(self, content: bytes) -> None:
        """Send a few bytes without waiting."""
        if not self._input.is_closing():
            self._input.write(content)

    async def greet(self) -> None:
        """Skip what login scripts print, up to the seed's word; raises Failed where no Python runs it."""
        left = NOISE
        while left > 0:
            try:
                line = await self._output.readuntil(b"\n")
            except asyncio.LimitOverrunError:
                break
            left -= len(line)
            if line.strip() == MARKER:
                return
            if line.startswith(NO_PYTHON):
                found = line[len(NO_PYTHON) :].decode(errors="replace").strip(", \n")
                raise Failed(f"no Python 3.10 or newer: found {printable(found) or 'none'}")
        raise Failed(f"login scripts on the host print over {NOISE >> 10} KiB: have them be quiet without a terminal")

    async def receive(self) -> Up:
        """The next frame; raises EOFError at the end, Failed where the seed does not keep to the rules."""
        try:
            size = int.from_bytes(await self._output.readexactly(4), "big")
            if size > MAX_UP:
                raise Failed("the host's seed sent a frame over the limit")
            return up(await self._output.readexactly(size))
        except BadFrame:
            raise Failed("the host's seed sent a frame that is none") from None

    async def ended(self, timeout: float) -> tuple[str, bool]:
        """Why a session that is at its end did end."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), EXIT_GRACE)
            await asyncio.wait_for(self._listening, EXIT_GRACE)
        return why(bytes(self._stderr), self._process.returncode, timeout)

    async def close(self) -> None:
        """End ssh, with all that it started."""
        self._input.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        # Its pipes end with the group; only one who left the group could still hold them.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(self._drain(), self._listening), EXIT_GRACE)

    async def _drain(self) -> None:
        while await self._output.read(NOISE):
            pass
