"""The name -> IP file as service and agents both know it."""

from __future__ import annotations

#: Where a host has it: in its agent's own directory.
PATH = "@/vms.hosts"
#: Ends the file's first line where hosts are to have the names in /etc/hosts as well.
IN_ETC_HOSTS = ", also in /etc/hosts"
