"""What one model writes after a few prompts, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.keys import digest
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.tasks.whole import WholeModel
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class GenerateRecord(Record):
    """tokens: of each prompt, what follows it. prompts, texts: both as text; ids where there is no tokenizer."""

    tokens: tuple[tuple[int, ...], ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    timing: Timing


class Generate(WholeModel, DurableTask[GenerateRecord]):
    """The most probable token, `new_tokens` times, after each prompt; no token ends a text. The prompt is prefill, in which
    residual stores correct nothing, as `load_model` serves it."""

    kind: ClassVar[str] = "generate"
    record: ClassVar[type[GenerateRecord]] = GenerateRecord

    prompts: Blob
    """A safetensors blob with `input_ids` [prompts, length] int32 and, of a model that has one, `tokenizer`: tokenizer.json
    [bytes] uint8."""
    new_tokens: int

    def key(self) -> str:
        return digest([self.kind, *self.determines(), self.prompts.sha256, self.new_tokens])

    @property
    def name(self) -> str:
        return f"samples of {self.variant}"

    @property
    def patience(self) -> float:
        # A token at a time: each reads all weights again.
        parameters, tokens = self.setting.parameters, self.new_tokens * self.prompts.size // 4
        return patience(bytes=4 * parameters, flops=2 * parameters * tokens, device=self.setting.device)

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> GenerateRecord:
        from counterweight.workers.calibration.sampling import continue_greedily
        from counterweight.workers.clock import Clock
        from counterweight.workers.memory import release
        from counterweight.workers.tensor_blobs import get_tensors

        clock = Clock(context.device)
        tensors = get_tensors(workspace, self.prompts)
        ids = tensors["input_ids"].long().to(context.device)
        model = self.model(context, decode_only=True)
        clock.lap("load")
        found = continue_greedily(model, ids, self.new_tokens)
        clock.lap("forward")
        del model
        release(context.device)
        show = _decoder(bytes(tensors["tokenizer"].numpy()) if "tokenizer" in tensors else None)
        return GenerateRecord(
            tokens=tuple(tuple(row) for row in found.tolist()),
            prompts=tuple(show(row) for row in ids.tolist()),
            texts=tuple(show(row) for row in found.tolist()),
            timing=clock.timing(),
        )


def _decoder(tokenizer: bytes | None) -> Callable[[Sequence[int]], str]:
    """Ids as text."""
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    from tokenizers import Tokenizer

    running = Tokenizer.from_buffer(tokenizer)

    def show(ids: Sequence[int]) -> str:
        text: str = running.decode(list(ids), skip_special_tokens=False)
        return text

    return show
