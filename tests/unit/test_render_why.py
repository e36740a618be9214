"""What `ctl why` says of a host."""

from __future__ import annotations

from controller import api, tables
from controller.render_why import known_object, why
from protocol.messages import HostHealth
from tests.unit import fake_service as fake

HEALTH = HostHealth(
    load1=0.5,
    load5=0.4,
    cpus=4,
    memory_mib=8192,
    memory_free_mib=4096,
    disk_mib=50_000,
    disk_free_mib=2048,
    agent_rss_mib=30.0,
    uptime_s=90,
    version="0.1.0",
)


def known(status: api.HostStatus, **fields: object) -> api.HostKnown:
    """A host as the service knows it: attached to h1, unless said otherwise."""
    usual: dict[str, object] = {
        "status": status,
        "attached": True,
        "below": "h1",
        "epoch": 4,
        "said": "",
        "key": "k" * 40,
        "control_port": 7001,
        "bulk_port": 7002,
        "ancestors": (
            api.Ancestor(name="h1", address="198.18.0.2", control_port=7000),
            api.Ancestor(name="service", address="198.18.0.1", control_port=7000),
        ),
        "plan_version": 12,
        "unacknowledged": None,
        "vms": 2,
        "lost": (),
    }
    return api.HostKnown(**(usual | fields))  # type: ignore[arg-type]  # a test says what differs


def lines(host: api.HostKnown) -> dict[str, str]:
    """The lines by their names, the first one as the empty name."""
    first, *rest = why(host).splitlines()
    return {"": first} | {line.split()[0]: line.strip().partition(" ")[2].strip() for line in rest}


def test_a_host_where_it_was_planned_says_since_when_and_who_said_so() -> None:
    status = fake.host(3, parent="h1", planned_parent="h1", incarnation=17, since_s=192.0, health=HEALTH)
    told = lines(known(status))
    assert told[""] == "h3 (rank 3): in the tree"
    assert told["link"] == (
        "below h1, as planned, for 3 min 12 s; its agent said so, through h1 (incarnation 17, epoch 4)"
    )
    assert told["plan"] == "acknowledged, up to version 12; it attaches to the first of h1 > service"
    assert told["address"] == "198.18.0.4, ports 7001 (control) and 7002 (bulk)"
    assert "load 0.50" in told["report"]
    assert told["lost"] == "no outcome of late"


def test_a_host_elsewhere_says_why() -> None:
    status = fake.host(3, parent=None, planned_parent="h1", why="h1 did not answer within 3 s", incarnation=17)
    assert lines(known(status, below=None))["link"].startswith(
        "below the service, planned below h1: h1 did not answer within 3 s, for 1 min; its agent said so (inc"
    )


def test_a_host_that_is_down_says_what_its_parent_saw() -> None:
    status = fake.host(3, up=False, planned_parent="h1", why="connection closed", incarnation=17, since_s=6.0)
    told = lines(known(status, attached=False, said="connection closed"))
    assert told[""] == "h3 (rank 3): not in the tree"
    assert told["link"] == "down for 6 s: connection closed; h1 said so (incarnation 17, epoch 4)"


def test_a_host_below_one_that_is_down_points_there() -> None:
    status = fake.host(3, up=False, why="its parent h1 is not in the tree", incarnation=17)
    assert lines(known(status))["link"].endswith("h1 is not in the tree: `ctl why h1`")


def test_a_host_that_was_never_seen_says_so() -> None:
    status = fake.host(3, up=False, why="has not attached since the service began", incarnation=9)
    told = lines(known(status, attached=None, below=None))
    assert told["link"] == "has not attached since the service began; its incarnation was 9 when last heard of"
    assert told["report"] == "none since the service began"


def test_a_part_of_the_plan_that_is_not_confirmed_is_told() -> None:
    assert lines(known(fake.host(3), unacknowledged=11))["plan"].startswith(
        "not acknowledged from version 11 on (now 12): it has an older one"
    )


def test_what_was_lost_is_told_with_its_job_and_obeyed_by_no_terminal() -> None:
    lost = api.LostOutcome(job=7, what='["run", "/bin/sh", "-c", "a\\u001b[2J"]', ago_s=70.0, why="its agent restarted")
    text = why(known(fake.host(3), lost=(lost,)))
    assert "job 7 (a\\x1b[2J), 1 min 10 s ago: its agent restarted" in text


def test_the_tree_says_that_a_planned_parent_is_not_there() -> None:
    text = tables.tree(
        fake.status(
            fake.host(1, up=False, why="connection closed"),
            fake.host(3, parent=None, planned_parent="h1", why="connection closed"),
        )
    )
    assert "h3  (planned below h1, which is not in the tree: connection closed)" in text
    assert "not in the tree: h1: connection closed" in text


def test_programs_are_told_what_a_lost_job_was_in_the_same_words_as_by_ctl_jobs() -> None:
    what = '["run","/bin/sh","-c","uname -r"]'
    lost = api.LostOutcome(job=7, what=what, ago_s=3.0, why="its relay died")
    told = known_object(known(fake.host(3), lost=(lost,)))
    assert told["lost"] == [
        {"job": 7, "what": ["run", "/bin/sh", "-c", "uname -r"], "ago_s": 3.0, "why": "its relay died"}
    ]
    assert (told["status"]["name"], told["below"]) == ("h3", "h1")
