"""Clip the gradient's norm between the backward pass and the optimizer's step."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch.nn.utils import clip_grad_norm_


class ClipGradient:
    """Bring the norm of all parameter gradients together to at most ``max_norm``.

    Gradients under a loss scale are brought to their true size first, and accumulated ones are clipped once, when
    they are complete.
    """

    def __init__(self, max_norm: float) -> None:
        if max_norm <= 0:
            raise ValueError(f"expected max_norm > 0, got {max_norm}")
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if not steps_now(engine):
            return
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        clip_grad_norm_(engine.network.parameters(), self.max_norm)


def steps_now(engine: Any) -> bool:
    """Whether the trainer's optimizer steps at the end of this iteration (the rule of MONAI's trainer)."""
    accumulated, length = engine.accumulation_steps, engine.state.epoch_length
    if length is None:
        return bool(engine.state.iteration % accumulated == 0)
    done = (engine.state.iteration - 1) % length + 1
    return bool(done % accumulated == 0 or done == length)
