"""What hosts say of a push or a pull: a line for each different thing, with the hosts that say it."""

from __future__ import annotations

from controller import render
from controller.ctl.following import Following


def show_said(following: Following) -> None:
    """Show it, for the hosts where it went well. What has several lines is counted and indented."""
    good = [result for result in following.results if result.ok]
    for what, hosts in render.grouped(good, lambda result: result.stdout, following.order):
        first, *lines = what.decode("utf-8", "replace").strip().split("\n")
        if lines:
            lines.insert(0, first)
            first = f"{len(lines)} changes" if not lines[-1].startswith("and ") else "many changes"
        following.terminal.text(f"{render.label(hosts)}: {render.clean(first)}\n")
        for line in lines:
            following.terminal.text(f"  {render.clean(line)}\n")
