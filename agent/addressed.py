"""Which VMs have an address, also those whose guests do not answer ping: whom ARP has found on this host."""

from __future__ import annotations

from collections.abc import Mapping

_TABLE = "/proc/net/arp"
# From linux/if_arp.h: the entry is complete; and it was put there by hand, which says nothing of the guest.
_COMPLETE, _PERMANENT = 0x02, 0x04


def found_by_arp(macs: Mapping[str, str], table: str = _TABLE) -> set[str]:
    """The addresses of `macs` (IP to MAC) behind which this host has found that very MAC. The table is proc(5)'s."""
    found = set()
    try:
        with open(table, encoding="ascii", errors="replace") as file:
            for line in file:
                columns = line.split()
                if len(columns) < 6 or columns[0] not in macs:
                    continue
                flags = int(columns[2], 16)
                if flags & _COMPLETE and not flags & _PERMANENT and columns[3].lower() == macs[columns[0]].lower():
                    found.add(columns[0])
    except (OSError, ValueError):
        pass  # who can't be asked has found nobody
    return found
