"""Checkpoints: one to go on from after anything, one of the most robust weights so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from torch import nn

from medrobust.atomic import replacing
from medrobust.handlers import bare
from medrobust.networks.weights import load_weights


class Stateful(Protocol):
    """What a checkpoint can carry: networks, optimizers, schedulers, :class:`KeepBest`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Resumable:
    """Save everything a training needs to go on after every epoch, and go on from it.

    Attach it last, so that what other handlers do at the end of an epoch is in it; with :class:`EpochSeed` the resumed
    curve is the uninterrupted one. The file appears whole or not at all. Rank 0 writes, every rank reads.

    Args:
        path: the file, such as ``last.pt``.
        resume: start from the file if it is there; ``False`` starts anew and replaces it.
        settings: what the training must share with the file's, such as the attack's ``repr``, the seed, the learning
            rate; plain values.
        objects: what else to carry, by name: ``network=``, ``optimizer=``, ``lr_scheduler=``, ``best=`` ...

    Raises:
        ValueError: the file does not belong to this training.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
        **objects: Stateful,
    ) -> None:
        self.path = Path(path)
        if not isinstance(resume, bool):
            # The command line of bundles takes `false` for a word, and words are true.
            raise TypeError(f"expected resume as True or False, got {resume!r}: write --resume False")
        self.resume = resume
        self.settings = dict(settings or {})
        self.objects = {name: bare(one) if isinstance(one, nn.Module) else one for name, one in objects.items()}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Any) -> None:
        """Replace the file."""
        if engine.state.rank:
            return
        state = {name: one.state_dict() for name, one in self._all(engine).items()}
        state["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        state["settings"] = self.settings
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def load(self, engine: Any) -> None:
        """Go on where the file ends."""
        if not self.resume or not self.path.exists():
            return
        state = torch.load(self.path, map_location=engine.state.device, weights_only=True)
        objects = self._all(engine)
        hint = "it belongs to another training: choose another output folder, or start anew with resume=False"
        if set(state) != {*objects, "trainer", "settings"}:
            raise ValueError(
                f"expected a checkpoint of {sorted(objects)}, got {sorted(state)} in {self.path.name}; {hint}"
            )
        for name in {*self.settings, *state["settings"]}:
            now, before = self.settings.get(name), state["settings"].get(name)
            if now != before:
                raise ValueError(f"expected {name} {now!r} in {self.path.name}, got {before!r}; {hint}")
        for name, one in objects.items():
            if isinstance(one, nn.Module):
                load_weights(one, self.path, key=name)
            else:
                one.load_state_dict(state[name])
        engine.state.epoch, engine.state.iteration = state["trainer"]["epoch"], state["trainer"]["iteration"]
        length = engine.state.epoch_length
        if length and engine.state.iteration != engine.state.epoch * length:
            # The engine counts iterations; those of longer epochs (fewer processes, say) would end it too early.
            before = engine.state.iteration // max(engine.state.epoch, 1)
            warnings.warn(
                f"an epoch had {before} iterations in {self.path.name} and has {length} now: the training goes on, but "
                "its curve and a schedule by iterations are not those of an uninterrupted one",
                stacklevel=2,
            )
            engine.state.iteration = engine.state.epoch * length
        engine.logger.info(
            f"going on from {self.path.name}: {engine.state.epoch} of {engine.state.max_epochs} epochs done"
        )

    def _all(self, engine: Any) -> dict[str, Stateful]:
        scaler = {"scaler": engine.scaler} if engine.amp and engine.scaler is not None else {}
        return {**self.objects, **scaler}


class KeepBest:
    """Keep the weights that did best in validation, and stop when nothing improves any more.

    Attach it after the handler that validates. The criterion should be the Dice under attack: the clean one is best
    before the model is robust.

    Args:
        path: file of the best weights, a plain state dict.
        network: whose weights are kept.
        validator: engine whose metrics decide, in the epochs in which it runs.
        metric: the larger the better.
        patience: validations without improvement before the training stops; ``None``: never.
    """

    def __init__(
        self, path: str | Path, *, network: nn.Module, validator: Engine, metric: str, patience: int | None = None
    ) -> None:
        self.path = Path(path)
        self.network = bare(network)
        self.validator = validator
        self.metric = metric
        self.patience = patience
        self._state: dict[str, Any] = {"value": None, "epoch": 0, "since": 0}
        self._fresh = False

    def attach(self, engine: Engine) -> None:
        self.validator.add_event_handler(Events.COMPLETED, self.validated)
        engine.add_event_handler(Events.EPOCH_STARTED, self.stop_if_done)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def stop_if_done(self, engine: Any) -> None:
        """A training that patience ended does not go on when it is started again."""
        if self.patience is not None and self._state["since"] >= self.patience:
            engine.terminate()

    def validated(self) -> None:
        """There is something to compare."""
        self._fresh = True

    def __call__(self, engine: Any) -> None:
        if not self._fresh:
            return
        self._fresh = False
        metrics = self.validator.state.metrics
        if self.metric not in metrics:
            raise KeyError(f"expected the metric {self.metric!r} from the validation, got {sorted(metrics)}")
        value = float(metrics[self.metric])
        if not math.isfinite(value):
            raise ValueError(f"expected a finite {self.metric} from the validation, got {value}")
        if self._state["value"] is None or value > self._state["value"]:
            self._state = {"value": value, "epoch": engine.state.epoch, "since": 0}
            if not engine.state.rank:
                with replacing(self.path) as partial:
                    torch.save(self.network.state_dict(), partial)
            return
        self._state["since"] += 1
        self.stop_if_done(engine)

    def state_dict(self) -> dict[str, Any]:
        """Best value so far, its epoch, validations since."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with an earlier best."""
        self._state = dict(state_dict)
