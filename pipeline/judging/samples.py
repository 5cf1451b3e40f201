"""What the original and the compressed models write after the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch

from counterweight.pipeline.artifact.verdict import GenerationReport, SampleReport
from counterweight.pipeline.manifest import TEXT
from counterweight.pipeline.manifest.validation import Generation
from counterweight.pipeline.stages import Job
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, QUANTIZED
from counterweight.workers.tasks.generate import GenerateRecord
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Blob


def put_prompts(job: Job, asked: Generation, tokens: Tokens) -> Blob:
    """The beginnings of the first windows and the model's tokenizer, in the store; see `Generate.prompts`."""
    ids = tokens.validation[TEXT].ids[: asked.prompts, : asked.prompt_tokens].contiguous()
    files = job.source.tokenizer()
    known = {} if files is None else {"tokenizer": torch.frombuffer(bytearray(files.tokenizer), dtype=torch.uint8)}
    return put_tensors(job.workspace, {"input_ids": ids, **known})


def side_by_side(asked: Generation, found: Mapping[str, GenerateRecord]) -> GenerationReport:
    """found: variant -> what it wrote; without a compensation the compensated model is the quantized one."""
    found = {**found, COMPENSATED: found.get(COMPENSATED, found[QUANTIZED])}
    original = found[BASELINE]
    samples = tuple(
        SampleReport(
            prompt=prompt,
            texts={variant: record.texts[index] for variant, record in found.items()},
            common={
                variant: common_length(original.tokens[index], record.tokens[index])
                for variant, record in found.items()
            },
        )
        for index, prompt in enumerate(original.prompts)
    )
    return GenerationReport(
        prompt_tokens=asked.prompt_tokens,
        new_tokens=asked.new_tokens,
        longest_common={variant: sum(sample.common[variant] for sample in samples) / len(samples) for variant in found},
        samples=samples,
    )


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens from the first on are the same."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
