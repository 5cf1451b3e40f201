"""Many clients at once, at two instances beside each other: each manifest is one job, and none is lost."""

from __future__ import annotations

import asyncio

from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.house import House, document

JOBS, CLIENTS = 200, 20


def test_each_of_200_jobs_is_submitted_once() -> None:
    store = MemoryStore()
    houses = House(store), House(store)
    created: list[str] = []

    async def client(number: int) -> None:
        """Submits its own jobs and those of its neighbour, who is at the other instance."""
        async with houses[number % 2].client() as client:
            for job in range(JOBS):
                if job % CLIENTS in (number, (number + 1) % CLIENTS):
                    token = {"Authorization": "Bearer submitter-token"}
                    answer = await client.post("/v1/jobs", json=document(f"job-{job}"), headers=token)
                    assert answer.status_code in (200, 201), answer.text
                    if answer.status_code == 201:
                        created.append(answer.json()["name"])

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))

    asyncio.run(all_of_them())
    assert sorted(created) == sorted(f"job-{job}" for job in range(JOBS))
    assert len(houses[0].jobs.all()) == JOBS
