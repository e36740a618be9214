"""What people and programs ask of a real service: choosing hosts by groups, labels and what failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controller.status import CtlError, ExitStatus
from tests.net.localfleet import LocalFleet, local_fleet

HOSTS = tuple(f"h{n}" for n in range(6))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with local_fleet(tmp_path_factory.mktemp("clients"), HOSTS, fanout=3) as found:
        (found.session.directory.parent / "groups.toml").write_text('odd = "h[1,3,5]"\n')
        yield found


# --- choosing hosts ---------------------------------------------------------------------------------------------------


def test_a_host_set_is_read_wherever_hosts_are_asked_for(fleet: LocalFleet) -> None:
    assert set(fleet.answers("true", "@odd!h3")) == {"h1", "h5"}
    assert fleet.session.select("h[0-9]&@all") == HOSTS
    with pytest.raises(CtlError, match="the nearest is @odd"):
        fleet.session.run("true", "@od")


def test_labels_are_kept_and_choose(fleet: LocalFleet) -> None:
    session = fleet.session
    session.label("h[0-2]", {"rack": "1", "gpu": "yes"})
    session.label(["h1"], {"rack": "2"}, drop=["gpu"])
    assert session.select(labels={"rack": "1", "gpu": "yes"}) == ("h0", "h2")
    assert set(fleet.answers("true", "@label:rack=2,h5")) == {"h1", "h5"}
    for wrong in ({"a b": "1"}, {"a": "b c"}):
        with pytest.raises(CtlError):
            session.label("h0", {"fine": "1", **wrong})
    with pytest.raises(CtlError):
        session.label(["h0", "h99"], {"fine": "1"})
    assert all("fine" not in host.labels for host in session.status().hosts), "all or nothing"
    session.label(None, {}, drop=["rack", "gpu"])
    assert not any(host.labels for host in session.status().hosts)


def test_those_that_failed_can_be_asked_again(fleet: LocalFleet) -> None:
    job = fleet.session.run('[ "$CANOPY_HOST" != h2 ] && [ "$CANOPY_HOST" != h4 ]')
    job.results()
    assert fleet.session.failed() == ("h2", "h4")
    assert set(fleet.answers("true", "@failed")) == {"h2", "h4"}
    assert fleet.session.failed() == (), "all of the last job did well"
    with pytest.raises(CtlError, match="no host matches") as caught:
        fleet.session.run("true", "@failed")
    assert caught.value.status == ExitStatus.NO_TARGET
    assert set(fleet.answers("true", f"@failed:{job.id},h0")) == {"h0", "h2", "h4"}
    with pytest.raises(CtlError, match="there is no job 999999"):
        fleet.session.run("true", "@failed:999999")
