"""The example board and rules ask for metrics that there are, with the labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import CollectorRegistry

from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.observability.driver_metrics import DriverMetrics
from counterweight.pipeline.observability.store_metrics import StoreMetrics
from tests.infra.artefacts import INFRA
from tests.pipeline.jobs.theatre import Theatre
from tests.pipeline.observability.test_run_metrics import PUBLISHED, STORY, told
from tests.pipeline.service.house import House

FOLDER = INFRA / "observability"
BOARD = json.loads((FOLDER / "grafana.json").read_text())


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Sample -> its labels, of a service and of a driver that have seen everything."""
    house = House()
    house.submit()
    answer = house.get("/metrics", "admin")
    assert answer.status_code == 200
    theatre = Theatre(house.store)  # type: ignore[arg-type]
    theatre.driver().work(lambda jobs: all(job.state.terminal for job in jobs))
    jobs = JobStore(house.store)
    registry = CollectorRegistry()
    registry.register(StoreMetrics(jobs.all(), jobs.all(), jobs.limits()))
    driver = DriverMetrics(theatre.start)
    told(driver._runs, [*STORY, PUBLISHED])
    requests = house.app.state.requests.registry
    return {
        sample.name: set(sample.labels)
        for one in (registry, driver.registry, requests)
        for family in one.collect()
        for sample in family.samples
    }


def expressions() -> Iterator[str]:
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_metrics_and_labels_exist(known: dict[str, set[str]]) -> None:
    for expression in expressions():
        names = re.findall(r"counterweight_[a-z_]+", expression)
        assert names, expression
        assert set(names) <= set(known), expression
        own = set.union(*(known[name] for name in names))
        asked = {label for text in re.findall(r"by \(([^)]*)\)", expression) for label in text.split(", ")}
        asked |= set(re.findall(r"[{,]\s*([a-z_]+)\s*=", expression))
        assert asked <= own | {"instance"}, expression


def test_every_metric_of_ours_is_on_the_board_or_wakes_somebody(known: dict[str, set[str]]) -> None:
    shown = " ".join(expressions())
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in known}
    left = {name for name in families if not re.search(rf"\b{name}(_bucket|_count|_total)?\b", shown)}
    own = {
        "counterweight_blocks_reused",
        "counterweight_driver_attempts",
        "counterweight_driver_up",
        "counterweight_wait_seconds",
        "counterweight_workers",
    }
    assert left == own, "metrics that the board leaves out"


def test_panels_stand_beside_each_other() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
    assert {target["refId"] for panel in BOARD["panels"] for target in panel["targets"]} <= set("ABC")
