"""How fast a worker's device, its host and its storage are: the figures behind a plan's seconds, as data.

Of GPUs they are peaks as the makers' data sheets have them (dense, without sparsity), times the share that is reached: measured
for Hopper on an H200 (`HOPPER`), taken for all others (`TAKEN`). Links, hosts and storage are taken. Of a machine at hand all
are measured, by `benchmarks/time_model.py --rates FILE`, and a plan is given that file in a device's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import RequestError
from counterweight.workers.matrix_flops import Work
from counterweight.workers.parallel import READERS

Rate = Annotated[float, Field(gt=0)]

COPIED = 6e9
"""Bytes per second that one thread copies into Ray's object store, where it has had the memory before: what handing on in it
takes beyond handing on in a worker's own (`benchmarks/results/2026-11-26-hidden-states.md`)."""


class Rates(Config):
    """What is done in a second, where nothing else is said. source: where the figures come from.

    Operations of the kinds of `workers.matrix_flops.Work`, on the device, or on one thread of a CPU; products16 and grams16: of
    numbers of 16 bits. step: seconds of an operation of torch that is started and computes next to nothing. hash: bytes of
    sha256 on one thread of the host; copied: bytes that it copies. link: bytes between host and device; null: they are one.
    storage: bytes that a worker reads or writes. start: seconds until a worker answers, and by which its first block takes
    longer. task: seconds between two tasks of a worker.
    """

    source: str
    products16: Rate
    products32: Rate
    grams16: Rate
    grams32: Rate
    products64: Rate
    factorizations: Rate
    decompositions: Rate
    elementwise: Rate
    step: Rate
    hash: Rate
    copied: Rate = COPIED
    link: Rate | None
    storage: Rate
    start: Annotated[float, Field(ge=0)]
    task: Annotated[float, Field(ge=0)]

    def seconds(self, work: Work, *, itemsize: int = 4) -> float:
        """Of a device for this work. itemsize: bytes of the numbers that are multiplied, where they are not float64."""
        products, grams = (self.products16, self.grams16) if itemsize == 2 else (self.products32, self.grams32)
        return (
            work.products32 / products
            + work.grams32 / grams
            + work.products64 / self.products64
            + work.factorizations / self.factorizations
            + work.decompositions / self.decompositions
            + work.elementwise / self.elementwise
            + work.steps * self.step
        )

    def moved(self, count: float) -> float:
        """Seconds for bytes between host and device."""
        return 0.0 if self.link is None else count / self.link

    def received(self, count: float) -> float:
        """Seconds for bytes that are read from storage and verified, one after the other as a worker's thread does it."""
        return count / self.storage + count / self.hash

    def read(self, count: float, sharing: int = 1) -> float:
        """Seconds for tensors of a checkpoint. Where a GPU's host has cores for them several threads read and verify, some this
        while others do that. sharing: workers of a GPU's host who read the same at the same time: each fetches a part for all
        (`workers.storage.node_cache`), and verifies everything."""
        if self.link is None:
            return self.received(count)
        fetching = count / sharing / self.storage
        return max(fetching, (fetching + count / self.hash) / READERS)

    def checked(self, count: float) -> float:
        """Seconds for a file of which a GPU's host hashes a piece while it reads the next."""
        return self.received(count) if self.link is None else max(count / self.storage, count / self.hash)

    sent = received
    """Bytes that are hashed and written."""


ENTRY_BYTES = 12
"""Memory that an operation on a float32 entry reads and writes: two read, one written."""

START, TASK = 13.0, 0.01
"""Seconds: of a process that imports torch and transformers and opens a GPU, 12.6 and 12.8 on an H200's host; and from a task's
end to the next one's beginning, by way of the driver."""

FIRST = 2.6
"""Seconds that a GPU's worker loses once, in its first block: Triton compiles kernels (1.4), cuDNN looks for attention's plan
(1.2; `benchmarks/results/2026-11-26-time-model-gpu.md`)."""

HASH = 1.4e9
"""Bytes per second of one thread of a server's CPU (Zen 4), rounded: as `benchmarks/time_model.py --rates` finds it."""

