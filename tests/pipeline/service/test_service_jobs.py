"""Jobs over HTTP: submitted, listed, watched, cancelled, by every role and for every tenant."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import yaml

from counterweight.pipeline.jobs.drivers import Announcer
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import Lease, take
from counterweight.pipeline.jobs.states import Cause
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.house import YAML, House, document


@pytest.fixture
def house() -> House:
    return House()


def leased(house: House, id: str) -> Lease:
    lease = take(house.jobs, id, "driver")
    assert lease is not None
    return lease


def end(house: House, id: str, **ended: Any) -> None:
    assert leased(house, id).end(Ended(**{"cause": Cause.DONE, "exit_code": 0, **ended}))


def events_in(answer: httpx.Response) -> list[dict[str, str]]:
    """The events of a stream: their fields by name."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_a_manifest_is_one_job_in_json_and_in_yaml(house: House) -> None:
    first = house.post("/v1/jobs?priority=7", document())
    assert first.status_code == 201
    assert first.json()["state"] == "queued"
    assert (first.json()["tenant"], first.json()["priority"]) == ("red", 7)
    assert first.headers["location"] == f"/v1/jobs/{first.json()['id']}"
    again = house.ask("POST", "/v1/jobs", content=yaml.safe_dump(document()), headers=YAML)
    assert again.status_code == 200
    assert again.json()["id"] == first.json()["id"]
    assert [job.id for job in house.jobs.all()] == [first.json()["id"]]


def test_a_key_makes_asking_for_another_job_repeatable(house: House) -> None:
    first = house.submit()["id"]
    keys = [{"Idempotency-Key": key} for key in ("one", "one", "two")]
    made = [house.post("/v1/jobs?again=true", document(), headers=key) for key in keys]
    assert [answer.status_code for answer in made] == [201, 200, 201]
    ids = [answer.json()["id"] for answer in made]
    assert ids[0] == ids[1]
    assert len({first, *ids}) == 3
    assert house.post("/v1/jobs?again=true", document()).json()["id"] == f"{first}-1"


def test_what_is_wrong_is_told_by_field_and_leaves_nothing(house: House) -> None:
    wrong = document()
    wrong["spec"]["recipe"]["weights"]["bits"] = 9
    wrong["spec"]["calibration"]["sequences"] = 0
    answer = house.post("/v1/jobs", wrong)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    problem = answer.json()
    assert (problem["status"], problem["type"]) == (422, "about:blank")
    assert {"spec.recipe.weights.bits", "spec.calibration.sequences"} == {error["field"] for error in problem["errors"]}
    assert house.keys() == []


@pytest.mark.parametrize("place", ["model", "text", "output"])
@pytest.mark.parametrize(
    "uri",
    ["file:/etc/passwd", "file:/allowed/../etc", "file:/allowedly/x", "s3://bucket/allowedly", "s3://other/allowed"],
)
def test_every_place_lies_below_the_roots(house: House, place: str, uri: str) -> None:
    answer = house.post("/v1/jobs", document(**{place: uri}))
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"].endswith("uri")
    assert house.keys() == []
    assert house.submit(**{place: "s3://bucket/allowed/x"})["state"] == "queued"


def test_the_hub_is_a_choice() -> None:
    closed, opened = House(), House(roots=("hf:", "file:/allowed"))
    data_set = document()
    data_set["spec"]["calibration"]["source"] = {"kind": "dataset", "path": "owner/name"}
    for asked in (document(model="hf:owner/name"), data_set):
        assert closed.post("/v1/jobs", asked).status_code == 422
        assert opened.post("/v1/jobs", asked).status_code == 201


def test_tenants_do_not_see_each_other(house: House) -> None:
    mine, theirs = house.submit("mine")["id"], house.submit("theirs", "other")["id"]
    assert [job["id"] for job in house.get("/v1/jobs").json()["jobs"]] == [mine]
    assert {job["id"] for job in house.get("/v1/jobs", "admin").json()["jobs"]} == {mine, theirs}
    assert house.get("/v1/queue").json() == {"jobs": {"queued": 1}, "queue": [mine], "startable": [mine]}
    for path in ("", "/events", "/logs"):
        assert house.get(f"/v1/jobs/{theirs}{path}").status_code == 404
    assert house.post(f"/v1/jobs/{theirs}/cancel").status_code == 404
    assert house.jobs.get(theirs).state.value == "queued"
    assert house.post("/v1/jobs", document("theirs")).status_code == 409
    assert house.submit("theirs", query="?again=true")["id"] == f"{theirs}-1"


