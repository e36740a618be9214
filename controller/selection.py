"""Which hosts a person means: all ways of saying so, and one place where they come together.

`-w`, `-g`, `-a` and a file of hosts each add hosts, `-l` keeps those with a label, `-x` and `-X` leave hosts out, and
`--pick` takes some of the rest at random.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from controller.hosts import expand, fold, names_in
from controller.status import CtlError, ExitStatus, Mistakes

if TYPE_CHECKING:
    from pathlib import Path

    from controller.groups import Facts, Groups, Member

#: Commas between groups, and not those within brackets: `rack[1,3],gpu`.
_BETWEEN = r",(?![^\[\]]*\])"


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What was said of the hosts that are meant. One that says nothing stands for all of the fleet."""

    where: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    exclude_groups: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    everybody: bool = False
    hostfile: tuple[str, ...] = ()
    pick: int | None = None

    def __bool__(self) -> bool:
        """Whether anything was said."""
        return self != EVERYBODY

    @property
    def adds(self) -> bool:
        """Whether hosts were named, and not only narrowed down."""
        return bool(self.where or self.groups or self.hostfile or self.everybody)

    def words(self) -> str:
        """The options again, for an error."""
        given = [
            *[f"-w {text}" for text in self.where],
            *[f"-g {text}" for text in self.groups],
            *[f"--hostfile {text}" for text in self.hostfile],
            *(["-a"] if self.everybody else []),
            *[f"-l {text}" for text in self.labels],
            *[f"-x {text}" for text in self.exclude],
            *[f"-X {text}" for text in self.exclude_groups],
            *([] if self.pick is None else [f"--pick {self.pick}"]),
        ]
        return " ".join(given)


EVERYBODY = Selection()


class Chooser:
    """Reads host sets with all groups that are known."""

    def __init__(self, facts: Facts, home: Callable[[], Path]) -> None:
        """`home` says where fleets live."""
        self._facts = facts
        self._home = home
        self._members: Sequence[Member] | None = None
        self._groups: Groups | None = None

    # --- facts, each asked for once -----------------------------------------------------------------------------------

    def members(self) -> Sequence[Member]:
        """The hosts of the fleet."""
        if self._members is None:
            self._members = self._facts.members()
        return self._members

    def failed(self, job: int | None) -> Sequence[str]:
        """The hosts on which a job did not end well."""
        return self._facts.failed(job)

    @property
    def groups(self) -> Groups:
        """All groups."""
        if self._groups is None:
            from controller.groups import Groups

            self._groups = Groups(self._home(), self)
        return self._groups

    def regroup(self, hosts: Iterable[str]) -> str:
        """Hosts folded, those that make up a group under its name: `@rack1,h7`."""
        from ClusterShell.NodeSet import NodeSet, NodeSetException

        try:
            return str(NodeSet.fromlist(list(hosts), resolver=self.groups).regroup())
        except NodeSetException:
            return fold(hosts)

    # --- sets ---------------------------------------------------------------------------------------------------------

    def expand(self, text: str) -> tuple[str, ...]:
        """The hosts of a set. Raises CtlError (USAGE)."""
        return expand(text, lambda: self.groups)

    def expand_all(self, texts: Iterable[str]) -> dict[str, None]:
        """The hosts of several, each once. Raises CtlError with what is wrong in any of them."""
        found: dict[str, None] = {}
        wrong = Mistakes()
        for text in texts:
            with wrong:
                found.update(dict.fromkeys(self.expand(text)))
        wrong.check()
        return found

    def choose(self, asked: Selection, *, known: bool = False) -> tuple[str, ...] | None:
        """The hosts that are meant; None where nothing was said, for all of the fleet. With `known` it is looked at
        here whether the fleet has them, which else the service does when it is asked for something.

        Raises CtlError with all that is wrong, and with NO_TARGET where none is left: nobody who named hosts means all
        of them.
        """
        if not asked:
            return None
        found: dict[str, None] = {}
        left_out: dict[str, None] = {}
        wrong = Mistakes()
        with wrong:
            found |= self.expand_all([*asked.where, *_as_sets(asked.groups), *(["@*"] if asked.everybody else [])])
        for name in asked.hostfile:
            with wrong:
                found |= dict.fromkeys(names_in(read_text(name), file=name, expand=self.expand))
        with wrong:
            left_out |= self.expand_all([*asked.exclude, *_as_sets(asked.exclude_groups)])
        with wrong:
            if not asked.adds:
                found = {member.name: None for member in self.members()}
            if asked.labels:
                from controller.groups import labelled

                carry = set(labelled(self.members(), asked.labels))
                found = {name: None for name in found if name in carry}
        chosen = tuple(name for name in found if name not in left_out)
        with wrong:
            if known:
                self._check_known(chosen)
        wrong.check()
        if not chosen:
            raise CtlError(
                f"no host matches {asked.words()}: `ctl get hosts` lists those of the fleet", ExitStatus.NO_TARGET
            )
        return chosen if asked.pick is None else _some(chosen, asked.pick)

    def _check_known(self, hosts: Iterable[str]) -> None:
        from controller.nearest import not_here

        fleet = dict.fromkeys(member.name for member in self.members())
        strangers = [name for name in hosts if name not in fleet]
        if strangers:
            raise CtlError(not_here(strangers, fleet), ExitStatus.NO_TARGET)


def read_text(path: str) -> str:
    """A file that a person wrote; `-` is standard input. Raises CtlError (USAGE) where it can't be read."""
    try:
        from pathlib import Path

        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
    except UnicodeDecodeError as error:
        raise CtlError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text", ExitStatus.USAGE) from error


def _as_sets(groups: Iterable[str]) -> list[str]:
    """`rack1,@gpu` as `@rack1` and `@gpu`."""
    return [f"@{name.strip().removeprefix('@')}" for text in groups for name in re.split(_BETWEEN, text)]


def _some(hosts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the hosts, drawn at random, in their order."""
    import random

    if count >= len(hosts):
        return tuple(hosts)
    drawn = set(random.SystemRandom().sample(range(len(hosts)), count))
    return tuple(name for place, name in enumerate(hosts) if place in drawn)
