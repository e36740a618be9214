"""infra.conf: every accepted form, every error with its exact place, and hostile bytes."""

from __future__ import annotations

import string
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controller import infra as infra_module
from controller.infra import NO_CAP, Infra, InfraError, Node, Vm, format_infra, load_infra, parse_infra
from controller.text_problems import MAX_PROBLEMS, MAX_SHOWN

SAMPLE = """\
#list of nodes
suno-3.sophia.grid5000.fr 4 20 8
suno-6.sophia.grid5000.fr 4 20 8
suno-9.sophia.grid5000.fr 4 20 8
#list of VMs
vm00 1 1 1 2147483647
vm01 1 1 1 2147483647
vm02 1 1 1 2147483647
vm03 1 1 1 2147483647
vm04 1 1 1 2147483647
vm05 1 1 1 2147483647
#initial configuration
suno-3.sophia.grid5000.fr vm00 vm03
suno-6.sophia.grid5000.fr vm01 vm04
suno-9.sophia.grid5000.fr vm02 vm05
#end of configuration
"""

# In the manner of DVMS: CPU in percent, memory in MiB, and all that a mapping can say.
DVMS = """\
#list of nodes
node1 4 400 16192
node2 4 400 16192
node3 4 400 16192
#list of VMs
vm-0 1 0 2048 2147483647
vm-1 1 10->30 2048
vm-2 2 100 1024->2048 150
vm-3 1 0 512
vm-4 1 5->0 512 2147483647
#initial configuration
node1 vm-0 (vm-1)
(node2)
node3
FARM vm-2
#end of configuration
"""


def parsed(text: bytes | str) -> Infra:
    infra, warnings = parse_infra(text)
    assert warnings == ()
    return infra


def warned(text: bytes | str) -> tuple[Infra, list[tuple[int, int, str]]]:
    infra, warnings = parse_infra(text)
    return infra, [(warning.line, warning.column, warning.text) for warning in warnings]


def refused(text: bytes | str) -> list[tuple[int, int, str, str]]:
    with pytest.raises(InfraError) as caught:
        parse_infra(text)
    return [(problem.line, problem.column, problem.token, problem.expected) for problem in caught.value.problems]


def vm(name: str, *, node: str | None = None, sleeping: bool = False, cap: int | None = None) -> Vm:
    return Vm(
        name=name,
        vcpus=1,
        cpu=1,
        cpu_wanted=1,
        memory=1,
        memory_wanted=1,
        cpu_cap=cap,
        node=node,
        sleeping=sleeping,
    )


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_sample_reads_as_its_columns_say() -> None:
    infra = parsed(SAMPLE)
    names = [f"suno-{n}.sophia.grid5000.fr" for n in (3, 6, 9)]
    assert infra.nodes == tuple(Node(name=name, cpus=4, cpu_capacity=20, memory=8) for name in names)
    assert infra.vms == tuple(vm(f"vm0{n}", node=names[n % 3]) for n in range(6))
    assert {name: [vm.name for vm in vms] for name, vms in infra.mapping.items()} == {
        names[0]: ["vm00", "vm03"],
        names[1]: ["vm01", "vm04"],
        names[2]: ["vm02", "vm05"],
        "FARM": [],
    }


def test_a_dvms_file_reads_as_its_columns_say() -> None:
    infra = parsed(DVMS)
    assert [(node.name, node.memory, node.offline) for node in infra.nodes] == [
        ("node1", 16192, False),
        ("node2", 16192, True),
        ("node3", 16192, False),
    ]
    assert [msgspec.structs.astuple(vm) for vm in infra.vms] == [
        ("vm-0", 1, 0, 0, 2048, 2048, None, "node1", False),
        ("vm-1", 1, 10, 30, 2048, 2048, None, "node1", True),
        ("vm-2", 2, 100, 100, 1024, 2048, 150, None, False),
        ("vm-3", 1, 0, 0, 512, 512, None, None, False),
        ("vm-4", 1, 5, 0, 512, 512, None, None, False),
    ]


