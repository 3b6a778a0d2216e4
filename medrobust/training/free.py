"""Free adversarial training: one backward pass updates both the weights and the perturbation.

Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019 (1904.12843), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor

from medrobust.attacks.threat import LinfBall
from medrobust.handlers import with_meta_of


class FreeAdversarial:
    """Train on ``image + delta`` and let ``delta`` follow the sign of the gradient that the training step makes anyway.

    Every batch has to come several times in a row for the perturbation to grow, for example from MONAI's
    ``ThreadDataLoader(..., repeats=4)`` with four times the trainer's ``epoch_length``; divide the number of epochs by
    as much. The perturbation stays for the next batch, as published, and starts anew when the shape changes.

    Args:
        eps: largest change of a voxel, intensity in [0, 1].
        step_size: ``None`` is ``eps``, as published.
    """

    def __init__(self, *, eps: float, step_size: float | None = None, image_key: str = "image") -> None:
        if eps <= 0:
            raise ValueError(f"expected eps > 0, got {eps}")
        self.threat = LinfBall(eps)
        self.step_size = eps if step_size is None else step_size
        self.image_key = image_key
        self._delta: Tensor | None = None
        self._clean: Tensor | None = None
        self._leaf: Tensor | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_STARTED, self.perturb)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.update)

    def start(self) -> None:
        """Nothing is remembered from another run."""
        self._delta = None

    def perturb(self, engine: Any) -> None:
        """Put the perturbed image into a new batch, as a leaf that gathers a gradient."""
        source = engine.state.batch[self.image_key]
        self._clean = source.to(engine.state.device).as_subclass(Tensor)
        if self._delta is None or self._delta.shape != self._clean.shape:
            self._delta = torch.zeros_like(self._clean)
        image = self.threat.project(self._clean + self._delta, self._clean)
        self._leaf = with_meta_of(source, image.detach()).requires_grad_()
        engine.state.batch = {**engine.state.batch, f"{self.image_key}_clean": source, self.image_key: self._leaf}

    def update(self, engine: Any) -> None:
        """One ascent step. A loss scale does not matter for a sign."""
        leaf, clean = self._leaf, self._clean
        if leaf is None or clean is None or leaf.grad is None:
            raise RuntimeError(
                "expected a gradient of the image after the backward pass, got none: free training needs the "
                "trainer's own backward pass on the batch's image"
            )
        step = self.step_size * leaf.grad.as_subclass(Tensor).sign()
        moved = leaf.detach().as_subclass(Tensor) + step
        self._delta = self.threat.project(moved, clean) - clean
        self._leaf = None
