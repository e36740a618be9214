"""`python -m tests.sim.mutants`: plant one fault at a time in a copy of protocol/, and see that the simulator finds it.

Each mutant is a named change of one place. Where no seed finds it, the tests beside this file are asked. Exit code 1
where one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
#: Seeds that a mutant has to survive, and the largest tree among them: faults of the protocol show in small ones.
_SCHEDULES = 400
_MOST = 25
#: The tests that are asked then: those of whole trees, and those of the parts that the faults are planted in.
_TESTS = (
    *(f"tests/sim/test_{name}.py" for name in ("broadcast", "stateful", "golden", "scarce_credit")),
    *(
        f"tests/unit/test_{name}.py"
        for name in ("relay", "root_restart", "duty", "keeping", "folding", "pacing", "picture", "uplink")
    ),
)
#: Seconds for each of the two; a mutant that hangs is found as well.
_WITHIN = 300


@dataclass(frozen=True)
class Mutant:
    """In `file` of protocol/, `old` (which stands there once) becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("a settled command is not told", "settling.py", "            self._tell(TellSettled(id_))\n", ""),
    Mutant(
        "an outcome is settled as often as it comes",
        "ledger.py",
        "fresh = ranks.unpack(fold.ranks) & self.missing",
        "fresh = ranks.unpack(fold.ranks) & self.targets",
    ),
    Mutant(
        "commands are not recognised when they come again",
        "duty.py",
        "        if id_ in self._keeping:\n            return True, self._keeping.answer(id_)\n"
        "        if id_ in self._tasks:\n",
        "        if id_ in self._running:\n",
    ),
    Mutant(
        "outcomes are forgotten as soon as they are sent",
        "duty.py",
        "        if task.settled:\n            del self._tasks[event.id]",
        "        if True:\n            del self._tasks[event.id]",
    ),
    Mutant(
        "what is settled is not forgotten",
        "duty.py",
        "            del self._tasks[id_]\n            gone.append(id_)",
        "            gone.append(id_)",
    ),
    Mutant(
        "an unanswered command that is settled may begin later",
        "duty.py",
        "                self._seen.setdefault(id_, until)\n",
        "",
    ),
    Mutant(
        "a cancel that overtakes its command is not remembered",
        "duty.py",
        "            self._tasks[of] = _Task(Cancel(of=of), None, over=True)\n            self._seen[of] = inf\n"
        "            return self._keeping.add(of, None, outcome, NO_OUTPUT, now), [(of, (outcome, NO_OUTPUT))]\n",
        "            return [], [(of, (outcome, NO_OUTPUT))]\n",
    ),
    Mutant(
        "a cancel ends nothing",
        "duty.py",
        "        return self._end(of, task, Cancelled(ran=True), now), []",
        "        return [], []",
    ),
    Mutant(
        "the certain signal never follows the polite one",
        "duty.py",
        "                task.kill_at = None\n                effects.append(Stop(id_, hard=True))",
        "                task.kill_at = None",
    ),
    Mutant(
        "commands that wait for the root's time are dropped",
        "relay.py",
        "        for delivery in self._duty.take_postponed(now):\n            self._deliver_here(delivery, now)\n",
        "",
    ),
    Mutant(
        "the root's time is not asked for",
        "relay.py",
        "        self._clock_pause = CLOCK_RETRY\n        self._ask_clock(now)\n",
        "",
    ),
    Mutant(
        "an agent does what was given before it began",
        "trust.py",
        "        if command.issued_ms / 1000 < self.time.at(self.started):",
        "        if False:",
    ),
    Mutant(
        "who comes back is not asked again",
        "settling.py",
        "        ask = back | self._picture.under(link.rank for link in news if link.up)",
        "        ask = ranks.NONE",
    ),
    Mutant(
        "who comes by another way is not asked again",
        "settling.py",
        "        ask = back | self._picture.under(link.rank for link in news if link.up)",
        "        ask = back",
    ),
    Mutant(
        "a restart of an agent is not noted",
        "settling.py",
        "        self._incarnations |= {link.rank: link.incarnation for link in news}\n",
        "",
    ),
    Mutant(
        "a host that never had the command is lost with its predecessor",
        "settling.py",
        "account.missing & account.sent & reborn",
        "account.missing & reborn",
    ),
    Mutant(
        "who is out of reach is waited for without end",
        "settling.py",
        "                folds += account.lose(absence.who & account.missing, absence.why)",
        "                pass",
    ),
    Mutant(
        "who came back is lost all the same",
        "settling.py",
        "            self._absences = [a for a in (absence.without(back) for absence in self._absences) if a.who]",
        "            pass",
    ),
    Mutant(
        "the deadline is kept by the agent alone",
        "settling.py",
        "        deadline = None if delivery.ttl_ms is None else now + delivery.ttl_ms / 1000",
        "        deadline = None",
    ),
    Mutant(
        "an agent does not keep the deadline",
        "duty.py",
        "        task = _Task(command.body, None if ttl is None else now + ttl, signature)",
        "        task = _Task(command.body, None, signature)",
    ),
    Mutant(
        "who has just left is lost at once",
        "settling.py",
        "                absent &= ~absence.who  # it may still come back in time",
        "                pass",
    ),
    Mutant(
        "hosts that find back to a new service are lost at once",
        "settling.py",
        "        self._expect_back(ranks.union(self._incarnations) & planned, now)\n",
        "",
    ),
    Mutant(
        "down does not beat up at equal numbers",
        "picture.py",
        "return (new.incarnation, new.epoch, not new.up) > (old.incarnation, old.epoch, not old.up)",
        "return (new.incarnation, new.epoch) > (old.incarnation, old.epoch)",
    ),
    Mutant(
        "the epoch does not count",
        "uplink.py",
        "            self.epoch += 1\n",
        "            self.epoch = 1\n",
    ),
    Mutant(
        "an answer to an older attachment is taken",
        "uplink.py",
        "        if self.phase is not Phase.ATTACHING or epoch != self.epoch:",
        "        if self.phase is Phase.ATTACHED:",
    ),
    Mutant(
        "the next ancestor is never tried",
        "uplink.py",
        "        self._index = (self._index + 1) % len(self._ancestors)\n",
        "",
    ),
    Mutant(
        "a silent parent is kept",
        "uplink.py",
        '            return self.lost(f"silent for {SILENT_AFTER:g} s", now)\n',
        "            self.heard = now\n",
    ),
    Mutant(
        "a silent child is kept",
        "relay.py",
        '            self._child_lost(rank, f"silent for {SILENT_AFTER:g} s", now)\n',
        "            self._heard_at[rank] = now\n",
    ),
    Mutant(
        "a process that slept does not doubt itself",
        "relay.py",
        "        if not self._expected or slept <= PAUSED_AFTER:",
        "        if True:",
    ),
    Mutant(
        "nobody beats",
        "relay.py",
        "            self._up(Beat())\n",
        "",
    ),
    Mutant(
        "folded outcomes are dropped when the way up goes",
        "relay.py",
        "        if effects:\n            self._folding.expect_nobody()\n",
        "        if effects:\n            self._folding = Folding()\n",
    ),
    Mutant(
        "outcomes wait for those who have gone",
        "folding.py",
        "            pending.waiting &= reachable\n",
        "",
    ),
    Mutant(
        "outcomes that came in time are not sent",
        "folding.py",
        "                yield self._message(id_, pending, keys)\n",
        "                self._message(id_, pending, keys)\n",
    ),
    Mutant(
        "news overtakes the outcomes that came before it",
        "relay.py",
        "        for message in self._folding.about(gone | named | anew) if self._pace.last_room else ():\n",
        "        for message in ():\n",
    ),
    Mutant(
        "what goes before news costs an honest child its link",
        "pacing.py",
        "        may = self._unheard(child) < OUTCOME_LAST and",
        "        may = self._unheard(child) < OUTCOME_CREDIT and",
    ),
    Mutant(
        "who attaches again has its credit anew, whatever is held of it",
        "pacing.py",
        "            self._before[child] = self._before.get(child, 0) + unheard\n",
        "            pass\n",
    ),
    Mutant(
        "a relay says late what is no longer its to say",
        "relay.py",
        "        foreign = ranks.NONE if claims is None else claims & ~here\n",
        "        foreign = ranks.NONE\n",
    ),
    Mutant(
        "a relay says before news what is no longer its to say",
        "relay.py",
        "            self._up_outcomes(self._to_say(message, gone))\n",
        "            self._up_outcomes(message)\n",
    ),
    Mutant(
        "what those who go had answered is not said before the news",
        "relay.py",
        "            self._up_outcomes(self._to_say(message, gone))\n",
        "            self._up_outcomes(self._to_say(message))\n",
    ),
    Mutant(
        "what changed below while there was no way up is not told",
        "relay.py",
        "            self._untold |= {link.rank: link for link in told}\n",
        "",
    ),
    Mutant(
        "those below are not told of a new way up",
        "relay.py",
        "        for rank in sorted(self._heard_at):\n            self._effects.append(ToChild(rank, Attached(",
        "        for rank in ():\n            self._effects.append(ToChild(rank, Attached(",
    ),
    Mutant(
        "a full list says nothing of those who are not in it",
        "relay.py",
        "        news += self._picture.apply(self._picture.contradicted(complete, message.links))\n",
        "",
    ),
    Mutant(
        "a child that was planned away stays",
        "relay.py",
        "            for rank in sorted(set(self._heard_at) - set(self._rights.planned)):",
        "            for rank in ():",
    ),
    Mutant(
        "a child may speak for nobody but those in the present plan",
        "rights.py",
        "        return claimed & ~(self._allowed[child] | hanging)",
        "        return claimed & ~self.planned[child]",
    ),
    Mutant(
        "who could not be heard of is taken for lost by those above",
        "relay.py",
        "        complete = [link for link in links if not ranks.holds(unsaid, link.rank)]\n",
        "        complete = links\n",
    ),
    Mutant(
        "a service that began anew gives a successor what its predecessor may have begun",
        "settling.py",
        "        account.reborn = ranks.NONE if account.again else reborn & owing\n",
        "        account.reborn = ranks.NONE\n",
    ),
    Mutant(
        "those far below a lost host are waited for no longer than its children",
        "settling.py",
        "now + ORPHANED_AFTER - LOST_AFTER",
        "now",
    ),
    Mutant(
        "what a child could not say yet is never heard",
        "rights.py",
        "                self._unheard[child] |= about & foreign\n",
        "",
    ),
    Mutant(
        "commands that went astray are not answered",
        "relay.py",
        "            self._tell_astray(ranks.each(astray & ~ranks.only(self._rank())))\n",
        "            pass\n",
    ),
    Mutant(
        "a newer plan is not followed",
        "relay.py",
        "        self._uplink.replan(plan.ancestors, now)\n",
        "",
    ),
    Mutant(
        "a relay that is out for good keeps its children",
        "relay.py",
        "            for rank in self._stranded.advance(now, self._heard_at):",
        "            for rank in ():",
    ),
    Mutant(
        "the time that remains is not counted on",
        "ledger.py",
        "        ttl = None if self.deadline is None else max(0, round((self.deadline - now) * 1000))",
        "        ttl = self.delivery.ttl_ms",
    ),
    Mutant(
        "a cancelled command is given again to who comes back",
        "ledger.py",
        "        delivery = self.cancel or self.delivery\n",
        "        delivery = self.delivery\n",
    ),
    Mutant(
        "what is on disk is not answered",
        "keeping.py",
        "        return id_ in self._held or id_ in self._found\n",
        "        return id_ in self._held\n",
    ),
    Mutant(
        "outcomes are not written to disk",
        "keeping.py",
        "            if held is not None:\n                effects += self._write(id_, held)\n",
        "            del held\n",
    ),
    Mutant(
        "what is on disk is never removed",
        "duty.py",
        "        return [Forget(tuple(gone))] if gone else []\n",
        "        return []\n",
    ),
    Mutant(
        "a damaged outcome is answered by nothing",
        "keeping.py",
        "            return Lost(UNREADABLE), NO_OUTPUT\n",
        "            return None\n",
    ),
    Mutant(
        "a cancel that overtakes the question says that the predecessor did not begin",
        "ledger.py",
        "            if fold.outcome == Cancelled(ran=False) and fresh & self.reborn:",
        "            if False:",
    ),
    Mutant(
        "who was lost is not asked again",
        "settling.py",
        "        for account in self._late.values():\n",
        "        for account in ():\n",
    ),
    Mutant(
        "a late answer is not told",
        "settling.py",
        "            late = account.late(folds)\n",
        "            late = ()\n",
    ),
)