def test_only_an_admin_submits_for_others(house: House) -> None:
    assert house.post("/v1/jobs?tenant=blue", document()).status_code == 403
    assert house.keys() == []
    assert house.submit(who="admin", query="?tenant=blue")["tenant"] == "blue"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/{id}/cancel", "/v1/batches", "/v1/schedules"])
def test_a_viewer_changes_nothing(house: House, path: str) -> None:
    id = house.submit()["id"]
    before = house.keys()
    assert house.post(path.format(id=id), document("more"), "viewer").status_code == 403
    assert house.keys() == before
    assert house.get(f"/v1/jobs/{id}", "viewer").json()["manifest"]["metadata"]["name"] == "tiny"


def test_a_cancelled_job_says_who_did_it(house: House) -> None:
    id = house.submit()["id"]
    assert house.post(f"/v1/jobs/{id}/cancel").json()["state"] == "cancelled"
    told = house.get(f"/v1/jobs/{id}").json()
    assert told["journal"][0]["line"] == "by submitter"
    assert "nonce" not in json.dumps(told)


def test_pages_follow_each_other_while_jobs_are_added() -> None:
    store = MemoryStore()
    house, ids = House(store), []
    for number in range(7):
        store.advance(number // 2)  # some at the same moment
        ids.append(house.submit(f"job-{number}")["id"])
    seen: list[str] = []
    query = "?limit=3"
    while query:
        answer = house.get(f"/v1/jobs{query}").json()
        seen += [job["id"] for job in answer["jobs"]]
        house.submit(f"later-{len(seen)}")
        query = f"?limit=3&cursor={answer['next']}" if answer["next"] else ""
    assert sorted(seen) == sorted(ids)
    assert seen[0] == ids[-1]


def test_lists_are_filtered(house: House) -> None:
    queued, done = house.submit("queued")["id"], house.submit("done")["id"]
    end(house, done)
    batch = house.post("/v1/batches", {"batch": _batch("done"), "manifests": {"m": document("of-batch")}}).json()["id"]
    for query, expected in (
        ("state=succeeded", [done]),
        ("tenant=blue", []),
        ("state=queued&limit=1&tenant=red", None),
    ):
        found = [job["id"] for job in house.get(f"/v1/jobs?{query}").json()["jobs"]]
        assert found == expected if expected is not None else len(found) == 1
    assert [job["name"] for job in house.get(f"/v1/jobs?batch={batch}").json()["jobs"]] == ["of-batch"]
    assert queued in [job["id"] for job in house.get("/v1/jobs?state=queued").json()["jobs"]]


def _batch(name: str) -> dict[str, Any]:
    spec = {"jobs": ["m"]}
    return {"apiVersion": "counterweight/v1", "kind": "CompressionBatch", "metadata": {"name": name}, "spec": spec}


def test_logs_are_streamed_to_the_end_and_from_any_place(house: House) -> None:
    id = house.submit()["id"]
    house.store.write(f"_logs/{id}/0001/00001.log", b"one\ntwo\n")
    house.store.write(f"_logs/{id}/0003/00001.log", "drei ü\n".encode())
    end(house, id)
    told = events_in(house.get(f"/v1/jobs/{id}/logs"))
    assert [json.loads(event["data"]) for event in told[:-1]] == [
        {"attempt": 1, "line": "one"},
        {"attempt": 1, "line": "two"},
        {"attempt": 3, "line": "drei ü"},
    ]
    assert told[-1]["event"] == "end"
    assert json.loads(told[-1]["data"])["state"] == "succeeded"
    for number, event in enumerate(told[:-1], 1):
        rest = events_in(house.get(f"/v1/jobs/{id}/logs", headers={"Last-Event-ID": event["id"]}))
        assert rest == told[number:]
    assert house.get(f"/v1/jobs/{id}/logs", headers={"Last-Event-ID": told[-1]["id"]}).status_code == 204


def test_a_stream_waits_for_what_comes_and_ends_with_the_job(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("out")
    steps: list[Any] = []

    async def pause(seconds: float) -> None:
        steps.pop(0)()

    house = House(roots=("file:/allowed", folder.as_uri()), pause=pause)
    id = house.submit(output=folder.as_uri())["id"]
    run = folder / "_work" / "events" / id / "20991231T000000Z-abcdef"
    run.mkdir(parents=True)

    def write() -> None:
        (run / "00001.jsonl").write_text(
            '{"kind": "planned", "blocks": 2, "reused": 0}\nnot JSON\n{"kind": "note\\n"}\n'
        )

    lease: list[Lease] = []
    steps += [
        lambda: lease.append(leased(house, id)),
        write,
        lambda: lease[0].end(Ended(cause=Cause.DONE, exit_code=0)),
    ]
    told = events_in(house.get(f"/v1/jobs/{id}/events"))
    assert [event["event"] for event in told] == ["state", "state", "planned", "state", "end"]
    assert [json.loads(told[at]["data"])["state"] for at in (0, 1, 3)] == ["queued", "running", "succeeded"]
    assert json.loads(told[2]["data"])["blocks"] == 2
    assert not steps


def test_events_of_an_output_elsewhere_are_not_opened(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A job that was submitted with the command may write anywhere."""
    folder = tmp_path_factory.mktemp("out")
    House(store := MemoryStore(), roots=("file:/",)).submit(output=folder.as_uri())
    house = House(store)
    id = house.jobs.all()[0].id
    run = folder / "_work" / "events" / id / "20991231T000000Z-abcdef"
    run.mkdir(parents=True)
    (run / "00001.jsonl").write_text('{"kind": "planned"}\n')
    end(house, id)
    assert [event["event"] for event in events_in(house.get(f"/v1/jobs/{id}/events"))] == ["state", "end"]


def test_one_token_opens_a_bounded_number_of_streams(house: House) -> None:
    id = house.submit()["id"]
    end(house, id)
    house.throttle.streams = 1
    with house.throttle.stream("submitter"):
        assert house.get(f"/v1/jobs/{id}/logs").status_code == 429
        assert house.get(f"/v1/jobs/{id}/logs", "admin").status_code == 200
    assert house.get(f"/v1/jobs/{id}/logs").status_code == 200


def test_a_job_at_its_end_is_deleted() -> None:
    house = House()
    id = house.submit()["id"]
    place = f"/v1/jobs/{id}"
    refused = house.ask("DELETE", place)
    assert (refused.status_code, "expected it to be cancelled first" in refused.text) == (409, True)
    house.post(f"{place}/cancel")
    assert [house.ask("DELETE", place, who).status_code for who in ("viewer", "other")] == [403, 404]
    for _ in range(2):
        assert house.ask("DELETE", place).json()["state"] == "deleted"
    assert house.get("/v1/jobs").json()["jobs"] == []
    assert [one["id"] for one in house.get("/v1/jobs?state=deleted").json()["jobs"]] == [id]
    assert house.submit()["id"] == house.submit()["id"] == f"{id}-1"
    assert house.get(place).json()["journal"][-1]["line"] == "by submitter"


def test_drivers_are_listed_and_a_job_that_none_can_run_says_so() -> None:
    house = House()
    id = house.submit()["id"]
    assert house.get(f"/v1/jobs/{id}").json()["obstacle"] is None
    body = document("gpu")
    body["spec"]["resources"] = {"gpus_per_worker": 1}
    other = house.post("/v1/jobs", body).json()["id"]
    Announcer(house.jobs, "host:1", 0, said="waiting: 503 SlowDown").tick()
    assert house.get(f"/v1/jobs/{other}").json()["obstacle"].startswith("no driver can run it: a worker needs 1 GPU")
    assert house.get(f"/v1/jobs/{id}").json()["obstacle"] is None
    (driver,) = house.get("/v1/drivers").json()["drivers"]
    assert (driver["holder"], driver["gpus"], driver["said"]) == ("host:1", 0, None)
    assert house.get("/v1/drivers", "admin").json()["drivers"][0]["said"] == "waiting: 503 SlowDown"
