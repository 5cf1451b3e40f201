"""Gradients of checkpointed training against those of plain automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from counterweight.workers.distillation.checkpointed import accumulate
from counterweight.workers.distillation.training import Student, differentiated, divergence
from counterweight.workers.methods.distillation import Distillation
from tests.workers.distillation.students import Tiny


@pytest.mark.parametrize("case", ["llama", "mixtral", "gemma2", "qwen2"])
def test_gradients_are_those_of_the_plain_backward_pass(case: str) -> None:
    tiny = Tiny(case, torch.float64)
    student, text = tiny.student, tiny.text(3)
    parameters = parameters_of(student)
    hidden = student.embed(text.ids)
    for block in student.blocks:
        hidden = block(hidden)
    expected = divergence(student, hidden, text.targets)
    # An expert that no token has reached has no gradient.
    gradients = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)

    found = accumulate(
        student.blocks, lambda last: differentiated(student, last, text.targets), student.embed(text.ids)
    )

    assert found == pytest.approx(float(expected.detach()), rel=1e-12)
    assert any(gradient is not None and float(gradient.abs().max()) > 1e-6 for gradient in gradients)
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-15)


def parameters_of(student: Student) -> dict[str, nn.Parameter]:
    return {name: parameter for name, (parameter, _) in student.trained(Distillation()).items()}


def test_gradients_of_several_batches_add_up() -> None:
    tiny = Tiny(dtype=torch.float64)
    student, text = tiny.student, tiny.text(2)

    def objective(last: Tensor) -> tuple[float, Tensor]:
        return differentiated(student, last, text.targets)

    accumulate(student.blocks, objective, student.embed(text.ids))
    once = {
        name: parameter.grad.clone() for name, parameter in parameters_of(student).items() if parameter.grad is not None
    }
    accumulate(student.blocks, objective, student.embed(text.ids))
    for name, parameter in parameters_of(student).items():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=0)


def test_one_graph_at_a_time() -> None:
    """While a block's graph is made, no other block's is alive: memory does not grow with the number of blocks."""
    alive: set[int] = set()
    most = 0

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, number: int) -> Tensor:
            nonlocal most
            ctx.number = number  # type: ignore[attr-defined]
            if x.requires_grad:
                alive.add(number)
                most = max(most, len(alive))
            return x * 2

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
            alive.discard(ctx.number)  # type: ignore[attr-defined]
            return gradients[0] * 2, None

    def block(number: int) -> object:
        return lambda x: Probe.apply(x, number)  # type: ignore[no-untyped-call]

    value = accumulate(
        [block(number) for number in range(5)],  # type: ignore[misc]
        lambda last: (float(last.sum()), torch.ones_like(last)),
        torch.ones(1, 2, 3),
    )
    assert value == 6 * 2**5
    assert most == 1
    assert not alive