@pytest.mark.parametrize("text", [SAMPLE, DVMS], ids=["sample", "dvms"])
@pytest.mark.parametrize(
    "changed",
    [
        on_one_line,
        lambda text: on_one_line(text) + "\n",
        lambda text: text.replace("\n", "   "),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\n\n" + text.replace("\n", "\t") + "\n\n",
        # Broken somewhere else, as when a document wraps its lines.
        lambda text: on_one_line(text).replace(" 1 ", "\n1 ").replace("4 ", "4\r\n"),
        lambda text: on_one_line(text).replace("list of", "list\nof"),
        # Stuck together where a line ended.
        lambda text: text.replace("\n#", "#").replace("\n", " "),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace(" ", "  \t "),
        lambda text: text.replace("\n", " \t\n  "),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.rstrip("\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + on_one_line(text),
        lambda text: text + "and what follows is not read: #list of nodes\n",
        lambda text: on_one_line(text) + " and what follows is not read",
        lambda text: text.replace("#end of configuration", "#Reconfiguration plan\n0:1 migrate"),
        lambda text: on_one_line(text).replace("#end of configuration", "#Reconfiguration plan 0:1 migrate"),
        # The mapping before what it names.
        lambda text: (
            "#initial configuration"
            + text.partition("#initial configuration")[2].partition("#end")[0]
            + text.partition("#initial configuration")[0]
            + "#end of configuration"
        ),
    ],
)
def test_line_breaks_spaces_and_order_do_not_change_the_meaning(text: str, changed: object) -> None:
    assert callable(changed)
    variant = changed(text)
    assert variant != text
    assert parsed(variant) == parsed(text)
    assert parsed(variant.encode()) == parsed(text)


HEAD = "#list of nodes\nn 1 1 1\nm 1 1 1\n#list of VMs\nv 1 1 1\nw 1 1 1\n#initial configuration\n"
TAIL = "#end of configuration\n"


@pytest.mark.parametrize(
    ("mapping", "places"),
    [
        ("", {"v": (None, False), "w": (None, False)}),
        ("FARM\n", {"v": (None, False), "w": (None, False)}),
        ("FARM v\n", {"v": (None, False), "w": (None, False)}),
        ("FARM v\nFARM w\n", {"v": (None, False), "w": (None, False)}),
        ("FARM (v)\n", {"v": (None, True), "w": (None, False)}),
        ("n\nm\nFARM\n", {"v": (None, False), "w": (None, False)}),
        ("n v w\n", {"v": ("n", False), "w": ("n", False)}),
        ("n v\nn w\n", {"v": ("n", False), "w": ("n", False)}),
        ("n w\nm v\n", {"v": ("m", False), "w": ("n", False)}),
        ("n v (w)\n", {"v": ("n", False), "w": ("n", True)}),
        ("(n) v\nm (w)\n", {"v": ("n", False), "w": ("m", True)}),
    ],
)
@pytest.mark.parametrize("one_line", [False, True])
def test_a_mapping_says_where_each_vm_is(
    mapping: str, places: dict[str, tuple[str | None, bool]], one_line: bool
) -> None:
    text = HEAD + mapping + TAIL
    infra = parsed(on_one_line(text) if one_line else text)
    assert {vm.name: (vm.node, vm.sleeping) for vm in infra.vms} == places
    assert [node.name for node in infra.nodes if node.offline] == (["n"] if "(n)" in mapping else [])


def test_names_of_digits_alone_are_names_where_there_are_lines() -> None:
    infra = parsed("#list of nodes\n7 1 2 3\n#list of VMs\n8 1 2 3 4\n#initial configuration\n7 8\n" + TAIL)
    assert (infra.nodes[0].name, infra.vms[0].name, infra.vms[0].node) == ("7", "8", "7")


@pytest.mark.parametrize("other", ["# not yet: #list of VMs\n{}", "{}as in: #list of nodes n 1 1 1\n"])
def test_a_header_in_a_comment_or_after_the_end_does_not_make_line_breaks_meaningless(other: str) -> None:
    text = "#list of nodes\n7 1 2 3\n#list of VMs\n8 1 2 3\n9 1 2 3\n#end of configuration\n"
    infra, _ = parse_infra(other.format(text))
    assert [vm.name for vm in infra.vms] == ["8", "9"]


def test_nodes_with_names_of_digits_are_read_in_fours_on_one_line() -> None:
    infra = parsed("#list of nodes 7 1 2 3 8 4 5 6 #end of configuration")
    assert [(node.name, node.cpus) for node in infra.nodes] == [("7", 1), ("8", 4)]


def test_a_file_of_nodes_alone_is_enough() -> None:
    assert parsed("#list of nodes\nn 1 1 1\n" + TAIL) == Infra(
        nodes=(Node(name="n", cpus=1, cpu_capacity=1, memory=1),)
    )


def test_a_section_may_come_twice() -> None:
    again = "#list of nodes\nk 1 1 1\n#list of VMs\nx 1 1 1\n#initial configuration\nk x\n"
    infra = parsed(HEAD + "n v\n" + again + "m w\n" + TAIL)
    assert [node.name for node in infra.nodes] == ["n", "m", "k"]
    assert [(vm.name, vm.node) for vm in infra.vms] == [("v", "n"), ("w", "m"), ("x", "k")]


def test_an_unknown_comment_is_a_warning_that_suggests_the_nearest_header() -> None:
    infra, warnings = warned("# made by hand\n" + SAMPLE.replace("#list of VMs", "#list of VMs (six)"))
    assert infra == parsed(SAMPLE)
    assert warnings == [
        (1, 1, "'# made by hand' is taken as a comment; the nearest header is '#list of nodes'"),
        (6, 1, "'(six)' after '#list of VMs' is ignored"),
    ]
    _, warnings = warned(SAMPLE.replace("vm00 1 1", "  #list of vms\nvm00 1 1"))
    assert warnings == [(6, 3, "'#list of vms' is taken as a comment; the nearest header is '#list of VMs'")]


def test_a_comment_line_before_the_one_line_form_is_a_warning() -> None:
    infra, warnings = warned("# from the wiki\n" + on_one_line(SAMPLE))
    assert infra == parsed(SAMPLE)
    assert [(line, column) for line, column, _ in warnings] == [(1, 1)]


def test_the_end_header_ends_the_file_only_if_it_is_the_whole_line() -> None:
    infra, warnings = warned(SAMPLE.replace("vm01 1", "#end of configuration, not yet\nvm01 1"))
    assert infra == parsed(SAMPLE)
    expected = "'#end of configuration, not yet' is taken as a comment; the nearest header is '#end of configuration'"
    assert warnings == [(7, 1, expected)]


@pytest.mark.parametrize("text", [SAMPLE, on_one_line(SAMPLE)])
def test_a_file_without_its_end_is_a_warning(text: str) -> None:
    cut = text.partition("#end")[0].rstrip()
    infra, warnings = warned(cut)
    assert infra == parsed(SAMPLE)
    assert [text for _, _, text in warnings] == ["no '#end of configuration': the file may be cut short"]


def test_a_comment_in_another_encoding_harms_nobody() -> None:
    infra, warnings = warned("# hôtes\n".encode("latin-1") + SAMPLE.encode())
    assert infra == parsed(SAMPLE)
    assert r"# h\\udcf4tes" in warnings[0][2]


NODE_COLUMNS = "name, CPUs, CPU capacity, memory capacity"
VM_COLUMNS = "name, vCPUs, CPU demand, memory demand, and a CPU cap or nothing"
WHOLE = "a whole number from {} to 2147483647"
DEMAND = WHOLE.format(0) + " or two as now->wanted"
NODE_NAME = "a node name: a host name of letters, digits, '-', '_' and '.'"
VM_NAME = "a VM name: 1 to 63 letters, digits, '-', '_' and '.', with a letter or digit first and last"


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("k", [(1, "k", f"4 columns ({NODE_COLUMNS}), found 1")]),
        ("k 1 1", [(1, "k", f"4 columns ({NODE_COLUMNS}), found 3")]),
        ("k 1 1 1 5 6", [(9, "5", f"nothing more after 4 columns ({NODE_COLUMNS})")]),
        ("k 0 1 1", [(3, "0", f"CPUs, {WHOLE.format(1)}")]),
        ("k -1 1 1", [(3, "-1", f"CPUs, {WHOLE.format(1)}")]),
        ("k  1\t1.5 1", [(6, "1.5", f"CPU capacity, {WHOLE.format(0)}")]),
        ("k 1 1->2 1", [(5, "1->2", f"CPU capacity, {WHOLE.format(0)}")]),
        ("k 1 1 8GiB", [(7, "8GiB", f"memory capacity, {WHOLE.format(0)}")]),
        ("k 1 1 2147483648", [(7, "2147483648", f"memory capacity, {WHOLE.format(0)}")]),
        ("k 1 1 " + "9" * 5000, [(7, "9" * 80, f"memory capacity, {WHOLE.format(0)}")]),
        ("k \u0661 1 1", [(3, "\u0661", f"CPUs, {WHOLE.format(1)}")]),
        (
            "k +1 1_0 0x1",
            [
                (3, "+1", f"CPUs, {WHOLE.format(1)}"),
                (6, "1_0", f"CPU capacity, {WHOLE.format(0)}"),
                (10, "0x1", f"memory capacity, {WHOLE.format(0)}"),
            ],
        ),
        ("n 1 1 1", [(1, "n", "a node name that is free; it is declared as a node on line 2 already")]),
        ("v 1 1 1", []),  # the VM of that name is what is wrong, as it comes later
        (
            "FARM 1 1 1",
            [
                (1, "FARM", "another node name, since FARM lists the VMs that wait for a place"),
            ],
        ),
        ("-k 1 1 1", [(1, "-k", NODE_NAME)]),
        ("k- 1 1 1", [(1, "k-", NODE_NAME)]),
        ("k..l 1 1 1", [(1, "k..l", NODE_NAME)]),
        ("k. 1 1 1", [(1, "k.", NODE_NAME)]),
        ("(k) 1 1 1", [(1, "(k)", NODE_NAME)]),
        ("k/l 1 1 1", [(1, "k/l", NODE_NAME)]),
        ("hôte 1 1 1", [(1, "hôte", NODE_NAME)]),
        ("k" * 64 + " 1 1 1", [(1, "k" * 64, NODE_NAME)]),
        (".".join(["k" * 63] * 4) + " 1 1 1", [(1, "k" * 63 + "." + "k" * 16, NODE_NAME)]),
        (
            "   b!  x 1",
            [
                (4, "b!", f"4 columns ({NODE_COLUMNS}), found 3"),
                (4, "b!", NODE_NAME),
                (8, "x", f"CPUs, {WHOLE.format(1)}"),
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_said_at_its_column(line: str, problems: list[tuple[int, str, str]]) -> None:
    text = f"#list of nodes\nn 1 1 1\n{line}\n#list of VMs\nv 1 1 1\n{TAIL}"
    if not problems:
        problem = "a VM name that is free; it is declared as a node on line 3 already"
        assert refused(text) == [(5, 1, "v", problem)]
    else:
        assert refused(text) == [(3, *problem) for problem in problems]


@pytest.mark.parametrize("name", ["h", "H0", "a_b", "_k", "a.b-c.d", "127.0.0.1", "k" * 63, "9.9"])
def test_host_names_are_node_names(name: str) -> None:
    assert parsed(f"#list of nodes\n{name} 1 0 0\n{TAIL}").nodes[0].name == name


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("x", [(1, "x", f"4 or 5 columns ({VM_COLUMNS}), found 1")]),
        ("x 1 1", [(1, "x", f"4 or 5 columns ({VM_COLUMNS}), found 3")]),
        ("x 1 1 1 5 6 7", [(11, "6", f"nothing more after 5 columns ({VM_COLUMNS})")]),
        ("x 0 1 1", [(3, "0", f"vCPUs, {WHOLE.format(1)}")]),
        (
            "x 0",
            [(1, "x", f"4 or 5 columns ({VM_COLUMNS}), found 2"), (3, "0", f"vCPUs, {WHOLE.format(1)}")],
        ),
        ("x 1->2 1 1", [(3, "1->2", f"vCPUs, {WHOLE.format(1)}")]),
        ("x 1 -1 1", [(5, "-1", f"CPU demand, {DEMAND}")]),
        ("x 1 1-> 1", [(5, "1->", f"CPU demand, {DEMAND}")]),
        ("x 1 ->1 1", [(5, "->1", f"CPU demand, {DEMAND}")]),
        ("x 1 -> 1", [(5, "->", f"CPU demand, {DEMAND}")]),
        ("x 1 1->2->3 1", [(5, "1->2->3", f"CPU demand, {DEMAND}")]),
        ("x 1 1>2 1", [(5, "1>2", f"CPU demand, {DEMAND}")]),
        ("x 1 y->z 1", [(5, "y->z", f"CPU demand, {DEMAND}")]),
        ("x 1 1 2048M", [(7, "2048M", f"memory demand, {DEMAND}")]),
        ("x 1 1 1->2147483648", [(7, "1->2147483648", f"memory demand, {DEMAND}")]),
        ("x 1 1 1 vjob1", [(9, "vjob1", f"CPU cap, {WHOLE.format(0)}")]),
        ("x 1 1 1 5->6", [(9, "5->6", f"CPU cap, {WHOLE.format(0)}")]),
        ("v 1 1 1", [(1, "v", "a VM name that is free; it is declared as a VM on line 4 already")]),
        ("n 1 1 1", [(1, "n", "a VM name that is free; it is declared as a node on line 2 already")]),
        ("FARM 1 1 1", [(1, "FARM", "another VM name, since FARM lists the VMs that wait for a place")]),
        ("../x 1 1 1", [(1, "../x", VM_NAME)]),
        ("x. 1 1 1", [(1, "x.", VM_NAME)]),
        ("_x 1 1 1", [(1, "_x", VM_NAME)]),
        ("x:y 1 1 1", [(1, "x:y", VM_NAME)]),
        ("(x) 1 1 1", [(1, "(x)", VM_NAME)]),
        ("x\0 1 1 1", [(1, "x\0", VM_NAME)]),
        ("x" * 64 + " 1 1 1", [(1, "x" * 64, VM_NAME)]),
        ("x\udcff 1 1 1", [(1, r"x\udcff", VM_NAME)]),
    ],
)
def test_what_is_wrong_with_a_vm_is_said_at_its_column(line: str, problems: list[tuple[int, str, str]]) -> None:
    text = f"#list of nodes\nn 1 1 1\n#list of VMs\nv 1 1 1\n{line}\n{TAIL}"
    assert refused(text) == [(5, *problem) for problem in problems]


@pytest.mark.parametrize(
    ("mapping", "problems"),
    [
        ("k v", [(1, 1, "k", "a declared node or FARM")]),
        ("v w", [(1, 1, "v", "a declared node or FARM; v is a VM")]),
        ("n x", [(1, 3, "x", "a declared VM")]),
        ("n (x)", [(1, 3, "(x)", "a declared VM")]),
        ("n (v", [(1, 3, "(v", "a declared VM")]),
        ("n v)", [(1, 3, "v)", "a declared VM")]),
        ("n (vv", [(1, 3, "(vv", "a declared VM")]),
        ("n wv)", [(1, 3, "wv)", "a declared VM")]),
        ("n ()", [(1, 3, "()", "a declared VM")]),
        ("(k)", [(1, 1, "(k)", "a declared node or FARM")]),
        ("(FARM) v", [(1, 1, "(FARM)", "a declared node or FARM")]),
        ("farm v", [(1, 1, "farm", "a declared node or FARM")]),
        ("n v m", [(1, 5, "m", "a declared VM; m is a node")]),
        ("n v FARM", [(1, 5, "FARM", "a declared VM")]),
        ("n v v", [(1, 5, "v", "a VM that is not mapped yet; it is on n already")]),
        ("n v\nm (v)", [(2, 3, "(v)", "a VM that is not mapped yet; it is on n already")]),
        ("FARM v\nm v", [(2, 3, "v", "a VM that is not mapped yet; it is on FARM already")]),
        ("n v\n(n)", [(2, 1, "(n)", "node n to be online or (offline), not both")]),
        (
            "k x\n\tl\ty v\nn v",
            [
                (1, 1, "k", "a declared node or FARM"),
                (1, 3, "x", "a declared VM"),
                (2, 2, "l", "a declared node or FARM"),
                (2, 4, "y", "a declared VM"),
                (3, 3, "v", "a VM that is not mapped yet; it is on l already"),
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_mapping_is_said_at_its_column(
    mapping: str, problems: list[tuple[int, int, str, str]]
) -> None:
    first = HEAD.count("\n")
    assert refused(HEAD + mapping + "\n" + TAIL) == [
        (first + line, column, token, expected) for line, column, token, expected in problems
    ]


@pytest.mark.parametrize(
    ("text", "token", "expected"),
    [
        ("#list of nodes n 1 x 1 m 1 1 1 #end of configuration", "x", "CPU capacity"),
        ("#list of nodes n x 1 1 m 1 1 1 #end of configuration", "x", "CPUs"),
        ("#list of nodes n 1 1 m 1 1 1 #end of configuration", "n 1 1", "4 columns"),
        ("#list of nodes n 1 1 1 99 m 1 1 1 #end of configuration", "99", "a name"),
        ("#list of nodes n 1 1 #end of configuration", "n 1 1", "4 columns"),
        ("#list of nodes n 0 1 1 #end of configuration", "0", "CPUs"),
        ("#list of nodes #list of VMs v 1 x 1 5 w 1 1 1 #end of configuration", "x", "CPU demand"),
        ("#list of nodes #list of VMs v x 1 1 w 1 1 1 #end of configuration", "x", "vCPUs"),
        ("#list of nodes #list of VMs v x 1 1 5 w 1 1 1 #end of configuration", "x", "vCPUs"),
        ("#list of nodes #list of VMs v 1 1 1 x #end of configuration", "x #", "4 or 5 columns"),
        ("#list of nodes #list of VMs v 1 1 w 1 1 1 5 #end of configuration", "v 1", "4 or 5 columns"),
        ("#list of nodes #list of VMs v 1 1 1 5 66 w 1 1 1 #end of configuration", "66", "nothing more"),
        ("#list of nodes #list of VMs v 1 1 1-> 5 w 1 1 1 #end of configuration", "1->", "memory demand"),
        ("#list of nodes #list of VMs v 1 -7 1 w 1 1 1 #end of configuration", "-7", "CPU demand"),
        ("#list of nodes #list of VMs v 1 1 1 v 1 1 1 #end of configuration", "v 1 1 1 #", "a VM name that is free"),
        ("#list of nodes n 1 1 1 #initial configuration n xx #end of configuration", "xx", "a declared VM or node"),
        ("#list of nodes n 1 1 1 #initial configuration xx n #end of configuration", "xx", "a declared node or FARM"),
        ("#list of nodes # five 1 1 1 #end of configuration", "# five", "no comment here"),
        ("see: #list of nodes n 1 1 1 #end of configuration", "see:", "'#list of nodes' or another header"),
        ("# five #list of nodes n 1 1 1 #end of configuration", "# five", "'#list of nodes' or another header"),
    ],
)
def test_one_slip_on_one_line_is_one_error_at_its_offset(text: str, token: str, expected: str) -> None:
    [(line, column, found, said)] = refused(text)
    assert (line, column - 1) == (1, text.index(token))
    assert found == token.split(maxsplit=1)[0]
    assert said.startswith(expected)


def test_a_declaration_with_two_slips_on_one_line_is_still_one_declaration() -> None:
    text = "#list of nodes #list of VMs v 1 1 x 5 66 w 1 1 1 #initial configuration FARM v w x #end of configuration"
    assert [(token, expected.partition(" ")[0]) for _, _, token, expected in refused(text)] == [
        ("x", "memory"),
        ("66", "nothing"),
        ("x", "a"),
    ]


def test_names_that_a_comment_on_one_line_may_have_declared_are_not_called_unknown() -> None:
    text = "#list of nodes n 1 1 1 # now m: m 1 1 1 #initial configuration m n #end of configuration"
    assert [token for _, _, token, _ in refused(text)] == ["#"]


def test_errors_of_the_one_line_form_have_true_lines_where_there_are_some() -> None:
    text = "\n\n#list of nodes n 1 1 1 #list\nof VMs v 1\n x 1 #end of configuration"
    assert refused(text) == [(5, 2, "x", f"CPU demand, {DEMAND}")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", (1, 1, "", "'#list of nodes', the header that every infra.conf has")),
        ("\n \n", (1, 1, "", "'#list of nodes', the header that every infra.conf has")),
        ("#list of VMs\nv 1 1 1\n", (1, 1, "", "'#list of nodes', the header that every infra.conf has")),
        (b"PK\x03\x04\n\x00\xff", (1, 1, "PK\x03\x04", "'#list of nodes' or another header before any data")),
        (SAMPLE.partition("\n")[2], (
            1, 1, "suno-3.sophia.grid5000.fr", "'#list of nodes' or another header before any data",
        )),
        (b"\xff\xfe#\x00l\x00", (1, 1, "", "UTF-8 text; this begins like UTF-16, so save it as UTF-8")),
        (SAMPLE.encode("utf-16"), (1, 1, "", "UTF-8 text; this begins like UTF-16, so save it as UTF-8")),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_error(text: bytes | str, problem: tuple[int, int, str, str]) -> None:
    assert refused(text) == [problem]


def test_a_misspelt_header_is_named_beside_the_errors_that_it_causes() -> None:
    with pytest.raises(InfraError) as caught:
        parse_infra(SAMPLE.replace("#list of nodes", "#list of node"), file="my.conf")
    assert str(caught.value) == (
        "my.conf:2:1: 'suno-3.sophia.grid5000.fr': expected '#list of nodes' or another header before any data\n"
        "warning: my.conf:1:1: '#list of node' is taken as a comment; the nearest header is '#list of nodes'"
    )


def test_a_bad_byte_in_a_name_is_shown_so_that_it_can_be_printed() -> None:
    with pytest.raises(InfraError) as caught:
        parse_infra(b"#list of nodes\nn 1 1 1\nn\xff\x1b[31m 1 1 1\n#end of configuration\n")
    [problem] = caught.value.problems
    assert (problem.line, problem.column) == (3, 1)
    assert str(caught.value).isprintable()


def test_all_errors_come_at_once_and_in_the_order_of_the_file() -> None:
    text = (
        "#list of nodes\nn 1 1 1\nn 1 1 x\n"
        "#initial configuration\nn q\n"
        "#list of VMs\nv 0 1 1\n"
        "#initial configuration\nz v\n" + TAIL
    )
    assert [(line, column, token) for line, column, token, _ in refused(text)] == [
        (3, 1, "n"),
        (3, 7, "x"),
        (5, 3, "q"),
        (7, 3, "0"),
        (9, 1, "z"),
    ]


def test_of_very_many_errors_the_first_are_kept_and_all_are_counted() -> None:
    many = MAX_PROBLEMS + 5
    with pytest.raises(InfraError) as caught:
        parse_infra("#list of nodes\n" + "n x 1 1\n" * many + TAIL)
    assert len(caught.value.problems) == MAX_PROBLEMS
    assert caught.value.total == 2 * many - 1  # each is a bad number, and all but the first a taken name
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_SHOWN + 1
    assert lines[-1] == f"and {2 * many - 1 - MAX_SHOWN} more"


@pytest.mark.parametrize("one_line", [False, True])
def test_a_long_mapping_full_of_errors_finds_each_ones_column(one_line: bool) -> None:
    count = 5000
    mapping = "n " + " ".join(f"x{i}" for i in range(count))
    text = HEAD.replace("\n", " " if one_line else "\n") + mapping + "\n"
    problems = refused(text + TAIL)
    assert len(problems) == count
    where = text.split("\n")
    assert all(where[line - 1][column - 1 :].startswith(token) for line, column, token, _ in problems)


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra_module, "MAX_BYTES", 2 << 20)
    path = tmp_path / "large.conf"
    path.write_bytes(SAMPLE.encode() + b"x" * ((2 << 20) - len(SAMPLE)))
    assert load_infra(path)[0] == parsed(SAMPLE)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(InfraError, match=r"large\.conf:1:1: expected at most 2 MiB"):
        load_infra(path)


def test_loading_a_file_names_it_in_errors_and_passes_on_what_the_system_says(tmp_path: Path) -> None:
    path = tmp_path / "infra.conf"
    path.write_text("#list of nodes\nn 0 1 1\n")
    with pytest.raises(InfraError) as caught:
        load_infra(path)
    assert caught.value.problems[0].file == str(path)
    with pytest.raises(FileNotFoundError):
        load_infra(tmp_path / "none.conf")


def test_problems_and_infra_can_be_written_as_json() -> None:
    with pytest.raises(InfraError) as caught:
        parse_infra(b"#list of nodes\nn\xff 1 1 1\n")
    assert b'"line":2' in msgspec.json.encode(caught.value.problems)
    assert msgspec.json.decode(msgspec.json.encode(parsed(DVMS)), type=Infra) == parsed(DVMS)


numbers = st.integers(0, NO_CAP) | st.integers(0, 20)
counts = st.integers(1, NO_CAP)
middle = string.ascii_letters + string.digits + "_.-"
node_names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?(\.[a-z0-9_]{1,5}){0,3}", fullmatch=True)
vm_names = st.from_regex(rf"[A-Za-z0-9]([{middle}]{{0,61}}[A-Za-z0-9])?", fullmatch=True)


@st.composite
def infras(draw: st.DrawFn, *, digit_names: bool = True) -> Infra:
    names = draw(st.lists(node_names, max_size=5, unique=True))
    nodes = tuple(
        Node(
            name=name,
            cpus=draw(counts),
            cpu_capacity=draw(numbers),
            memory=draw(numbers),
            offline=draw(st.booleans()),
        )
        for name in names
    )
    fresh = vm_names.filter(lambda name: name not in names and name != "FARM" and (digit_names or not name.isdigit()))
    vms = tuple(
        Vm(
            name=name,
            vcpus=draw(counts),
            cpu=draw(numbers),
            cpu_wanted=draw(numbers),
            memory=draw(numbers),
            memory_wanted=draw(numbers),
            cpu_cap=draw(st.none() | st.integers(0, NO_CAP - 1)),
            node=draw(st.sampled_from([None, *names])),
            sleeping=draw(st.booleans()),
        )
        for name in draw(st.lists(fresh, max_size=8, unique=True))
    )
    return Infra(nodes=nodes, vms=vms)


@settings(deadline=None, derandomize=True)
@given(infras())
def test_what_is_written_reads_back_equal(infra: Infra) -> None:
    text = format_infra(infra)
    assert parsed(text) == infra
    assert format_infra(parsed(text)) == text


@settings(deadline=None, derandomize=True)
@given(infras(digit_names=False))
def test_what_is_written_reads_back_equal_without_its_line_breaks(infra: Infra) -> None:
    assert parsed(on_one_line(format_infra(infra))) == infra


def survives(data: bytes | str) -> None:
    """Either InfraError, with places that are in the text, or something that can be written."""
    try:
        infra, _ = parse_infra(data)
    except InfraError as caught:
        error = caught
    else:
        assert parsed(format_infra(infra)) == infra
        return
    assert error.problems
    assert error.total >= len(error.problems)
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    lines = text.removeprefix("\ufeff").split("\n")
    for problem in error.problems:
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
    str(error).encode()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary() | st.text())
@example("\ud800")
@example("#list of nodes\n\x85\u2028 1 1 1\n")
def test_no_bytes_raise_anything_but_an_infra_error(data: bytes | str) -> None:
    survives(data)


PIECES = (
    *("#list of nodes", "#list of VMs", "#initial configuration", "#end of configuration", "#Reconfiguration"),
    *("n 1 1 1", "v 1 1 1", "w 1 1->2 3->4 5", "n", "m", "(n)", "v", "w", "(v)", "FARM", "(FARM)", "()", "(", ")"),
    *("1", "0", "-1", "1->", "->", "x", "2147483648", "#x"),
    *("\n", "\n", "\n", "\r\n", "\t", "\x85", "\xa0", "\ufeff", "\0"),
)


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.sampled_from(["", " ", "\n"]))
def test_no_mix_of_the_formats_own_words_raises_anything_but_an_infra_error(words: list[str], glue: str) -> None:
    survives(glue.join(words))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_a_good_file_with_one_change_raises_nothing_but_an_infra_error(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([DVMS, on_one_line(DVMS)]))
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 12)))
    survives(text[:start] + data.draw(st.text(max_size=3)) + text[stop:])


def test_ten_thousand_vms_read_right_in_both_forms() -> None:
    nodes = tuple(Node(name=f"node{n}", cpus=16, cpu_capacity=1600, memory=65536) for n in range(512))
    vms = tuple(vm(f"vm-{n}", node=f"node{n % 512}", cap=n) for n in range(10_240))
    infra = Infra(nodes=nodes, vms=vms)
    assert parsed(format_infra(infra)) == infra
    assert parsed(on_one_line(format_infra(infra))) == infra
