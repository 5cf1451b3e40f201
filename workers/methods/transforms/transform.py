"""What every transform answers: a change of a model before it is quantized that leaves its function as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from counterweight.workers.config import Method

if TYPE_CHECKING:
    from counterweight.workers.methods.transforms.rotation import Rotation
    from counterweight.workers.methods.transforms.smoothing import Smoothing


class Transform(Method):
    """A transform takes part in one of two places; it answers with itself where it does."""

    @property
    def of_the_model(self) -> Rotation | None:
        """Coordinates for the whole model, chosen before any data is seen."""
        return None

    @property
    def of_an_input(self) -> Smoothing | None:
        """Scales of one input, chosen from what calibration saw of it."""
        return None