def planted(mutant: Mutant, text: str) -> str:
    """The file's text with the fault in it. Raises ValueError where it does not stand there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"the mutant {mutant.name!r} no longer fits protocol/{mutant.file}: write its place anew in {__file__}"
        )
    return text.replace(mutant.old, mutant.new)


def caught_by(mutant: Mutant | None, schedules: int) -> str | None:
    """What finds the mutant: a seed, or a test's name; None where it survives. Without a mutant: what finds nothing."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        directory = Path(name)
        for package in ("protocol", "tests/sim", "tests/unit"):
            shutil.copytree(_ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            target = directory / "protocol" / mutant.file
            target.write_text(planted(mutant, target.read_text(encoding="utf-8")), encoding="utf-8")
        seeds = _run(
            directory, "tests.sim", "--schedules", str(schedules), "--most", str(_MOST), "--jobs", "1", "--no-shrink"
        )
        if seeds is not None:
            return seeds
        return _run(directory, "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *_TESTS)


def _run(directory: Path, module: str, *arguments: str) -> str | None:
    """Run it over the copy: what it found, in a few words, or None."""
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=_WITHIN, check=False
        )
    except subprocess.TimeoutExpired:
        return "it hangs"
    if not done.returncode:
        return None
    for line in done.stdout.splitlines():
        if line.startswith("FAILED "):
            return line.removeprefix("FAILED ")
    # Neither a seed nor a test: it was not the mutant that failed.
    raise RuntimeError(f"{' '.join(command)} failed by itself:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> int:
    """Try them all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("--schedules", type=int, default=_SCHEDULES, help="how many seeds each has to survive")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="", help="those with this in their name")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    wrong = caught_by(None, options.schedules)
    if wrong is not None:
        print(f"Without any fault planted this fails, so that it tells nothing: {wrong}")
        return 1
    width = max(len(mutant.name) for mutant in chosen)
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda mutant: caught_by(mutant, options.schedules), chosen)
        for mutant, why in zip(chosen, found, strict=True):
            survivors += why is None
            print(f"{mutant.name:{width}}  {(why or 'SURVIVES').splitlines()[0][:110]}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} of them survive.")
    return min(1, survivors)


if __name__ == "__main__":
    sys.exit(main())
