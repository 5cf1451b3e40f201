"""A plan for people, in rows of a label and a value."""

from __future__ import annotations

from collections.abc import Sequence

from counterweight.pipeline.foresight import Foresight
from counterweight.pipeline.plan import Plan
from counterweight.pipeline.units import bytes_text


def rows(found: Foresight, gpus_per_worker: float) -> list[tuple[str, str]]:
    """What `counterweight plan` prints. gpus_per_worker: of the job."""
    made = found.plan
    return [
        ("model", f"{made.model_type}, {made.parameters:,} parameters, {bytes_text(made.source_bytes)}"),
        ("quantized", f"{made.quantized:,} weights in {len(made.blocks)} blocks"),
        ("artifact", _artifact(made)),
        ("calibration", f"{made.tokens:,} tokens" + (f", {made.drawn_tokens:,} drawn" if made.drawn_tokens else "")),
        ("peak per worker", _peak(made, gpus_per_worker)),
        ("hidden states", made.hidden_states.text()),
        ("arithmetic", f"{made.flops / 1e12:.3g} TFLOP ({_phases(made)})"),
        ("storage", f"{bytes_text(made.storage_read_bytes)} read, {bytes_text(made.storage_written_bytes)} written"),
        *([_no_time(made, gpus_per_worker)] if made.estimate is None else made.estimate.rows()),
        ("headers read", bytes_text(made.header_bytes_read)),
        ("divided", "; ".join(made.divided) or "nothing"),
        *(("reuse", line) for line in found.reuse),
        *(("note", line) for line in found.notes),
        _fit(made.problems, known=gpus_per_worker == 0 or made.device is not None),
    ]


def _no_time(made: Plan, gpus_per_worker: float) -> tuple[str, str]:
    if made.device is not None and not gpus_per_worker:
        return "time", f"not known: {made.device} is a GPU, and workers use none (spec.resources.gpus_per_worker: 0)"
    return "time", "not known: name the workers' GPU, or a file of rates, with --device"


def _artifact(made: Plan) -> str:
    ratio = made.source_bytes / made.artifact_bytes
    size = f"{bytes_text(made.artifact_bytes)}, {ratio:.2f} times smaller than the model"
    return f"{size}; {made.bits_per_weight:.3f} bits per quantized weight, all in"


def _peak(made: Plan, gpus_per_worker: float) -> str:
    peak = f"{bytes_text(made.peak_bytes_per_worker)} ({made.largest})"
    return f"{peak} on its GPU, {bytes_text(made.host_bytes_per_worker)} on the host" if gpus_per_worker else peak


def _phases(made: Plan) -> str:
    sums = {name: sum(block.phases[name] for block in made.blocks) for name in made.blocks[0].phases}
    return ", ".join(f"{name} {count / made.flops:.0%}" for name, count in sums.items() if count)


def _fit(problems: Sequence[str], *, known: bool) -> tuple[str, str]:
    if problems:
        return "does not fit", "; ".join(problems)
    return "fits", "yes" if known else "not known: name the workers' GPU with --device"
