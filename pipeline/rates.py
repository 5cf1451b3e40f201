"""How fast a worker's device, its host and its storage are: the figures behind a plan's seconds, as data.

Of GPUs they are nominal: peaks as the makers' data sheets have them (dense, without sparsity), times the share of a peak that
is taken to be reached. Nothing here has been measured on these GPUs. Of a machine's CPU they are measured, by
`benchmarks/time_model.py --rates FILE`, and a plan is given that file in a device's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import RequestError
from counterweight.workers.matrix_flops import Work
from counterweight.workers.parallel import READERS

Rate = Annotated[float, Field(gt=0)]


class Rates(Config):
    """What is done in a second, where nothing else is said. source: where the figures come from.

    Operations of the kinds of `workers.matrix_flops.Work`, on the device, or on one thread of a CPU; products16 and grams16: of
    numbers of 16 bits. step: seconds of an operation of torch that is started and computes next to nothing. hash: bytes of
    sha256 on one thread of the host. link: bytes between host and device; null: they are one. storage: bytes that a worker
    reads or writes. start: seconds until a worker answers. task: seconds between two tasks of a worker.
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

    def read(self, count: float) -> float:
        """Seconds for tensors of a checkpoint, verified by several threads where a GPU's host has cores for them."""
        return count / self.storage + count / self.hash / (1 if self.link is None else READERS)

    sent = received
    """Bytes that are hashed and written."""


ATTAINED, FACTORED, DECOMPOSED = 0.6, 0.1, 0.01
"""Share of a peak that large products reach; of float64's peak, what Cholesky and QR reach, and what eigenvalues and singular
values reach. Taken, not measured."""

ENTRY_BYTES = 12
"""Memory that an operation on a float32 entry reads and writes: two read, one written."""

STEP, START, TASK = 6e-6, 30.0, 0.01
"""Seconds: of an operation of torch, started from Python; of a process that imports torch and transformers and opens a GPU; and
from a task's end to the next one's beginning, by way of the driver."""

HASH = 1.4e9
"""Bytes per second of one thread of a server's CPU (Zen 4), rounded: as `benchmarks/time_model.py --rates` finds it."""

STORAGE = 2.5e9
"""Bytes per second of a worker: about a link of 25 Gbit/s, or a share of an NVMe drive."""


def _nominal(bits16: float, float32: float, float64: float, memory: float, link: float) -> Rates:
    """From a data sheet. bits16, float32, float64: TFLOP/s, with tensor cores for 16 bits and, where there are any, for
    float64. memory, link: GB/s."""
    wide = float64 * 1e12
    return Rates(
        source=f"nominal: data sheet ({bits16:g}, {float32:g}, {float64:g} TFLOP/s in 16, 32, 64 bits, {memory:g} GB/s), "
        f"of which {ATTAINED:.0%} are reached by products",
        products16=bits16 * 1e12 * ATTAINED,
        products32=float32 * 1e12 * ATTAINED,
        grams16=bits16 * 1e12 * ATTAINED,
        grams32=float32 * 1e12 * ATTAINED,
        products64=wide * ATTAINED,
        factorizations=wide * FACTORED,
        decompositions=wide * DECOMPOSED,
        elementwise=memory * 1e9 / ENTRY_BYTES,
        step=STEP,
        link=link * 1e9,
        storage=STORAGE,
        start=START,
        task=TASK,
        hash=HASH,
    )


NOMINAL: Mapping[str, Rates] = {
    "A10-24G": _nominal(125, 31.2, 0.49, 600, 25),
    "A100-40G": _nominal(312, 19.5, 19.5, 1555, 25),
    "A100-80G": _nominal(312, 19.5, 19.5, 2039, 25),
    "B200-180G": _nominal(2250, 75, 37, 8000, 50),
    "H100-80G": _nominal(989, 67, 67, 3350, 50),
    "H200-141G": _nominal(989, 67, 67, 4800, 50),
    "L4-24G": _nominal(121, 30.3, 0.47, 300, 25),
    "L40S-48G": _nominal(362, 91.6, 1.4, 864, 25),
    "RTX4090-24G": _nominal(165, 82.6, 1.29, 1008, 25),
    "RTX5090-32G": _nominal(209, 104.8, 1.64, 1792, 50),
}
"""GPU -> its rates; SXM modules where there are any. Names as in `devices.MEMORY`."""

MEASURED = ".json"
"""Ending of a file with measured rates, which stands in a device's place."""


def rates_of(device: str) -> Rates | None:
    """Of a GPU by name, or from a file of measured ones; None where nothing is known. RequestError for a file that holds
    none."""
    if not device.endswith(MEASURED):
        return NOMINAL.get(device)
    try:
        return Rates.model_validate_json(Path(device).read_bytes())
    except OSError as error:
        raise RequestError(f"--device: {device}: {error.strerror}") from error
    except ValidationError as error:
        raise RequestError(f"--device: {device}: no rates: {first_problem(error)}") from error
