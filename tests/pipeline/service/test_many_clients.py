"""Many clients at once, at two instances of which one is killed: each manifest is one job, and runs once."""

from __future__ import annotations

import asyncio

from counterweight.pipeline.jobs.drive import until_idle
from counterweight.pipeline.jobs.states import State
from counterweight.workers.errors import StorageError
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.jobs.theatre import Theatre
from tests.pipeline.service.house import House, document

JOBS, CLIENTS = 200, 20


class Mortal(MemoryStore):
    """Another store, as an instance sees it that is killed after so many creates: what it does later does not happen."""

    def __init__(self, store: MemoryStore, creates: int) -> None:
        super().__init__()
        self.objects, self._lock, self.left = store.objects, store._lock, creates

    def create(self, key: str, data: bytes) -> bool:
        if self.left == 0:
            raise StorageError("killed")
        self.left -= 1
        return super().create(key, data)


def test_each_of_200_jobs_is_submitted_and_run_once() -> None:
    theatre = Theatre()
    mortal = Mortal(theatre.store, JOBS // 3)
    houses = House(mortal), House(theatre.store)
    created: list[str] = []
    unheard: list[str] = []

    async def submit(job: int, number: int) -> None:
        """To an instance, or, where it is killed before its answer comes, to the other one."""
        for house in (houses[number % 2], houses[1]):
            async with house.client() as client:
                token = {"Authorization": "Bearer submitter-token"}
                answer = await client.post("/v1/jobs", json=document(f"job-{job}"), headers=token)
            if answer.status_code == 201:
                created.append(answer.json()["name"])
            if house.store is not mortal or mortal.left:
                assert answer.status_code in (200, 201), answer.text
                return
            unheard.append(f"job-{job}")

    async def client(number: int) -> None:
        """Submits its own jobs and those of its neighbour, who is at the other instance."""
        for job in range(JOBS):
            if job % CLIENTS in (number, (number + 1) % CLIENTS):
                await submit(job, number)

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))

    asyncio.run(all_of_them())
    assert unheard
    assert sorted(created) == sorted(f"job-{job}" for job in range(JOBS))
    for name in ("a", "b"):
        theatre.driver(name).work(until_idle)
    assert theatre.states() == [State.SUCCEEDED] * JOBS
    assert len(theatre.attempts) == len({id for id, _ in theatre.attempts}) == JOBS
