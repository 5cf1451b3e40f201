"""Faults of the processes of `counterweight run`, and of the networks between them, each at a moment that a seed chooses.

The run ends as a job of `tests.faults.drills` does, or as it was told to; none of its processes is left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random

from counterweight.pipeline.reaper import descendants
from counterweight.workers.storage import open_store
from counterweight.workers.storage.probe import PROBES
from tests.faults.site import NOTHING, SAME, Drill, Site
from tests.faults.strikes import FORKED, LAST, UNDER_RAY, Strike, moments, reached
from tests.faults.variants import VARIANTS
from tests.pipeline.tiny import Run, Start, alive, run_local, until

ONE = ("--set", "spec.resources={workers: 1, cpus_per_worker: 1}")
TWO = ("--set", "spec.resources={workers: 2, cpus_per_worker: 1}")


@dataclass(frozen=True, slots=True)
class Command:
    """How a job is run. pause: seconds behind a moment up to which a strike comes. start: see `Run`."""

    arguments: Sequence[str]
    pause: float
    start: Start | None = None


class ProcessDrills:
    """forked, under_ray: name -> drill, for a worker that is a fork of the command, and for two of an embedded Ray. start: of
    commands without Ray."""

    def __init__(self, site: Site, start: Start) -> None:
        self._site = site
        ray, fork = Command(TWO, pause=1.0), Command(ONE, pause=0.3, start=start)
        self.under_ray: dict[str, Drill] = {name: partial(self._run, ray, one) for name, one in UNDER_RAY.items()}
        self.forked: dict[str, Drill] = {
            f"{name}, without Ray": partial(self._run, fork, one) for name, one in FORKED.items()
        }

    def _run(self, command: Command, strike: Strike, draw: Random) -> str:
        variant = drawn(self._site, draw)
        with self._site.directory() as output:
            return struck(self._site, variant, output, command, strike, draw)


def drawn(site: Site, draw: Random) -> str:
    """One of the variants, which has been run undisturbed."""
    variant = draw.choice(list(VARIANTS))
    site.undisturbed(variant)
    return variant


def struck(site: Site, variant: str, output: str, command: Command, strike: Strike, draw: Random) -> str:
    """Runs a job; what is done to it comes at a moment that is drawn."""
    settings = ["--output", output, *command.arguments]
    for override in VARIANTS[variant]:
        settings += ["--set", override]
    job, run = site.job(variant, output), Run(site.manifest, *settings, start=command.start)
    below: list[int] = []
    expected: tuple[int, ...] = ()
    try:
        moment, pause = draw.choice(moments(variant)), draw.choice((0.0, draw.uniform(0, command.pause)))
        if reached(run, moment):
            time.sleep(0.0 if moment == LAST else pause)
            below = [pid for pid, _ in descendants(run.process.pid)]
            with suppress(ProcessLookupError):  # the run may be over by now
                expected = strike(run, draw, lambda: run_local(job))
        code, out, err = run.finish()
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code in (0, *expected), (code, err)
    assert "Traceback" not in err, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 4), err
    assert (len(out.splitlines()) == 1) == (code == 0), out
    until(lambda: not any(map(alive, below)))
    published = run_local(job)  # from what is there
    if code >= 0:
        assert not [info for info in open_store(output).list(f"{PROBES}/") if info.key.endswith("/seen")]
    site.check(variant, output, published.uri, killed=bool(expected))
    if not expected:
        return NOTHING
    return SAME if code == 0 else f"exit {code}, then {SAME}"
