"""Adversarial training as the public code of PIR-AT does it (2306.12941), for comparison with its numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor

from medrobust.attacks.base import at
from medrobust.attacks.pgd import PGD
from medrobust.attacks.threat import radius
from medrobust.handlers import bare, prepare, with_meta_of
from medrobust.inferers import bind


class LeakingAdversarial:
    """Train on the adversarial image with every gradient that the attack took of the weights added to the step's own.

    The public code zeroes the gradients, attacks by back-propagating through the whole network, and back-propagates
    the training loss on top. With k steps the weights so follow the sum of k + 1 gradients: k of the attack's loss in
    evaluation mode, the first of them on the clean image, and one of the training loss. ``CraftAdversarial`` with the
    same attack gives the same images without that sum, and is what we train with. Attach it before ``ClipGradient``.

    Args:
        attack: in an Linf ball, from the clean image, its last iterate: ``BIM(..., keep_best=False)``. Published: eps
            4 / 255, steps of 0.01, 2 or 5 of them, ``CrossEntropy``.
        image_key: the image's key in the batch; the clean image stays beside it as ``image_clean``.

    Raises:
        ValueError: at construction, for another attack.
    """

    def __init__(self, attack: PGD, *, image_key: str = "image") -> None:
        plain = isinstance(attack, PGD) and attack.norm == "linf"
        if not plain or attack.random_start or attack.keep_best or attack.targeted:
            raise ValueError(
                f"expected BIM(..., keep_best=False) in an Linf ball, got {attack!r}: the published form has no other"
            )
        self.attack = attack
        self.image_key = image_key
        self._leaked: list[tuple[Tensor, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.craft)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.leak)

    def craft(self, engine: Any) -> None:
        """Put the adversarial image into a new batch, and remember the gradients of the weights."""
        source = engine.state.batch[self.image_key]
        image, label, args, kwargs = prepare(engine)
        image = image.as_subclass(Tensor)
        network = bare(engine.network)
        model = bind(network, engine.inferer, *args, **kwargs)
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        sums = [torch.zeros_like(weight) for weight in weights]
        objective, steps = self.attack.setting("objective"), self.attack.steps
        modes = [(module, module.training) for module in network.modules()]
        image_adv = image
        try:
            network.eval()
            with torch.inference_mode(False), torch.enable_grad():
                for step in range(steps):
                    image_adv = image_adv.detach().requires_grad_()
                    loss = at(objective, step, steps)(model(image_adv), label.as_subclass(Tensor)).mean()
                    gradient, *of_weights = torch.autograd.grad(loss, [image_adv, *weights], allow_unused=True)
                    for total, one in zip(sums, of_weights, strict=True):
                        if one is not None:
                            total += one
                    move = radius(self.attack.step_size_at(step), image) * gradient.sign()
                    image_adv = self.attack.threat.project(image_adv + move, image)
        finally:
            for module, mode in modes:
                module.training = mode
        self._leaked = list(zip(weights, sums, strict=True))
        image_adv = with_meta_of(source, image_adv.detach())
        engine.state.batch = {**engine.state.batch, f"{self.image_key}_clean": source, self.image_key: image_adv}

    def leak(self, engine: Any) -> None:
        """Add them as the trainer adds its own: averaged over processes and accumulated steps, under its loss scale."""
        scale = engine.scaler.get_scale() if engine.amp and engine.scaler is not None else 1.0
        scale /= engine.accumulation_steps
        for weight, total in self._leaked:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
                total /= dist.get_world_size()
            if weight.grad is not None:
                weight.grad += scale * total
        self._leaked = []
