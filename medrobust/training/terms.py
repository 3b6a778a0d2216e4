"""The adversarial forward pass of a training step, and terms that are added to its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import Tensor

from medrobust.handlers import prepare


class AdversarialForward:
    """``pred_adv``: the network in training mode on ``image_adv``, right after its clean forward pass.

    It goes through ``engine.network``, wrapper included, so that distributed training averages its gradients, and
    runs under the trainer's autocast. Attach it beside ``CraftAdversarial(attack, to="image_adv")``.
    """

    def __init__(self, *, image_key: str = "image_adv", pred_key: str = "pred_adv") -> None:
        self.image_key = image_key
        self.pred_key = pred_key

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        batch, state = engine.state.batch, engine.state
        if self.image_key not in batch:
            raise KeyError(
                f"expected {self.image_key!r} in the batch, got {sorted(batch)}: attach "
                f"CraftAdversarial(attack, to={self.image_key!r}) to the trainer"
            )
        _, _, args, kwargs = prepare(engine)
        image_adv = batch[self.image_key].to(state.device).as_subclass(Tensor)
        state.output[self.pred_key] = engine.inferer(image_adv, engine.network, *args, **kwargs)


class LossTerm:
    """Add ``weight * loss(first, second)`` to what the trainer back-propagates.

    The mean over a batch is taken as the trainer takes it; gradient accumulation, loss scaling and clipping happen
    afterwards and see the sum. The unweighted term is kept in the output under ``name`` for logging, and the loss
    before any term as ``loss_clean``.

    Args:
        loss: (tensor, tensor) -> tensor, such as MONAI's losses or those of ``medrobust.losses``.
        of: what of the trainer's output it compares.
        weight: of this term; the trainer's own loss has weight 1.
        name: in logs; it starts with ``loss`` so that they find it.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        of: Sequence[str] = ("pred_adv", "label"),
        weight: float = 1.0,
        name: str = "loss_adv",
    ) -> None:
        if len(of) != 2 or not name.startswith("loss"):
            raise ValueError(f"expected two keys and a name that starts with 'loss', got {list(of)} and {name!r}")
        self.loss = loss
        self.of = tuple(of)
        self.weight = weight
        self.name = name

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        output = engine.state.output
        missing = [key for key in self.of if key not in output]
        if missing:
            raise KeyError(f"expected {missing} in the trainer's output for {self.name}: attach AdversarialForward()")
        first, second = (output[key] for key in self.of)
        value = self.loss(first, second).mean()
        output.setdefault("loss_clean", output["loss"].detach())
        output[self.name] = value.detach()
        output["loss"] = output["loss"] + self.weight * value
