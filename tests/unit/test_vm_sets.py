"""Which VMs are meant, and that nobody's VM is meant by a slip."""

from __future__ import annotations

from typing import Any

import pytest

from controller.status import CtlError, ExitStatus
from controller.vm_sets import pick
from tests.unit import fake_service as fake

VMS = [
    *(fake.vm(f"vm{n:02}", f"h{n % 2}", deployment="lab") for n in range(12)),
    fake.vm("web-a", "h0", deployment="lab"),
    fake.vm("web-b", "h1", deployment="shop"),
    fake.vm("vm00", "h2", deployment="shop"),
]


@pytest.mark.parametrize(
    ("texts", "more", "found"),
    [
        (["vm01"], {}, {"lab": ["vm01"]}),
        (["vm[03-05],vm11"], {}, {"lab": ["vm03", "vm04", "vm05", "vm11"]}),
        (["web-*", "vm02"], {}, {"lab": ["vm02", "web-a"], "shop": ["web-b"]}),
        (["vm0?"], {"hosts": {"h1"}}, {"lab": ["vm01", "vm03", "vm05", "vm07", "vm09"]}),
        (["vm00"], {"deployment": "shop"}, {"shop": ["vm00"]}),
        (["vm00"], {"hosts": ["h2"]}, {"shop": ["vm00"]}),
        ([], {"hosts": ["h2"]}, {"shop": ["vm00"]}),
        ([], {"deployment": "shop", "everything": True}, {"shop": ["web-b", "vm00"]}),
    ],
)
def test_names_ranges_wildcards_hosts_and_deployments(
    texts: list[str], more: dict[str, Any], found: dict[str, list[str]]
) -> None:
    assert pick(VMS, texts, **more) == found


@pytest.mark.parametrize(
    ("texts", "more", "status", "why"),
    [
        ([], {}, ExitStatus.USAGE, "which VMs"),
        ([], {"everything": True}, ExitStatus.USAGE, "which VMs"),
        ([], {"deployment": "lab"}, ExitStatus.USAGE, "which VMs"),
        (["vm[10-14]"], {}, ExitStatus.NO_TARGET, "not on record: vm12, vm13, vm14;"),
        (["zz*", "nobody"], {}, ExitStatus.NO_TARGET, r"not on record: zz\*, nobody;"),
        (["vm0[0-1]"], {}, ExitStatus.USAGE, "several deployments have vm00: choose"),
        (["vm01"], {"hosts": ["h0"]}, ExitStatus.NO_TARGET, "not on record: vm01"),
        ([], {"hosts": ["h9"]}, ExitStatus.NO_TARGET, "no VM is on record there"),
    ],
)
def test_what_is_not_clear_is_refused(texts: list[str], more: dict[str, Any], status: ExitStatus, why: str) -> None:
    with pytest.raises(CtlError, match=why) as caught:
        pick(VMS, texts, **more)
    assert caught.value.status is status
