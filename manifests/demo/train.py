"""Train the demo model: a Llama of 1.4 million parameters on the source text of Python's standard library.

    python manifests/demo/train.py --minutes 33

makes what `manifests/demo/model` holds: tokenizer, bf16 weights and `training.json`. One CPU thread, float32,
a fixed seed. With `--steps` the run does the same work on every machine; with `--minutes` a faster machine
trains longer.

1. text of the `train` part -> byte-level BPE tokenizer
2. random windows of the tokens -> AdamW with warm-up and cosine decay
3. weights rounded to bf16, saved, loaded back; perplexity of what was saved on the `evaluation` part
4. finished files copied into the output directory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from counterweight.workers.calibration.standard_library import standard_library_text

DEFAULT_OUTPUT = Path(__file__).parent / "model"
BOS, EOS = "<bos>", "<eos>"
VOCABULARY = 1024
POSITIONS = 512
WINDOW = 256
EVALUATION_WINDOWS = 64
SEED = 0
# Each measured with 410,000 tokens of training, as perplexity on the evaluation part: 8 windows a step at 3e-3 give 100;
# 16 windows at 2e-3 give 158; the usual initial deviation of 0.02 instead of 0.08 gives 124. The usual one is meant for
# wider models; 0.08 is near 1 / sqrt(hidden size).
BATCH = 8
PEAK_LEARNING_RATE = 3e-3
INITIAL_DEVIATION = 0.08
WARM_UP = 0.03  # share of the run
FINAL_LEARNING_RATE = 0.05  # share of the peak; at zero the last steps would change nothing
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long to train: a number of steps or a number of minutes; the other one is None."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over after `step` steps and `seconds` seconds; 1 or more ends it."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What a training loop did: steps, seconds, and the mean loss (nats per token) of its last 50 steps."""

    steps: int
    seconds: float
    final_loss: float


def train_tokenizer(text: str, directory: Path) -> None:
    """Train a byte-level BPE tokenizer on `text` and save it in the form `AutoTokenizer` reads.

    It adds no special token by itself: perplexity is told over windows of one joined text (DESIGN section 8).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        # All 256 bytes are in, so every text can be encoded and there is no unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    # transformers 5 names its new base class here, which transformers 4 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode(text: str, directory: Path) -> torch.Tensor:
    """The tokens of `text` by the tokenizer saved in `directory`; int64 `[tokens]`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # The Rust tokenizer itself: the wrapper would warn that the text is longer than the model's positions.
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def new_model() -> LlamaForCausalLM:
    """The untrained model, float32; token ids 0 and 1 are `<bos>` and `<eos>`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=INITIAL_DEVIATION,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def learning_rate(progress: float) -> float:
    """Linear warm-up from zero, then half a cosine down to `FINAL_LEARNING_RATE` of the peak."""
    if progress < WARM_UP:
        return PEAK_LEARNING_RATE * progress / WARM_UP
    angle = math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    share = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(angle)) / 2
    return PEAK_LEARNING_RATE * share


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; matrices decay, norm weights do not (decay would pull a gain of 1 towards 0)."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, budget: Budget, log: Callable[[str], None]) -> TrainingRun:
    """Train `model` in place on random windows of `tokens` (`[tokens]`) until the budget is spent."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = new_optimizer(model)
    offsets = torch.arange(WINDOW)
    losses: list[float] = []
    start = time.monotonic()
    seconds = 0.0
    while (progress := budget.progress(len(losses), seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        starts = torch.randint(len(tokens) - WINDOW + 1, (BATCH, 1), generator=generator)
        windows = tokens[starts + offsets]  # [batch, window]
        loss = cast(torch.Tensor, model(input_ids=windows, labels=windows, use_cache=False).loss)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.monotonic() - start
        if len(losses) % 50 == 0:
            log(f"step {len(losses)}  {seconds:.0f} s  {progress:.0%}  loss {sum(losses[-50:]) / 50:.3f}")
    last = losses[-50:]
    return TrainingRun(steps=len(losses), seconds=seconds, final_loss=sum(last) / len(last))


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Perplexity over the first `EVALUATION_WINDOWS` non-overlapping windows of `tokens`, in float32."""
    windows = tokens[: EVALUATION_WINDOWS * WINDOW].view(EVALUATION_WINDOWS, WINDOW)
    losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    return math.exp(torch.stack(losses).mean().item())


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Round the weights to bf16 and write `config.json` and `model.safetensors`."""
    model.bfloat16().save_pretrained(directory)
    # Only repeats the token ids of config.json.
    (directory / "generation_config.json").unlink(missing_ok=True)


def publish(finished: Path, output: Path) -> None:
    """Copy the files of `finished` into `output`, each to appear there whole, by a rename.

    `training.json` goes last: it describes the weights, so it must not be there before them.
    """
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(finished.iterdir(), key=lambda path: (path.name == "training.json", path.name)):
        partial = output / f".{path.name}.partial"
        # Contents without the mode: safetensors writes its file for the owner alone.
        shutil.copyfile(path, partial)
        os.replace(partial, output / path.name)


def run(budget: Budget, output: Path, command: str, library: Path | None) -> dict[str, object]:
    """Train on `library` (None: that of this interpreter), save, measure; returns what `training.json` says."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        text = standard_library_text("train", library=library)
        train_tokenizer(text, directory)
        tokens = encode(text, directory)
        print(f"{len(text)} characters, {len(tokens)} tokens", flush=True)
        model = new_model()
        result = train(model, tokens, budget, lambda line: print(line, flush=True))
        save(model, directory)
        reloaded = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        evaluation = encode(standard_library_text("evaluation", library=library), directory)
        record: dict[str, object] = {
            "command": command,
            "parameters": model.num_parameters(),
            "train_tokens": len(tokens),
            "steps": result.steps,
            "tokens_per_step": BATCH * WINDOW,
            "seconds": round(result.seconds, 1),
            "threads": torch.get_num_threads(),
            "final_train_loss": round(result.final_loss, 4),
            "evaluation_windows": EVALUATION_WINDOWS,
            "evaluation_window_tokens": WINDOW,
            "evaluation_perplexity": round(perplexity(reloaded, evaluation), 4),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        publish(directory, output)
    return record


def main(arguments: list[str], *, library: Path | None = None) -> None:
    """The command line; `library` is there for tests, which cannot wait for the whole standard library."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so many minutes")
    length.add_argument("--steps", type=int, help="train for so many optimizer steps")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="directory of the finished model")
    options = parser.parse_args(arguments)
    if not (options.steps or options.minutes or 0) > 0:  # `not >`, so that NaN is refused too
        parser.error(f"--steps {options.steps}, --minutes {options.minutes}: expected a number above 0")
    torch.set_num_threads(1)
    budget = Budget(steps=options.steps, minutes=options.minutes)
    # Without --output: where the files went says nothing about them, and it may be a path of one machine.
    length_flag = ["--steps", str(options.steps)] if options.steps else ["--minutes", f"{options.minutes:g}"]
    command = shlex.join(["python", "manifests/demo/train.py", *length_flag])
    print(json.dumps(run(budget, options.output, command, library), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
