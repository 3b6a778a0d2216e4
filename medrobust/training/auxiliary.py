"""The loss of a network's second head, which helps training and is not used afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from medrobust.handlers import bare


class AuxiliaryLoss:
    """Add ``weight * loss(auxiliary_head(features), label)`` to what the trainer back-propagates.

    ``features`` are what the decode head got in the step's last forward pass, so the backbone runs once. That pass is
    the trainer's own, wrapper included, so distributed training averages these gradients like all others and has no
    unused parameters. The unweighted term is in the output as ``loss_aux``.

    Args:
        loss: (logits, label) -> tensor; usually the trainer's own.
        weight: published for UPerNet: 0.4.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, weight: float = 0.4) -> None:
        self.loss = loss
        self.weight = weight
        self._features: Any = None
        self._hook: Any = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.ITERATION_STARTED, self.listen)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def check(self, engine: Any) -> None:
        """Refuse a network without the head."""
        network: Any = bare(engine.network)
        if getattr(network, "auxiliary_head", None) is None:
            raise ValueError(
                f"expected a network with an auxiliary_head, got {type(network).__name__} without: build it with "
                "auxiliary=True or leave this handler out"
            )

    def listen(self, engine: Any) -> None:
        """At the door of the decode head, until the loss: nothing stays on it where a handler raises later."""
        self.stop()
        network: Any = bare(engine.network)
        self._hook = network.decode_head.register_forward_pre_hook(self._keep)

    def stop(self) -> None:
        """Leave the network as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._features = None

    def fail(self, engine: Engine, error: BaseException) -> None:
        """The same, and the error goes on."""
        self.stop()
        raise error

    def __call__(self, engine: Any) -> None:
        output, network = engine.state.output, bare(engine.network)
        label = output["label"]
        logits = network.auxiliary_head(self._features)  # type: ignore[operator]
        self.stop()
        logits = F.interpolate(logits, label.shape[2:], mode="bilinear", align_corners=False)
        value = self.loss(logits, label).mean()
        output["loss_aux"] = value.detach()
        output["loss"] = output["loss"] + self.weight * value

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]
