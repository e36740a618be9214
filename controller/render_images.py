"""Images as people read them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controller.api import KnownImage
from controller.hosts import fold
from controller.progress import size_text
from controller.render import clean, label
from controller.tables import table
from protocol.vms import ImageResult, ImageState

_BAD = (ImageState.WRONG, ImageState.FAILED)
_THERE = (ImageState.PRESENT, ImageState.RIGHT, ImageState.WRONG, ImageState.IN_USE)

Answers = Mapping[str, Sequence[ImageResult]]


def added(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was pushed where."""
    return "".join(
        f"{row['name']}: {row['digest']}, on {label(row['hosts']) if row['hosts'] else 'no host'}\n" for row in rows
    )


def add_troubles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each reason why hosts have not got an image."""
    lines = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for host, why in row["hosts_failed"].items():
            reasons.setdefault(why, []).append(host)
        lines += [f"{row['name']}: {label(hosts)}: {clean(why)}" for why, hosts in reasons.items()]
    return lines


def listing(known: Sequence[KnownImage], answers: Answers) -> str:
    """A line for each image: on record or on hosts."""
    rows = []
    for digest, name, image in _every(known, answers):
        hosts = [host for host, results in answers.items() if any(_is(one, digest) for one in results)]
        sizes = [one.size for results in answers.values() for one in results if _is(one, digest)]
        size = image.size if image is not None else max(sizes, default=0)
        users = _users(digest, image, answers)
        rows.append(
            (digest[:12], name, size_text(size), image.format if image else "", str(users), fold(hosts) or "none")
        )
    return table(("DIGEST", "NAME", "SIZE", "FORMAT", "VMS", "HOSTS"), rows)


def _is(result: ImageResult, digest: str) -> bool:
    return result.digest == digest and result.state in _THERE


def _every(known: Sequence[KnownImage], answers: Answers) -> list[tuple[str, str, KnownImage | None]]:
    found: dict[str, tuple[str, str, KnownImage | None]] = {one.digest: (one.digest, one.name, one) for one in known}
    for results in answers.values():
        for result in results:
            found.setdefault(result.digest, (result.digest, "", None))
    return list(found.values())


def _users(digest: str, image: KnownImage | None, answers: Answers) -> int:
    """How many VMs are made of it, by the record and by hosts: whichever knows of more."""
    there = sum(one.vms for results in answers.values() for one in results if one.digest == digest)
    return max(there, image.used if image is not None else 0)


def list_object(known: Sequence[KnownImage], answers: Answers) -> Any:
    """The same for programs."""
    return [
        {
            "digest": digest,
            "name": name,
            "size": image.size if image is not None else None,
            "format": image.format if image is not None else None,
            "vms": _users(digest, image, answers),
            "hosts": {
                host: {"state": one.state.value, "vms": one.vms, "detail": one.detail}
                for host, results in answers.items()
                for one in results
                if one.digest == digest
            },
        }
        for digest, name, image in _every(known, answers)
    ]


def removed(known: Sequence[KnownImage], answers: Answers) -> str:
    """What was removed where."""
    names = {one.digest: one.name for one in known}
    lines = []
    for digest in dict.fromkeys(one.digest for results in answers.values() for one in results):
        by_state: dict[str, list[str]] = {}
        for host, results in answers.items():
            for one in results:
                if one.digest == digest:
                    by_state.setdefault(one.state.value, []).append(host)
        told = ", ".join(f"{state} on {label(hosts)}" for state, hosts in by_state.items())
        name = f" ({names[digest]})" if digest in names else ""
        lines.append(f"{digest[:12]}{name}: {told}\n")
    return "".join(lines) or "nothing to remove\n"


def not_right(known: Sequence[KnownImage], answers: Answers) -> list[str]:
    """A line for each image that is not as it should be."""
    names = {one.digest: one.name for one in known}
    return [
        f"{host}: {one.digest[:12]}{f' ({names[one.digest]})' if one.digest in names else ''} {one.state.value}"
        + (f": {clean(one.detail)}" if one.detail else "")
        for host, results in answers.items()
        for one in results
        if one.state in (*_BAD, ImageState.IN_USE)
    ]
