"""infra.conf: nodes, VMs and which VM runs where, in the plain-text format of Entropy, a consolidation manager.

    #list of nodes
    suno-3 4 20 8                  name, CPUs, CPU capacity, memory capacity
    #list of VMs
    vm00 1 1 1 2147483647          name, vCPUs, CPU demand, memory demand, CPU cap (may be left out)
    #initial configuration
    suno-3 vm00 (vm01)             a node and its VMs; (vm) sleeps, (node) is offline, FARM holds waiting VMs
    #end of configuration

Demands may be written `now->wanted`. Numbers are Java ints, since Entropy is Java: 0 to 2147483647, CPUs and
vCPUs from 1. A CPU cap of 2147483647 is no cap. Units only have to agree within a file.

Documents lose line breaks. Where a header does not begin its line, or the text has one line only, the text is read
as a stream: cut at the headers, then at white space; nodes in fours; a VM is a name and the run of numbers after
it; in the mapping a declared node's name begins that node's list.

Either form is cut into rows first (`_lines`, `_stream`); rows declare nodes and VMs; the mapping is read last,
so that sections may come in any order.

Source of the format: Entropy's class entropy.configuration.parser.PlainTextConfigurationSerializer.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import msgspec

from controller.text_problems import Notice, Problem, Problems, TextError, cut
from protocol.vms import NAME_PATTERN

#: Larger files are refused: a million VMs are some 40 MiB.
MAX_BYTES = 64 << 20
#: Java's Integer.MAX_VALUE: the largest number of the format, and "no cap" in the CPU cap column.
NO_CAP = 2147483647

FARM = "FARM"
NODES = "#list of nodes"
VMS = "#list of VMs"
MAPPING = "#initial configuration"
END = "#end of configuration"
PLAN = "#Reconfiguration"

_NODE_COLUMNS = "name, CPUs, CPU capacity, memory capacity"
_VM_COLUMNS = "name, vCPUs, CPU demand, memory demand, and a CPU cap or nothing"
_HEADER = re.compile("|".join(text.replace(" ", r"\s+") for text in (NODES, VMS, MAPPING, END, PLAN)))
_NUMBER = re.compile(r"[+-]?[0-9]+(->[+-]?[0-9]+)?")
_VM_NAME = re.compile(NAME_PATTERN)
# RFC 1123, section 2.1, and the underscore, which DNS and SSH carry and which cluster names do have.
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")


class Node(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A host. `cpu_capacity` and `memory` are in the file's own units, for all `cpus` together."""

    name: str
    cpus: int
    cpu_capacity: int
    memory: int
    offline: bool = False


