"""Requests that nobody should send: each is refused with a problem document, never with a failure of ours, and leaves no trace
in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import pytest

from counterweight.pipeline.service.bodies import JSON as JSON_TYPE
from counterweight.pipeline.service.throttle import Throttle
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.house import JSON, YAML, House, bundle, document

BEARER = "Bearer submitter-token"
HEX = "0123456789abcdef"


@dataclass(frozen=True)
class Attack:
    """status: what it is answered with. headers: without them, as a submitter."""

    status: int
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] | list[tuple[str, str]] = field(default_factory=dict)
    who: str | None = BEARER


def post(status: int, body: object, headers: Mapping[str, str] = JSON, path: str = "/v1/jobs") -> Attack:
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return Attack(status, "POST", path, data, headers)


def changed(path: str, value: object) -> dict[str, object]:
    """A manifest with another value at a path."""
    made = document()
    place, steps = made, path.split(".")
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    return made


VALID = json.dumps(document()).encode()

ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/queue"),
    ("GET", f"/v1/jobs/{HEX}"),
    ("POST", f"/v1/jobs/{HEX}/cancel"),
    ("GET", f"/v1/jobs/{HEX}/events"),
    ("GET", f"/v1/jobs/{HEX}/logs"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", f"/v1/batches/batch-{HEX}"),
    ("POST", f"/v1/batches/batch-{HEX}/cancel"),
    ("GET", f"/v1/batches/batch-{HEX}/report"),
    ("POST", "/v1/schedules"),
    ("GET", "/v1/schedules"),
    ("GET", f"/v1/schedules/schedule-{HEX}"),
    ("POST", f"/v1/schedules/schedule-{HEX}/stop"),
    ("GET", f"/v1/artifacts/tiny/{HEX}"),
    ("GET", f"/v1/artifacts/tiny/{HEX}/urls"),
    ("GET", f"/v1/artifacts/tiny/{HEX}/files/config.json"),
]

NOBODY = [Attack(401, method, path, VALID, JSON, who=None) for method, path in ROUTES]

STRANGERS = [
    Attack(401, "POST", "/v1/jobs", VALID, JSON, who=who)
    for who in (
        "Bearer wrong",
        "Bearer ",
        "Bearer",
        "Basic c3VibWl0dGVyLXRva2Vu",
        "submitter-token",
        "Bearer submitter-token ,",
        "Bearer submitter-token submitter-token",
        "Bearer SUBMITTER-TOKEN",
        "Bearer " + "x" * 5000,
        "Bearer \xff\xfe",
    )
]

HEADERS = [
    Attack(401, "POST", "/v1/jobs", VALID, [*JSON.items(), ("Authorization", BEARER), ("Authorization", BEARER)], None),
    Attack(415, "POST", "/v1/jobs", VALID, [("Content-Type", JSON_TYPE), ("Content-Type", "text/yaml")]),
    Attack(415, "POST", "/v1/jobs", VALID),
    post(415, VALID, {"Content-Type": "text/html"}),
    post(415, VALID, {"Content-Type": "multipart/form-data; boundary=x"}),
    post(415, VALID, {"Content-Type": "application/json; charset=utf-7"}),
    post(415, VALID, {"Content-Type": "application"}),
    post(415, VALID, {**JSON, "Content-Encoding": "gzip"}),
    post(413, VALID, {**JSON, "Content-Length": "999999999999999999999"}),
    post(400, VALID, {**JSON, "Content-Length": "-5"}),
    post(400, VALID, {**JSON, "Content-Length": "0x10"}),
    post(422, VALID, {**JSON, "Idempotency-Key": "x" * 500}),
    post(422, VALID, {**JSON, "Idempotency-Key": "a b"}),
]

BODIES = [
    post(422, b""),
    post(422, b"", YAML),
    post(422, b"\xff\xfe\x00"),
    post(422, b"{"),
    post(422, b"null"),
    post(422, b"[]"),
    post(422, b'"text"'),
    post(413, b" " * (1 << 18)),
    post(422, b"[" * 60_000),
    post(422, b"[" * 60_000, YAML),
    post(422, b'{"a":' * 20_000),
    post(422, "{" * 200, YAML),
    post(422, "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", YAML),
    post(422, "!!python/object/apply:os.system ['true']", YAML),
    post(422, "a: 1\n---\nb: 2\n", YAML),
    post(422, "kind: CompressionJob\nkind: CompressionBatch\n", YAML),
    post(422, '{"kind": "CompressionJob", "kind": "CompressionJob"}'),
    post(422, '{"kind": NaN}'),
    post(422, '{"n": ' + "9" * 5000 + "}"),
    post(422, '{"n": 1e999}'),
    post(422, '{"n": "\\ud800"}'),
    post(422, json.dumps(["x"] * 20_000)),
    post(422, changed("spec.extra", 1)),
    post(422, changed("kind", "CompressionBatch")),
    post(422, changed("apiVersion", "counterweight/v2")),
    post(422, changed("metadata.name", "../../etc")),
    post(422, changed("metadata.name", "<script>alert(1)</script>")),
    post(422, changed("metadata.labels", {"x": "y" * 5000})),
    post(422, changed("spec.recipe.weights.bits", "4")),
    post(422, changed("spec.calibration.sequences", True)),
    post(422, bundle(), path="/v1/jobs"),
    post(422, document(), path="/v1/batches"),
    post(422, {"batch": {}, "manifests": {}}, path="/v1/batches"),
    post(422, bundle(schedule="* * * * * *"), path="/v1/schedules"),
    post(422, bundle(schedule="0 0 31 2 *"), path="/v1/schedules"),
    post(422, bundle(schedule="0 2 * * *", timeZone="../../etc/passwd"), path="/v1/schedules"),
    post(422, bundle(jobs=["tiny.yaml"] * 2), path="/v1/batches"),
    post(422, bundle(jobs=["missing.yaml"]), path="/v1/batches"),
    post(422, bundle(jobs=["http://169.254.169.254/"]), path="/v1/batches"),
    post(422, bundle(matrix={"spec.calibration.seed": list(range(1000)), "spec.x": [1, 2]}), path="/v1/batches"),
]

PLACES = [
    post(422, changed(path, uri))
    for path, uri in (
        ("spec.model.uri", "http://169.254.169.254/latest/meta-data"),
        ("spec.model.uri", "https://example.org/model"),
        ("spec.model.uri", "file:/etc/passwd"),
        ("spec.model.uri", "file:///allowed/../../etc"),
        ("spec.model.uri", "file:///allowed/%2e%2e/etc"),
        ("spec.model.uri", "file://host/allowed"),
        ("spec.model.uri", "file:/allowed/%00"),
        ("spec.model.uri", "model"),
        ("spec.model.uri", "../model"),
        ("spec.model.uri", "~/model"),
        ("spec.model.uri", "hf:owner/name"),
        ("spec.model.uri", "s3://bucket/allowed/../other"),
        ("spec.model.uri", "s3://bucket"),
        ("spec.model.uri", "s3://user:secret@bucket/allowed"),
        ("spec.model.uri", "gopher://x"),
        ("spec.model.uri", "x" * 3000),
        ("spec.calibration.source", {"kind": "dataset", "path": "http://169.254.169.254/"}),
        ("spec.calibration.source", {"kind": "dataset", "path": "/etc"}),
        ("spec.calibration.source", {"kind": "tokens", "uri": "file:/etc/passwd"}),
        ("spec.calibration.source", {"uri": "ftp://host/x"}),
        ("spec.validation", {"text": {"uri": "file:/proc/self/environ"}}),
        ("spec.distillation", {"texts": [{"source": {"uri": "file:/etc/x"}, "sequences": 1}], "held_out": []}),
        ("spec.output.uri", "file:/var"),
        ("spec.output.uri", "s3://bucket/allowedly"),
        ("spec.output.uri", "hf:owner/name"),
        ("spec.output.uri", "s3://bucket/allowed?X-Amz-Signature=abcdef"),
    )
]

QUERIES = [
    Attack(status, "GET", path)
    for status, path in (
        (422, "/v1/jobs?cursor=!!!"),
        (422, "/v1/jobs?cursor=AAAA"),
        (422, "/v1/jobs?cursor=" + "A" * 5000),
        (422, "/v1/jobs?cursor=MjAyNi0wMS0wMSAw"),
        (422, "/v1/jobs?limit=0"),
        (422, "/v1/jobs?limit=100000"),
        (422, "/v1/jobs?limit=abc"),
        (422, "/v1/jobs?state=gone"),
        (422, "/v1/jobs?tenant=../x"),
        (422, "/v1/jobs?batch=1"),
        (404, "/v1/jobs/..%2f..%2fetc"),
        (422, "/v1/jobs/" + "a" * 5000),
        (422, "/v1/jobs/%00"),
        (422, f"/v1/jobs/{HEX}%0a"),
        (404, f"/v1/jobs/{HEX}/../../../etc/passwd"),
        (422, "/v1/batches/batch-%2e%2e"),
        (422, "/v1/schedules/schedule-zz"),
        (404, f"/v1/artifacts/..%2f..%2f/{HEX}"),
        (422, f"/v1/artifacts/%2e%2e/{HEX}"),
        (404, "/v1/artifacts/tiny/passwd"),
        (404, f"/v1/artifacts/tiny/{HEX}/files/../../../../etc/passwd"),
        (404, f"/v1/artifacts/tiny/{HEX}/files/%2fetc%2fpasswd"),
        (422, f"/v1/artifacts/tiny/{HEX}/urls?seconds=9999999"),
        (404, "/v1/"),
        (404, "/v1//jobs"),
        (404, "/v2/jobs"),
        (404, "/docs"),
        (404, "/.env"),
    )
]

METHODS = [
    Attack(405, "DELETE", "/v1/jobs"),
    Attack(405, "PUT", f"/v1/jobs/{HEX}", VALID, JSON),
    Attack(405, "TRACE", "/v1/jobs"),
    Attack(
        405, "OPTIONS", "/v1/jobs", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    ),
    Attack(422, "POST", "/v1/jobs?priority=101", VALID, JSON),
    Attack(422, "POST", "/v1/jobs?priority=1e3", VALID, JSON),
    Attack(422, "POST", "/v1/jobs?tenant=", VALID, JSON),
    Attack(403, "POST", "/v1/jobs?tenant=blue", VALID, JSON),
    Attack(404, "POST", f"/v1/jobs/{HEX}/cancel"),
]


@pytest.fixture(scope="module")
def attacked() -> House:
    """One service for all: no attack changes anything."""
    store = MemoryStore()
    store.create("_jobs/limits.json", b"{}")
    return House(store)


ATTACKS = [*NOBODY, *STRANGERS, *HEADERS, *BODIES, *PLACES, *QUERIES, *METHODS]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.method}-{attack.path[:60]}-{attack.status}")
def test_it_is_refused_and_leaves_no_trace(attacked: House, attack: Attack) -> None:
    house, store = attacked, attacked.store
    assert isinstance(store, MemoryStore)
    before = dict(store.objects)
    headers = httpx.Headers([(name, value.encode("latin-1")) for name, value in _pairs(attack.headers)])
    if attack.who is not None:
        headers["Authorization"] = attack.who
    answer = house.ask(attack.method, attack.path, None, content=attack.body, headers=headers)
    assert answer.status_code == attack.status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert store.objects == before
    _carries_no_rights(answer)
    assert len(answer.content) < 10_000
    assert "submitter-token" not in answer.text


def _pairs(headers: Mapping[str, str] | list[tuple[str, str]]) -> list[tuple[bytes, str]]:
    pairs = headers if isinstance(headers, list) else list(headers.items())
    return [(name.encode(), value) for name, value in pairs]


def _carries_no_rights(answer: httpx.Response) -> None:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "header", ["x", "../../1", "0001/00001/99999999999999", "0001/00001/-1", "a\tb", "1" * 3000, "\xff"]
)
@pytest.mark.parametrize("stream", ["events", "logs"])
def test_an_id_that_no_event_had_is_refused(header: str, stream: str) -> None:
    house = House()
    id = house.submit()["id"]
    headers = httpx.Headers([(b"Last-Event-ID", header.encode("latin-1"))])
    assert house.get(f"/v1/jobs/{id}/{stream}", headers=headers).status_code == 422


def test_whoever_asks_too_often_waits() -> None:
    now = [0.0]
    house = House(throttle=Throttle(rate=2, burst=3, clock=lambda: now[0]))
    assert [house.get("/v1/queue").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = house.get("/v1/queue")
    assert refused.headers["retry-after"] == "1"
    assert house.get("/v1/queue", "viewer").status_code == 200
    now[0] += 0.5
    assert [house.get("/v1/queue").status_code for _ in range(2)] == [200, 429]


def test_guesses_of_tokens_are_bounded_and_harm_nobody_else() -> None:
    house = House(throttle=Throttle(rate=1, burst=3, clock=lambda: 0.0))
    assert [house.get("/v1/queue", "guess").status_code for _ in range(4)] == [401, 401, 401, 429]
    assert house.get("/v1/queue").status_code == 200


def test_what_the_throttle_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterweight.pipeline.service.throttle.MAX_BUCKETS", 5)
    throttle = Throttle(rate=1, burst=2, clock=lambda: 0.0)
    assert [throttle.wait(f"peer {number}") for number in range(100)] == [0.0] * 100
    assert len(throttle._buckets) <= 5
