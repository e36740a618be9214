"""Sets of hosts as people write and read them: ranges (`h[0-63]`), lists, set operators, groups, and files of names.

The notation is ClusterShell's (https://clustershell.readthedocs.io/en/latest/tools/nodeset.html); its groups are ours
(see `controller.groups`). ClusterShell is loaded only where there is something to expand or fold: it takes as long as
the rest of a short command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from controller.status import CtlError, ExitStatus
from protocol.limits import MAX_RANK

#: A fleet has no more hosts than it has ranks.
MOST = MAX_RANK + 1

# RFC 1123, section 2.1, and the underscore, which cluster names do have.
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# Patterns, which `re` compiles at their first use and keeps: most commands need none.
_NAME = rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*"
_ADDRESS = r"[0-9.]+"
_OPERATOR = r"[\[\],!&^]"
_RANGE = r"([0-9]+)-([0-9]+)"
_NAMED = r"[@*?]"


def expand(text: str, groups: Callable[[], Any] | None = None) -> tuple[str, ...]:
    """The names in `text`, each once, in its order; none for an empty text.

    `groups` gives what knows groups (controller.groups.Groups), and is called only where there are any. Raises CtlError
    (USAGE) where the text can't be read, names a group that nobody knows, or holds more than MOST names.
    """
    text = text.strip()
    named = re.search(_NAMED, text) is not None
    if named and groups is None:
        raise _wrong(text, "neither groups nor wildcards can be named here; list the hosts or ranges, as in h[0-63]")
    if not text:
        return ()
    if "^/" in text or text.startswith("^"):  # as pdsh has it
        raise _wrong(text, "hosts that stand in a file are given by --hostfile FILE")
    names = _expanded(text, groups if named else None) if named or re.search(_OPERATOR, text) else (text,)
    for name in names:
        if not re.fullmatch(_NAME, name):
            raise _wrong(text, f"{name[:80]!r} is no host name; separate hosts by commas, as in h1,h[3-7]")
    return names


def _expanded(text: str, groups: Callable[[], Any] | None) -> tuple[str, ...]:
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    # ClusterShell holds every number of a range in memory, so one that is far too long must not reach it.
    for first, last in re.findall(_RANGE, text):
        if int(last) - int(first) >= MOST:
            raise _wrong(text, f"{first}-{last} is more than the {MOST} hosts that a fleet can have")
    try:
        nodes = NodeSet(text, resolver=RESOLVER_NOGROUP if groups is None else groups())
        if len(nodes) > MOST:
            raise _wrong(text, f"it names {len(nodes)} hosts and a fleet can have {MOST}")
        return tuple(nodes)
    except NodeSetException as error:
        raise _wrong(text, str(error)) from error


def _wrong(text: str, why: str) -> CtlError:
    return CtlError(f"host set {text[:80]!r}: {why}", ExitStatus.USAGE)


def fold(names: Iterable[str]) -> str:
    """The names as one set, `h[0-3,7]`. The empty set is an empty text."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) <= 1:
        return "".join(distinct)
    numbered = _fold_numbered(distinct)
    if numbered is not None:
        return numbered
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        return str(NodeSet.fromlist(distinct, resolver=RESOLVER_NOGROUP))
    except NodeSetException:
        return ",".join(distinct)


def _fold_numbered(names: list[str]) -> str | None:
    """The set of several names that differ in one number alone, as ClusterShell writes it; None for all others. To load
    ClusterShell takes as long as the rest of a short command."""
    around, numbers = None, []
    for name in names:
        prefix, digits, domain = _parts(name)
        letters = prefix.replace("-", "").replace("_", "")
        if not (digits and letters.isascii() and letters.isalpha()) or (digits[0] == "0" and digits != "0"):
            return None
        if around is None:
            around = (prefix, domain)
        elif around != (prefix, domain):
            return None
        numbers.append(int(digits))
    if around is None:
        return None
    numbers.sort()
    # A range ends where the number after it is missing.
    ends = [place for place, number in enumerate(numbers[:-1]) if numbers[place + 1] != number + 1]
    ranges, first = [], 0
    for last in [*ends, len(numbers) - 1]:
        ranges.append(str(numbers[first]) if first == last else f"{numbers[first]}-{numbers[last]}")
        first = last + 1
    return f"{around[0]}[{','.join(ranges)}]{around[1]}"


def _parts(name: str) -> tuple[str, str, str]:
    """A name as what stands before its number, the number's digits, and what follows from the first dot on."""
    host, dot, domain = name.partition(".")
    prefix = host.rstrip("0123456789")
    return prefix, host[len(prefix) :], dot + domain


def counted(name: str) -> tuple[str, str, int, str]:
    """What a name is sorted by, so that h2 comes before h10."""
    prefix, digits, domain = _parts(name)
    return prefix, domain, int(digits or 0), digits


def names_in(text: str, *, file: str, expand: Callable[[str], tuple[str, ...]] = expand) -> tuple[str, ...]:
    """The hosts in a file: one name or range a line, `#` begins a comment, duplicates count once.

    An OAR node file names a host once for each of its cores. Raises CtlError (USAGE) with the line.
    """
    found: dict[str, None] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        for word in line.partition("#")[0].split():
            try:
                found.update(dict.fromkeys(expand(word)))
            except CtlError as error:
                raise CtlError(f"{file}:{number}: {error}", error.status) from error
    return tuple(found)


def site_of(name: str) -> str:
    """The site of a host by its name: what stands between its first and second dot.

    `sophia` for `suno-3.sophia.grid5000.fr`. Empty for plain names and addresses, which say nothing of a site.
    """
    labels = name.split(".")
    return labels[1] if len(labels) > 1 and not re.fullmatch(_ADDRESS, name) else ""
