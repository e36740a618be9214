"""`make fuzz-guided`: bytes of others into every place that reads them, guided by what code they reach.

    python -m tests.fuzz.guided [--seconds 60] [--only codec] [--corpus DIRECTORY]
    python -m tests.fuzz.guided --only codec --replay FILE

Each target (targets.py) is a process of its own, niced, under atheris. What it finds interesting stays in the corpus
for the next run. What a target can't take is kept there as crash-*, and the run ends with 1. Where there is no wheel of
atheris for this Python and machine, `make fuzz` draws for the same targets without a guide.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

#: In bytes: more than any limit on one small thing, and little enough to be drawn thousands of times a second.
_LONGEST = 4096
#: What one input may take, in seconds and MiB: nothing that is read here is worth more.
_SLOWEST, _MEMORY = 10, 1024


def main() -> int:
    """The command line. 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--only", metavar="TARGET", help="one target alone")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="where finds and crashes are kept")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="give a target this file alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return _work(given.only, given.seconds, given.corpus)
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if given.only is None else [given.only]
    if given.only not in (None, *TARGETS):
        parser.error(f"there is no target {given.only}; there are {', '.join(TARGETS)}")
    if given.replay is not None:
        for name in names:
            TARGETS[name].take(given.replay.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("there is no atheris for this Python and machine: `make fuzz` does without", file=sys.stderr)
        return 1
    return 1 if sum(_found(name, TARGETS[name].seeds, given.seconds, given.corpus / name) for name in names) else 0


def _found(name: str, seeds: tuple[bytes, ...], seconds: int, corpus: Path) -> bool:
    """Fuzz one target, and say what came of it. Whether there is something that it can't take."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(sample)
    worker = ["nice", sys.executable, "-m", "tests.fuzz.guided", "--worker"]
    began = time.monotonic()
    done = subprocess.run(
        [*worker, "--only", name, "--seconds", str(seconds), "--corpus", str(corpus)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    runs = next((line for line in reversed(said) if line.startswith("Done ")), "")
    kept = sorted(path.name for path in corpus.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-")))
    state = "nothing found" if not done.returncode else f"FOUND {', '.join(kept) or done.returncode}"
    print(f"{name:<8} {time.monotonic() - began:5.0f} s  {state}  {runs}", flush=True)
    if done.returncode:
        print("\n".join(f"    {line}" for line in said if not line.startswith(("#", "INFO")))[-4_000:])
        print(f'    again: make fuzz-guided ARGS="--only {name} --replay {corpus}/FILE"')
    return bool(done.returncode)


def _work(name: str, seconds: int, corpus: Path) -> int:
    """The process of one target; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["protocol", "controller", "agent", "tests.fuzz"]):
        from tests.fuzz.targets import TARGETS
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST}",
        f"-timeout={_SLOWEST}",
        f"-rss_limit_mb={_MEMORY}",
        f"-artifact_prefix={corpus}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name].take)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
