"""`/metrics`: who may read it, what it counts for whom, and that it says so where its library is missing."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from io import StringIO
from logging.config import dictConfig

import pytest

from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from counterweight.pipeline.log_format import LogFormat, logging_config, teller
from counterweight.pipeline.service import metrics
from counterweight.pipeline.service.tokens import Role, TokenEntry, Tokens
from tests.pipeline.service.house import House


def samples(house: House, who: str) -> dict[str, float]:
    """Sample with its labels, as it is written -> value."""
    answer = house.get("/metrics", who)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_jobs_are_counted_for_whoever_sees_them() -> None:
    house = House()
    first = house.submit()["id"]
    house.submit("another", "other")
    lease = take(house.jobs, first, "driver")
    assert lease is not None
    own = samples(house, "viewer")
    assert own['counterweight_jobs{state="running",tenant="red"}'] == 1
    assert (own["counterweight_queue_depth"], own["counterweight_drivers"]) == (0, 1)
    assert not any('tenant="blue"' in name for name in own)
    assert lease.end(Ended(cause=Cause.SURROUNDINGS, again=True, delay=60))
    every = samples(house, "admin")
    assert every['counterweight_jobs{state="waiting",tenant="red"}'] == 1
    assert every['counterweight_jobs{state="queued",tenant="blue"}'] == 1
    assert every['counterweight_attempts_total{cause="surroundings"}'] == 1
    assert (every["counterweight_queue_depth"], every["counterweight_startable_depth"]) == (1, 1)


def test_requests_are_measured_by_route() -> None:
    house = House()
    house.get("/v1/jobs/0123456789abcdef")
    house.get("/v1/jobs/fedcba9876543210")
    house.get("/nowhere/at/all")
    found = samples(house, "viewer")
    name = 'counterweight_http_request_seconds_count{method="GET",route="/v1/jobs/{id}",status="404"}'
    assert found[name] == 2
    assert not any("nowhere" in name for name in found)


def test_a_monitor_reads_metrics_of_all_and_nothing_else() -> None:
    house = House()
    digest = hashlib.sha256(b"monitor-token").hexdigest()
    entry = TokenEntry(name="monitor", role=Role.MONITOR, tenant="nobody", sha256=digest)
    object.__setattr__(house.service, "tokens", Tokens((*house.service.tokens.entries, entry)))
    house.submit()
    assert samples(house, "monitor")['counterweight_jobs{state="queued",tenant="red"}'] == 1
    for path in ("/v1/jobs", "/v1/queue", "/v1/batches"):
        assert house.get(path, "monitor").status_code == 403
    for path in ("/", "/submit", "/batches"):
        assert house.get(path, None, headers={"Cookie": "counterweight_token=monitor-token"}).status_code == 403
    assert house.get("/metrics", None).status_code == 401


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert metrics.make_requests() is None
    house = House()
    answer = house.get("/metrics", "viewer")
    assert (answer.status_code, "counterweight[observability]" in answer.text) == (501, True)


def test_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    teller(LogFormat.JSON, "counterweight.driver")("job 1: é")
    said = json.loads(capsys.readouterr().err)
    assert (said["logger"], said["message"], said["level"]) == ("counterweight.driver", "job 1: é", "info")
    stream = StringIO()
    config = logging_config(LogFormat.JSON, stream)
    assert config is not None
    dictConfig({**config, "root": {}, "loggers": {"counterweight.test": {"handlers": ["stderr"], "propagate": False}}})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("counterweight.test").exception("no %s", "store")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "no store"
    assert "two\nlines" in json.loads(line)["exception"]
    assert logging_config(LogFormat.TEXT, stream) is None
