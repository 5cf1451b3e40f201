"""The model in training that a worker holds between tasks, so that not every one of them reads it anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.workers.distillation.training import Training


class HeldTraining:
    """One model at most, by the key of its training. It is dropped before a task that does not work on it: it then takes no
    memory beside another task's."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._training: Training | None = None

    def get(self, key: str, read: Callable[[], Training]) -> Training:
        """The model of this training: the one that is held, or read and held from now on."""
        self.keep(key)
        if self._training is None:
            self._key, self._training = key, read()
        return self._training

    def keep(self, key: str | None) -> bool:
        """Drops the model unless it is that of `key`; whether one was dropped."""
        if self._training is None or self._key == key:
            return False
        self._key = self._training = None
        return True
