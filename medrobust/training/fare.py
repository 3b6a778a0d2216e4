"""FARE (Schlarmann et al., ICML 2024, 2402.12336): an image encoder that stays where it was, under attack too.

The embedding of an attacked image should be the untouched model's embedding of the clean one. No label is needed, and
whatever was built on the old embedding goes on working.
"""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from medrobust.networks.clip_zero_shot import ZeroShotCLIP


class KeepEmbedding:
    """Put ``reference`` (B, D, 1, 1), the untouched model's embedding of the clean image, into every batch.

    Attach it before ``CraftAdversarial(PGD(objective=Shift()), label_free=True)``, and let the trainer pass
    ``reference`` on to the network (MONAI's ``PrepareBatchExtraInput``): attack and loss then see the shift away from
    it, and ``ShiftLoss`` is the loss.

    Args:
        original: the untouched model; it is put into evaluation mode and gets no gradients.
    """

    def __init__(self, original: ZeroShotCLIP, *, image_key: str = "image", to: str = "reference") -> None:
        self.original = original.eval().requires_grad_(False)
        self.image_key = image_key
        self.to = to

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Any) -> None:
        batch = engine.state.batch
        image = batch[self.image_key].to(engine.state.device).as_subclass(Tensor)
        with torch.no_grad():
            reference = self.original.embed(image)[..., None, None]
        engine.state.batch = {**batch, self.to: reference}