STORAGE = 2.5e9
"""Bytes per second of a worker: about a link of 25 Gbit/s, or a share of an NVMe drive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of a data sheet's peaks, what each kind of work reaches: products and Gram matrices of the peak of their dtype;
    factorizations and decompositions of float64's; elementwise of the memory's rate. step: as in `Rates`. source: where that
    comes from."""

    source: str
    products16: float
    products32: float
    grams16: float
    grams32: float
    products64: float
    factorizations: float
    decompositions: float
    elementwise: float
    step: float


TAKEN = Shares(
    source="60% of which are taken to be reached by products",
    products16=0.6,
    products32=0.6,
    grams16=0.6,
    grams32=0.6,
    products64=0.6,
    factorizations=0.1,
    decompositions=0.01,
    elementwise=1.0,
    step=6e-6,
)

HOPPER = Shares(
    source="with the shares of them that an H200 reached (benchmarks/results/2026-11-26-rates-h200.md); blocks that were"
    " measured on it took two to three times as long (benchmarks/results/2026-11-26-time-model-gpu.md)",
    products16=0.722,
    products32=0.757,
    grams16=0.525,
    grams32=0.536,
    products64=0.915,
    factorizations=0.163,
    decompositions=0.0845,
    elementwise=1.27,
    step=9.88e-6,
)


def _rates(bits16: float, float32: float, float64: float, memory: float, link: float, shares: Shares = TAKEN) -> Rates:
    """From a data sheet. bits16, float32, float64: TFLOP/s, with tensor cores for 16 bits and, where there are any, for
    float64. memory, link: GB/s."""
    half, single, double = bits16 * 1e12, float32 * 1e12, float64 * 1e12
    peaks = f"{bits16:g}, {float32:g}, {float64:g} TFLOP/s in 16, 32, 64 bits, {memory:g} GB/s"
    return Rates(
        source=f"data sheet ({peaks}), {shares.source}",
        products16=half * shares.products16,
        products32=single * shares.products32,
        grams16=half * shares.grams16,
        grams32=single * shares.grams32,
        products64=double * shares.products64,
        factorizations=double * shares.factorizations,
        decompositions=double * shares.decompositions,
        elementwise=memory * 1e9 / ENTRY_BYTES * shares.elementwise,
        step=shares.step,
        link=link * 1e9,
        storage=STORAGE,
        start=START + FIRST,
        task=TASK,
        hash=HASH,
    )


GPUS: Mapping[str, Rates] = {
    "A10-24G": _rates(125, 31.2, 0.49, 600, 25),
    "A100-40G": _rates(312, 19.5, 19.5, 1555, 25),
    "A100-80G": _rates(312, 19.5, 19.5, 2039, 25),
    "B200-180G": _rates(2250, 75, 37, 8000, 50),
    "H100-80G": _rates(989, 67, 67, 3350, 50, HOPPER),
    "H200-141G": _rates(989, 67, 67, 4800, 50, HOPPER),
    "L4-24G": _rates(121, 30.3, 0.47, 300, 25),
    "L40S-48G": _rates(362, 91.6, 1.4, 864, 25),
    "RTX4090-24G": _rates(165, 82.6, 1.29, 1008, 25),
    "RTX5090-32G": _rates(209, 104.8, 1.64, 1792, 50),
}
"""GPU -> its rates; SXM modules where there are any. Names as in `devices.MEMORY`."""

UNMEASURED = Rates(
    source="a core of a server's processor, rounded (benchmarks/results/2026-11-25-time-model.md)",
    products16=8e10,
    products32=8e10,
    grams16=8e10,
    grams32=8e10,
    products64=4e10,
    factorizations=2e10,
    decompositions=1e10,
    elementwise=2e9,
    step=3e-6,
    hash=HASH,
    link=None,
    storage=STORAGE,
    start=START,
    task=TASK,
)
"""Of a CPU that nobody has measured: what a running job expects of its time until it has measured some."""

MEASURED = ".json"
"""Ending of a file with measured rates, which stands in a device's place."""


def rates_of(device: str) -> Rates | None:
    """Of a GPU by name, or from a file of measured ones; None where nothing is known. RequestError for a file that holds
    none."""
    if not device.endswith(MEASURED):
        return GPUS.get(device)
    try:
        return Rates.model_validate_json(Path(device).read_bytes())
    except OSError as error:
        raise RequestError(f"--device: {device}: {error.strerror}") from error
    except ValidationError as error:
        raise RequestError(f"--device: {device}: no rates: {first_problem(error)}") from error
