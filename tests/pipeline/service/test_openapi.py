"""The OpenAPI document is one, and docs/api.md is made from it."""

from __future__ import annotations

from pathlib import Path

from openapi_spec_validator import OpenAPIV31SpecValidator

from counterweight.pipeline.jobs.facts import facts, schedule_facts
from counterweight.pipeline.service import models
from counterweight.pipeline.service.reference import reference
from counterweight.workers.errors import StorageError
from tests.pipeline.service.house import House, bundle

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"
MARK = "<!-- generated: python -m tests.pipeline.service.test_openapi -->\n"


def test_it_is_openapi_3_1_and_open_to_everybody() -> None:
    answer = House().get("/v1/openapi.json", None)
    assert answer.status_code == 200
    assert answer.json()["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(answer.json()).validate()


def test_every_operation_is_described_and_refuses_with_problems() -> None:
    for path, operations in House().app.openapi()["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            for code in ("4XX", "5XX"):
                assert list(operation["responses"][code]["content"]) == ["application/problem+json"]
            assert ("security" in operation) == path.startswith("/v1"), path


def test_models_are_what_the_commands_print() -> None:
    house = House()
    house.submit()
    house.post("/v1/batches", bundle())
    house.post("/v1/schedules", bundle(schedule="0 2 * * *"))
    (batch,) = house.get("/v1/batches").json()["batches"]
    (schedule,) = house.service.schedules.all()
    assert set(models.JobFacts.model_fields) == set(facts(house.jobs.all()[0]))
    assert set(models.BatchFacts.model_fields) == set(batch)
    assert set(models.ScheduleFacts.model_fields) == set(schedule_facts(schedule, house.store.now()))


def test_the_reference_is_up_to_date() -> None:
    assert DOCUMENT.read_text().partition(MARK)[2] == reference(House().app.openapi())


def test_health_says_whether_the_store_can_be_read() -> None:
    house = House()
    assert [house.get(path, None).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    away = House()

    def read(key: str) -> bytes:
        raise StorageError("503")

    away.store._read = read  # type: ignore[method-assign]
    assert [away.get(path, None).status_code for path in ("/healthz", "/readyz")] == [200, 503]


if __name__ == "__main__":
    text = DOCUMENT.read_text().partition(MARK)[0]
    DOCUMENT.write_text(text + MARK + reference(House().app.openapi()))
