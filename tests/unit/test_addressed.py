"""Who has an address, by ARP's table (proc(5))."""

from __future__ import annotations

from pathlib import Path

from agent.addressed import found_by_arp

TABLE = """\
IP address       HW type     Flags       HW address            Mask     Device
10.0.0.1         0x1         0x2         00:16:3e:00:00:01     *        br0
10.0.0.2         0x1         0x0         00:00:00:00:00:00     *        br0
10.0.0.3         0x1         0x6         00:16:3e:00:00:03     *        br0
10.0.0.4         0x1         0x2         52:54:00:12:34:56     *        br0
10.0.0.9         0x1         0x2         00:16:3e:00:00:09     *        br0
what is this
"""


def test_an_address_counts_where_the_very_vm_answered_for_it(tmp_path: Path) -> None:
    table = tmp_path / "arp"
    table.write_text(TABLE)
    macs = {f"10.0.0.{n}": f"00:16:3E:00:00:0{n}" for n in range(1, 6)}
    # 2 did not answer, 3 was put there by hand, 4 is another machine's, 5 was never asked.
    assert found_by_arp(macs, str(table)) == {"10.0.0.1"}


def test_a_table_that_can_t_be_read_tells_of_nobody(tmp_path: Path) -> None:
    assert found_by_arp({"10.0.0.1": "00:16:3E:00:00:01"}, str(tmp_path / "none")) == set()