class Vm(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A VM and its place. `cpu` and `memory` are what it uses now; plans go by `…_wanted`, what it shall have.

    `cpu_cap` is the most CPU that it may use, in the unit of `Node.cpu_capacity`; None is no cap.
    `node` is None for a VM that waits for a place, in FARM or in no mapping at all.
    """

    name: str
    vcpus: int
    cpu: int
    cpu_wanted: int
    memory: int
    memory_wanted: int
    cpu_cap: int | None = None
    node: str | None = None
    sleeping: bool = False


class Infra(msgspec.Struct, frozen=True, kw_only=True):
    """What infra.conf says; nodes and VMs in the order of their declaration."""

    nodes: tuple[Node, ...] = ()
    vms: tuple[Vm, ...] = ()

    @property
    def mapping(self) -> dict[str, tuple[Vm, ...]]:
        """The VMs of each node, in the order of declaration; those that wait for a place under FARM."""
        lists: dict[str, list[Vm]] = {node.name: [] for node in self.nodes}
        lists[FARM] = []
        for vm in self.vms:
            lists[FARM if vm.node is None else vm.node].append(vm)
        return {name: tuple(vms) for name, vms in lists.items()}


class InfraError(TextError):
    """All that is wrong with an infra.conf."""


def load_infra(path: Path) -> tuple[Infra, tuple[Notice, ...]]:
    """Read and parse a file. Raises InfraError, and OSError where it can't be read."""
    with path.open("rb") as file:
        return parse_infra(file.read(MAX_BYTES + 1), file=str(path))


def parse_infra(data: bytes | str, *, file: str = "infra.conf") -> tuple[Infra, tuple[Notice, ...]]:
    """The file's meaning, and warnings. `file` is the name that messages say.

    Raises InfraError, with all that is wrong; nothing else, whatever the bytes.
    """
    if len(data) > MAX_BYTES:
        expected = f"at most {MAX_BYTES >> 20} MiB"
        raise InfraError([Problem(file=file, line=1, column=1, token="", expected=expected)])
    if isinstance(data, bytes):
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            expected = "UTF-8 text; this begins like UTF-16, so save it as UTF-8"
            raise InfraError([Problem(file=file, line=1, column=1, token="", expected=expected)])
        # A comment in another encoding harms nobody; in a name each bad byte is refused at its own column.
        data = data.decode("utf-8", "surrogateescape")
    return _Parser(data.removeprefix("\ufeff"), file).parse()


def format_infra(infra: Infra) -> str:
    """`infra` as a file, one declaration a line, that reads back equal."""
    lines = [NODES]
    lines += [f"{node.name} {node.cpus} {node.cpu_capacity} {node.memory}" for node in infra.nodes]
    lines.append(VMS)
    for vm in infra.vms:
        cpu, memory = _demand_text(vm.cpu, vm.cpu_wanted), _demand_text(vm.memory, vm.memory_wanted)
        cap = NO_CAP if vm.cpu_cap is None else vm.cpu_cap
        lines.append(f"{vm.name} {vm.vcpus} {cpu} {memory} {cap}")
    lines.append(MAPPING)
    offline = {node.name for node in infra.nodes if node.offline}
    for owner, vms in infra.mapping.items():
        names = (f"({vm.name})" if vm.sleeping else vm.name for vm in vms)
        lines.append(" ".join((f"({owner})" if owner in offline else owner, *names)))
    lines.append(END)
    return "\n".join(lines) + "\n"


def _demand_text(now: int, wanted: int) -> str:
    return str(now) if now == wanted else f"{now}->{wanted}"


class _Parser:
    """One parse. A place is the offset of a row in the text and the number of a token in that row."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.found = Problems(text, file)
        self.one_line = _is_stream(text)
        self.nodes: dict[str, tuple[int, int, int]] = {}
        self.vms: dict[str, tuple[int, int, int, int, int, int | None]] = {}
        self.declared_at: dict[str, int] = {}
        self.mapping_rows: list[tuple[int, list[str]]] = []
        self.offline: dict[str, bool] = {}
        self.places: dict[str, tuple[str, bool]] = {}
        # Set where declarations had to be skipped: then an unknown name in the mapping is no news.
        self.skipped = False

    def parse(self) -> tuple[Infra, tuple[Notice, ...]]:
        if self.one_line:
            self._stream()
        else:
            self._lines()
        for at, tokens in self.mapping_rows:
            self._map(at, tokens)
        if self.found.total:
            raise InfraError(self.found.located(), self.found.notices(), self.found.total)
        nodes = tuple(
            Node(name=name, cpus=cpus, cpu_capacity=cpu, memory=memory, offline=self.offline.get(name, False))
            for name, (cpus, cpu, memory) in self.nodes.items()
        )
        return Infra(nodes=nodes, vms=tuple(self._made_vm(name) for name in self.vms)), self.found.notices()

    def _made_vm(self, name: str) -> Vm:
        vcpus, cpu, cpu_wanted, memory, memory_wanted, cap = self.vms[name]
        owner, sleeping = self.places.get(name, (FARM, False))
        return Vm(
            name=name,
            vcpus=vcpus,
            cpu=cpu,
            cpu_wanted=cpu_wanted,
            memory=memory,
            memory_wanted=memory_wanted,
            cpu_cap=cap,
            node=None if owner == FARM else owner,
            sleeping=sleeping,
        )

    # Cutting the text into rows

    def _lines(self) -> None:
        section, following = "", 0
        seen_nodes = ended = False
        for line in self.text.split("\n"):
            at, following = following, following + len(line) + 1
            tokens = line.split()
            if not tokens:
                continue
            if tokens[0].startswith("#"):
                header, rest = _header_of(line)
                if header == PLAN or (header == END and not rest):
                    ended = True
                    break
                if header and header != END:
                    section = header
                    seen_nodes = seen_nodes or header == NODES
                    if rest:
                        self.found.warn(at, f"{cut(rest)!r} after {header!r} is ignored")
                else:
                    self._comment(at, line)
            elif section == NODES:
                self._node(at, 0, tokens)
            elif section == VMS:
                self._vm(at, 0, tokens)
            elif section == MAPPING:
                self.mapping_rows.append((at, tokens))
            else:
                self._before_headers(at)
        self._check_frame(seen_nodes=seen_nodes, ended=ended)

    def _stream(self) -> None:
        headers = list(_HEADER.finditer(self.text))
        kinds = [_header_of(header[0])[0] for header in headers]
        last = next((i for i, kind in enumerate(kinds) if kind in (END, PLAN)), len(kinds))
        stops = [header.start() for header in headers] + [len(self.text)]
        self._before_stream(self.text[: stops[0]])
        for i, kind in enumerate(kinds[:last]):
            at = headers[i].end()
            tokens = self.text[at : stops[i + 1]].split()
            comment = next((n for n, token in enumerate(tokens) if token.startswith("#")), None)
            if comment is not None:
                self.found.add(at, comment, "no comment here: without line breaks nobody sees where it ends")
                self.skipped = True
                tokens = tokens[:comment]
            if kind == MAPPING:
                self.mapping_rows.append((at, tokens))
            else:
                self._stream_section(kind, at, tokens)
        self._check_frame(seen_nodes=NODES in kinds[:last], ended=last < len(kinds))

    def _before_stream(self, text: str) -> None:
        following = 0
        for line in text.split("\n"):
            at, following = following, following + len(line) + 1
            # A comment that has a line of its own ends where the line does.
            if line.lstrip().startswith("#") and following <= len(text):
                self._comment(at, line)
            elif line.strip():
                self._before_headers(at)

    def _stream_section(self, kind: str, at: int, tokens: list[str]) -> None:
        """Declarations without line breaks: a name and the run of numbers after it.

        Where a number is due and another token stands, that token is a slip in the declaration at hand if all
        up to the next name fits into one declaration, or if too few numbers follow it for a declaration of its
        own; otherwise it is the next name. So one slip is one error.
        """
        declare, most = (self._node, 4) if kind == NODES else (self._vm, 5)
        number = [_NUMBER.fullmatch(token) is not None for token in tokens]
        total = len(tokens)

        def run(start: int, limit: int) -> int:
            stop = start
            while stop < min(total, start + limit) and number[stop]:
                stop += 1
            return stop

        first = 0
        while first < total:
            # Nodes come in fours, whatever their names; a VM's numbers go on until the next name.
            stop = run(first + 1, 3 if kind == NODES else total)
            if stop - first < 4 and stop < total:
                if number[first] and stop == first + 1:
                    self.found.add(at, first, f"a name ({_NODE_COLUMNS if kind == NODES else _VM_COLUMNS})")
                    first = stop
                    continue
                after = run(stop + 1, total)
                if after - first <= most or after - stop < 4:
                    stop = after
            declare(at, first, tokens[first:stop])
            first = stop

    def _check_frame(self, *, seen_nodes: bool, ended: bool) -> None:
        if not seen_nodes and not self.skipped:
            self.found.add(0, -1, f"{NODES!r}, the header that every infra.conf has")
        if seen_nodes and not ended:
            self.found.warn(len(self.text), f"no {END!r}: the file may be cut short")

    def _before_headers(self, at: int) -> None:
        """Data under no header. Said once: all of it has one cause."""
        if not self.skipped:
            self.found.add(at, 0, f"{NODES!r} or another header before any data")
        self.skipped = True

    def _comment(self, at: int, line: str) -> None:
        if not self.found.notices_full:
            comment = cut(line.strip())
            nearest = _nearest_header(comment)
            self.found.warn(at, f"{comment!r} is taken as a comment; the nearest header is {nearest!r}")

    # Declarations

    def _node(self, at: int, base: int, columns: list[str]) -> None:
        if len(columns) < 4:
            self.found.add(at, base, f"4 columns ({_NODE_COLUMNS}), found {len(columns)}")
        elif len(columns) > 4:
            self.found.add(at, base + 4, f"nothing more after 4 columns ({_NODE_COLUMNS})")
        numbers = [0, 0, 0]
        for i, what in enumerate(("CPUs", "CPU capacity", "memory capacity")[: len(columns) - 1], 1):
            numbers[i - 1] = self._number(at, base + i, columns[i], what, 1 if i == 1 else 0)
        if self._declare(at, base, columns[0], "node"):
            self.nodes[columns[0]] = (numbers[0], numbers[1], numbers[2])

    def _vm(self, at: int, base: int, columns: list[str]) -> None:
        size = len(columns)
        if size < 4:
            self.found.add(at, base, f"4 or 5 columns ({_VM_COLUMNS}), found {size}")
        elif size > 5:
            self.found.add(at, base + 5, f"nothing more after 5 columns ({_VM_COLUMNS})")
        vcpus = self._number(at, base + 1, columns[1], "vCPUs", 1) if size > 1 else 1
        cpu = self._demand(at, base + 2, columns[2], "CPU demand") if size > 2 else (0, 0)
        memory = self._demand(at, base + 3, columns[3], "memory demand") if size > 3 else (0, 0)
        cap = self._number(at, base + 4, columns[4], "CPU cap", 0) if size > 4 else NO_CAP
        if self._declare(at, base, columns[0], "VM"):
            self.vms[columns[0]] = (vcpus, *cpu, *memory, None if cap == NO_CAP else cap)

    def _declare(self, at: int, base: int, name: str, kind: str) -> bool:
        """Whether the name is new. One in bad form counts too, so that the mapping does not complain again."""
        if name == FARM:
            self.found.add(at, base, f"another {kind} name, since {FARM} lists the VMs that wait for a place")
            return False
        known = self._kind(name)
        if known:
            line = "" if self.one_line else f" on line {self.found.position(self.declared_at[name])[0]}"
            self.found.add(at, base, f"a {kind} name that is free; it is declared as a {known}{line} already")
            return False
        if kind == "node" and not _HOST_NAME.fullmatch(name):
            self.found.add(at, base, "a node name: a host name of letters, digits, '-', '_' and '.'")
        elif kind == "VM" and not _VM_NAME.fullmatch(name):
            what = "1 to 63 letters, digits, '-', '_' and '.', with a letter or digit first and last"
            self.found.add(at, base, f"a VM name: {what}")
        self.declared_at[name] = at
        return True

    def _number(self, at: int, index: int, token: str, what: str, least: int) -> int:
        value = _whole(token)
        if value is not None and value >= least:
            return value
        self.found.add(at, index, f"{what}, a whole number from {least} to {NO_CAP}")
        return least

    def _demand(self, at: int, index: int, token: str, what: str) -> tuple[int, int]:
        before, arrow, after = token.partition("->")
        now, wanted = _whole(before), _whole(after if arrow else before)
        if now is not None and wanted is not None:
            return now, wanted
        self.found.add(at, index, f"{what}, a whole number from 0 to {NO_CAP} or two as now->wanted")
        return 0, 0

    # The mapping

    def _map(self, at: int, tokens: list[str]) -> None:
        owner = FARM
        for index, token in enumerate(tokens):
            bracketed = token.startswith("(") and token.endswith(")")
            name = token[1:-1] if bracketed else token
            if index == 0 or (self.one_line and (token == FARM or name in self.nodes)):
                owner = name
                if name in self.nodes:
                    if self.offline.setdefault(name, bracketed) != bracketed:
                        self.found.add(at, index, f"node {name} to be online or (offline), not both")
                elif token != FARM:
                    self._unknown(at, index, name, f"a declared node or {FARM}")
            elif name not in self.vms:
                self._unknown(at, index, name, "a declared VM or node" if self.one_line else "a declared VM")
            elif name in self.places:
                place = self.places[name][0]
                self.found.add(at, index, f"a VM that is not mapped yet; it is on {cut(place)} already")
            else:
                self.places[name] = (owner, bracketed)

    def _unknown(self, at: int, index: int, name: str, expected: str) -> None:
        known = self._kind(name)
        if known:
            self.found.add(at, index, f"{expected}; {name} is a {known}")
        elif not self.skipped:
            self.found.add(at, index, expected)

    def _kind(self, name: str) -> str:
        return "node" if name in self.nodes else "VM" if name in self.vms else ""


def _whole(token: str) -> int | None:
    # int() refuses thousands of digits with another error; 18 are more than enough for 2147483647.
    if token.isascii() and token.isdigit() and len(token) <= 18:
        value = int(token)
        return value if value <= NO_CAP else None
    return None


def _is_stream(text: str) -> bool:
    """Whether line breaks mean nothing: there is one line only, or a header stands within a line of something else."""
    body = text.strip()
    if "\n" not in body:
        return True
    # No file has more headers: to look back from each would be quadratic in garbage.
    for header in islice(_HEADER.finditer(body), 16):
        before = body[body.rfind("\n", 0, header.start()) + 1 : header.start()].strip()
        if before and (not before.startswith("#") or _HEADER.match(before)):
            return True
        if _header_of(header[0])[0] in (END, PLAN):
            break
    return False


def _header_of(line: str) -> tuple[str, str]:
    """The header that `line` begins with, its words one space apart, and what comes after it."""
    line = line.strip()
    found = _HEADER.match(line)
    return (" ".join(found[0].split()), line[found.end() :].strip()) if found else ("", line)


def _nearest_header(comment: str) -> str:
    # Imported here, because few files have comments.
    from difflib import get_close_matches

    return get_close_matches(comment, (NODES, VMS, MAPPING, END), n=1, cutoff=0)[0]
