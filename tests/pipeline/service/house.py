"""A service in this process: a store in memory or in a folder, tokens of every role, and a client without a network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx

from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.service.app import make_app
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.roots import Roots
from counterweight.pipeline.service.throttle import Throttle
from counterweight.pipeline.service.tokens import Role, TokenEntry, Tokens
from counterweight.workers.storage import ObjectStore
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.contract import check

YAML = {"Content-Type": "application/yaml"}
JSON = {"Content-Type": "application/json"}

PEOPLE = {
    "viewer": (Role.VIEWER, "red"),
    "submitter": (Role.SUBMITTER, "red"),
    "other": (Role.SUBMITTER, "blue"),
    "admin": (Role.ADMIN, "staff"),
}
"""Name of a token, which is `<name>-token` -> its role and tenant."""


def document(name: str = "tiny", **changes: str) -> dict[str, Any]:
    """A manifest below file:/allowed. changes: of URIs, by model, text and output."""
    place = {"model": "file:/allowed/model", "text": "file:/allowed/text.txt", "output": "file:/allowed/out", **changes}
    return {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": place["model"]},
            "calibration": {"source": {"uri": place["text"]}, "sequences": 12, "sequence_length": 32},
            "recipe": {"weights": {"bits": 4, "group_size": 32}},
            "output": {"uri": place["output"]},
        },
    }


def bundle(name: str = "sweep", **spec: Any) -> dict[str, Any]:
    """A batch of two jobs with their manifest."""
    matrix = {"spec.calibration.seed": [1, 2]}
    batch = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionBatch",
        "metadata": {"name": name},
        "spec": {"jobs": ["tiny.yaml"], "matrix": matrix, **spec},
    }
    return {"batch": batch, "manifests": {"tiny.yaml": document()}}


async def _no_pause(seconds: float) -> None:
    """As long as nothing else is to be done."""
    await asyncio.sleep(0)


@cache
def _openapi() -> dict[str, Any]:
    """The same for every service; making it takes a while."""
    return House().app.openapi()


@dataclass
class House:
    """A service, and requests to it."""

    store: ObjectStore = field(default_factory=MemoryStore)
    roots: tuple[str, ...] = ("file:/allowed", "s3://bucket/allowed")
    throttle: Throttle = field(default_factory=lambda: Throttle(rate=1e6, burst=1_000_000))
    pause: Callable[[float], Awaitable[None]] = _no_pause

    def __post_init__(self) -> None:
        entries = [
            TokenEntry(name=name, role=role, tenant=tenant, sha256=hashlib.sha256(f"{name}-token".encode()).hexdigest())
            for name, (role, tenant) in PEOPLE.items()
        ]
        self.jobs = JobStore(self.store)
        self.service = Service(self.jobs, Tokens(tuple(entries)), Roots.parse(self.roots), self.throttle, self.pause)
        self.app = make_app(self.service)

    def client(self) -> httpx.AsyncClient:
        """A client of the application. What it raises is answered, as a server would."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://service")

    def ask(self, method: str, path: str, who: str | None = "submitter", **request: Any) -> httpx.Response:
        """One request, by the holder of a token or by nobody; the answer is as the OpenAPI document has it."""

        async def asked() -> httpx.Response:
            async with self.client() as client:
                headers = httpx.Headers(request.pop("headers", {}))
                if who is not None:
                    headers["Authorization"] = f"Bearer {who}-token"
                return await client.request(method, path, headers=headers, **request)

        answer = asyncio.run(asked())
        check(_openapi(), method, path, answer)
        return answer

    def get(self, path: str, who: str | None = "submitter", **request: Any) -> httpx.Response:
        return self.ask("GET", path, who, **request)

    def post(self, path: str, body: object = None, who: str | None = "submitter", **request: Any) -> httpx.Response:
        return self.ask("POST", path, who, json=body, **request)

    def submit(self, name: str = "tiny", who: str = "submitter", query: str = "", **changes: str) -> Any:
        """The facts of a job that is submitted now."""
        answer = self.post(f"/v1/jobs{query}", document(name, **changes), who)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def keys(self) -> list[str]:
        """All objects of the store."""
        return [info.key for info in self.store.list()]
