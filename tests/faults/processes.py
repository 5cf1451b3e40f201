"""Faults of the processes of `counterweight run` on an embedded Ray, each at a moment that a seed chooses.

The run ends as a job of `tests.faults.drills` does, or as it was told to; none of its processes is left.
"""

from __future__ import annotations

import time
from functools import partial
from random import Random

from counterweight.pipeline.reaper import descendants
from counterweight.workers.storage import open_store
from counterweight.workers.storage.probe import PROBES
from tests.faults.site import NOTHING, SAME, Drill, Site
from tests.faults.strikes import LAST, STRIKES, Strike, moments, reached
from tests.faults.variants import VARIANTS
from tests.pipeline.tiny import Run, alive, run_local, until


class ProcessDrills:
    """kinds: name -> drill."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.kinds: dict[str, Drill] = {name: partial(self._process, strike) for name, strike in STRIKES.items()}

    def _process(self, strike: Strike, draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        with self._site.directory() as output:
            settings = ["--output", output, "--set", "spec.resources={workers: 2, cpus_per_worker: 1}"]
            for override in VARIANTS[variant]:
                settings += ["--set", override]
            job, run = self._site.job(variant, output), Run(self._site.manifest, *settings)
            below: list[int] = []
            expected: tuple[int, ...] = ()
            try:
                moment, pause = draw.choice(moments(variant)), draw.choice((0.0, draw.uniform(0, 1)))
                if reached(run, moment):
                    time.sleep(0.0 if moment == LAST else pause)
                    below = [pid for pid, _ in descendants(run.process.pid)]
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
            self._site.check(variant, output, published.uri, killed=bool(expected))
            if not expected:
                return NOTHING
            return SAME if code == 0 else f"exit {code}, then {SAME}"
