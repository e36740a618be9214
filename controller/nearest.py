"""What somebody may have meant who named something that is not there. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from controller.hosts import fold

#: How alike two names must be (difflib's ratio, 0 to 1) for one to be taken as a slip of the other: `sofia` and
#: `sophia` are at 0.73, `rak` and `rack` at 0.86; `nope` and `one`, which nobody would confuse, at 0.57.
_ALIKE = 0.7
#: So many names are listed where none is near: more are no help in a sentence.
_LISTED = 10
#: Names that are no hosts and for each of which a near one is looked for: 2 ms each among 1,000 hosts.
_SLIPS = 5
#: Characters that a sentence has for a folded set of hosts.
_SHOWN = 200


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one name that is likely to be meant; None where none is near.

    Names that differ in their numbers alone are different things, and not slips: `h99` is not meant for `h9`.
    """
    from difflib import get_close_matches  # 2 ms that only those pay who made a mistake

    likely = [one for one in dict.fromkeys(known) if _letters(one) != _letters(name)]
    found = get_close_matches(name, likely, n=1, cutoff=_ALIKE)
    return found[0] if found else None


def hint(name: str, known: Iterable[str], *, more: str) -> str:
    """The end of a sentence that says that there is no `name`: the nearest one, or those that there are. `more` is the
    command that lists all."""
    names = list(dict.fromkeys(known))
    near = nearest(name, names)
    if near is not None:
        return f"the nearest is {near}"
    if not names:
        return f"there are none; see `{more}`"
    listed = ", ".join(names[:_LISTED])
    return f"there are {listed} and {len(names) - _LISTED} more: `{more}`" if names[_LISTED:] else f"there are {listed}"


def not_here(strangers: Collection[str], known: Collection[str]) -> str:
    """Who is no member, whom each may have been meant for, and who there is."""
    near = {name: nearest(name, known) for name in strangers} if len(strangers) <= _SLIPS else {}
    told = [f"{name} (the nearest is {one})" for name, one in near.items() if one is not None]
    others = fold(name for name in strangers if near.get(name) is None)
    fleet = fold(known)
    has = "it has none" if not known else f"it has {fleet}" if len(fleet) <= _SHOWN else "`ctl get hosts` lists it"
    return f"not in this fleet: {', '.join([*told, others] if others else told)}; {has}, `ctl up` takes hosts in"


def _letters(name: str) -> str:
    return re.sub("[0-9]+", "0", name)
