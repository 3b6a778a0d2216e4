"""The same chance in an epoch whether the training was interrupted before it or not."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd


class EpochSeed:
    """Seed sampling, augmentation and dropout at the start of every epoch from ``seed``, the epoch and the rank.

    A training resumed from an epoch's checkpoint then sees the very batches that the uninterrupted one saw. This seeds
    torch's global generator, because samplers and dropout know no other. Persistent worker processes keep their own
    state and are refused; an epoch should be one pass over the loader, for a pass that goes on into the next epoch was
    drawn before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        loader, epoch = engine.data_loader, engine.state.epoch
        if getattr(loader, "persistent_workers", False):
            raise ValueError("expected a loader without persistent_workers, got one: its chance cannot be reseeded")
        seed = self.seed + 1_000_003 * engine.state.rank + 7919 * epoch
        torch.manual_seed(seed)
        set_rnd(loader.dataset, seed=seed % 2**32)
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
