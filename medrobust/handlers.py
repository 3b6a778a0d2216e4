"""Attacks as Ignite handlers: add one to an engine, change nothing else.

============================ ======================= ===========================================================
handler                      event                   what it does
============================ ======================= ===========================================================
:class:`CraftAdversarial`    ``ITERATION_STARTED``   a new batch with the adversarial image, in a trainer or evaluator
:class:`RobustEvaluation`    ``FORWARD_COMPLETED``   ``image_adv`` and ``pred_adv`` in an evaluator's output: one pass
                                                     gives clean and adversarial metrics
:class:`SaveAdversarial`     ``FORWARD_COMPLETED``   adversarial volumes as float32 NIfTI on the network's grid
============================ ======================= ===========================================================

Both attack the bare network (not its distributed or compiled wrapper) in evaluation mode, take gradients of the image
only, draw chance from their own generator, and keep the image's own metadata on the adversarial image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SlidingWindowInferer
from nibabel.affines import voxel_sizes
from torch import Tensor, nn

from medrobust.attacks.base import Attack, frozen, per_case
from medrobust.attacks.objectives import predict
from medrobust.data.images import save_mask
from medrobust.goals import Goal
from medrobust.inferers import bind
from medrobust.io import save_volume, stem, unused
from medrobust.schedules import Schedule, attack_of, attacks_of
from medrobust.targeted import wanted
from medrobust.tiles import attack_tiles

PROTOCOLS = ("whole volume", "tiles")


class _Crafting:
    """What both handlers share: find the network, build the model, attack one prepared batch."""

    def __init__(
        self,
        attack: Attack | Schedule,
        *,
        inferer: Inferer | None = None,
        protocol: str = "whole volume",
        label_free: bool = False,
        seed: int = 0,
        image_key: str = "image",
        target_key: str | None = None,
        goal: Goal | None = None,
        region_key: str | None = None,
        autocast: str | None = None,
    ) -> None:
        """
        Args:
            attack: any attack of the package, or a schedule of attacks (``medrobust.schedules``).
            inferer: attack through this one; ``None`` is the engine's own, which is what gets deployed.
            protocol: ``"whole volume"`` attacks through the inferer; ``"tiles"`` attacks disjoint windows one by one,
                as the literature does (it needs a sliding-window inferer).
            label_free: attack the model's own prediction instead of the label.
            seed: of the attack's generator, plus the rank and the iteration: every iteration draws anew, a resumed
                run draws the same.
            image_key: the image's key in the batch.
            target_key: the key of the label map that a targeted attack wants to see; the label itself would be no
                attack but help.
            goal: what a targeted attack wants of the label (or the prediction) of each case; structures that the goal
                is not about shall stay as the model predicts them. Voxel sizes come from the image's affine. A case
                that lacks what the goal needs stays clean, with a warning.
            region_key: the key of the mask (B, 1, *S) outside which nothing may change, such as the body.
            autocast: craft in this lower precision, such as ``"bfloat16"``; ``None`` crafts in the precision of the
                image, whatever the engine's own, because gradients of single voxels are tiny.
        """
        if target_key is not None and goal is not None:
            raise ValueError(f"expected target_key or goal, got both {target_key!r} and {goal!r}")
        if any(one.targeted != (target_key is not None or goal is not None) for one in attacks_of(attack)):
            given = target_key if goal is None else goal
            raise ValueError(f"expected target_key or goal with a targeted attack and only then, got {given!r}")
        if protocol not in PROTOCOLS:
            raise ValueError(f"expected a protocol among {PROTOCOLS}, got {protocol!r}")
        if region_key is not None and protocol != "whole volume":
            raise ValueError(f"expected a region with the whole volume, got it with the protocol {protocol!r}")
        self.attack = attack
        self.inferer = inferer
        self.protocol = protocol
        self.label_free = label_free
        self.seed = seed
        self.image_key = image_key
        self.target_key = target_key
        self.goal = goal
        self.region_key = region_key
        self.autocast = None if autocast is None else getattr(torch, autocast)

    def craft(self, engine: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The adversarial twin of the current batch's image with that image's metadata, and the network's arguments.

        With a goal, ``engine.state.target`` is what the attacker wants to see.
        """
        state = engine.state
        source = state.batch[self.image_key]
        image, label, args, kwargs = prepare(engine)
        if self.target_key is not None:
            label = state.batch[self.target_key].to(state.device)
        if label is None and not self.label_free:
            raise ValueError("expected a label in the batch, got none: set label_free=True to attack the prediction")
        network, inferer = bare(engine.network), self.inferer or engine.inferer
        generator = torch.Generator().manual_seed(self.seed + state.rank + 100_003 * state.iteration)
        attack = attack_of(self.attack, epochs_passed(engine), generator)
        model = bind(network, inferer, *args, **kwargs)
        if self.protocol != "whole volume" and not isinstance(inferer, SlidingWindowInferer):
            raise ValueError(f"expected a sliding-window inferer to take tiles from, got {type(inferer).__name__}")
        possible = torch.ones(len(image), dtype=torch.bool, device=image.device)
        label_free = self.label_free
        if self.goal is not None:
            pred = own_prediction(attack, model, image)
            truth = pred if label_free else label.as_subclass(Tensor).long()
            target, possible = targets(self.goal, truth, spacings(source), lambda case: where(engine, case=case))
            label = wanted(target, truth, pred, self.goal.classes)
            engine.state.target, label_free = label, False
        try:
            with torch.autocast(image.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                if isinstance(inferer, SlidingWindowInferer) and self.protocol == "tiles":
                    target = own_prediction(attack, model, image) if label_free else label
                    tile = bind(network, None, *args, **kwargs)
                    image_adv = attack_tiles(attack, tile, image, target, inferer.roi_size, generator=generator)
                else:
                    region = None if self.region_key is None else state.batch[self.region_key]
                    aimed = None if label_free else label
                    image_adv = attack(model, image, aimed, region=region, generator=generator)
        except ValueError as error:
            raise ValueError(f"{error} ({where(engine)})") from error
        image_adv = torch.where(per_case(possible, image_adv), image_adv, image.as_subclass(Tensor).to(image_adv))
        return with_meta_of(source, image_adv), args, kwargs


class CraftAdversarial(_Crafting):
    """Put the adversarial image into a new batch before the engine's forward pass.

    With ``to="image"`` (the default) it replaces the image, and the clean one stays as ``image_clean``: plain
    adversarial training, or adversarial metrics only. With another key it is added beside the clean image. The batch
    that the data loader gave is not touched.
    """

    def __init__(self, attack: Attack | Schedule, *, to: str = "image", **settings: Any) -> None:
        super().__init__(attack, **settings)
        self.to = to

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        image_adv, _, _ = self.craft(engine)
        clean = {f"{self.image_key}_clean": batch[self.image_key]} if self.to == self.image_key else {}
        engine.state.batch = {**batch, **clean, self.to: image_adv}


class RobustEvaluation(_Crafting):
    """Add ``image_adv`` and ``pred_adv`` to an evaluator's output after its clean forward pass.

    Metrics on the pair ``from_engine(["pred_adv", "label"])`` then stand beside the clean ones, and a postprocessing
    that lists ``pred_adv`` saves it with the image's geometry. With a ``goal``, ``target`` joins them: what the
    attacker wants to see, for metrics on ``from_engine(["pred_adv", "target"])``.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        image_adv, args, kwargs = self.craft(engine)
        output = engine.state.output
        output["image_adv"] = image_adv = image_adv.to(engine.state.device)
        if self.goal is not None:
            output["target"] = with_meta_of(engine.state.batch[self.image_key], engine.state.target)
        with engine.mode(engine.network), torch.autocast("cuda", enabled=engine.amp, **engine.amp_kwargs):
            output["pred_adv"] = engine.inferer(image_adv, engine.network, *args, **kwargs)


class SaveAdversarial:
    """Write the adversarial volumes of an evaluator as float32 NIfTI, on the grid and in the unit the network saw.

    Attach it after the handler that crafts. A name that two cases share gets a number: nothing is overwritten within
    a run.

    Args:
        output_dir: folder of the files ``<image's name>_adv.nii.gz``.
        key: ``"image_adv"`` after :class:`RobustEvaluation`, ``"image"`` after :class:`CraftAdversarial`.
    """

    def __init__(self, output_dir: str | Path, *, key: str = "image_adv") -> None:
        self.output_dir = Path(output_dir)
        self.key = key
        self._written: set[str] = set()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self._written.clear())
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        for volume in decollate_batch(engine.state.output[self.key]):
            if not isinstance(volume, MetaTensor) or "filename_or_obj" not in volume.meta:
                raise ValueError(
                    f"expected {self.key} with its file name in the metadata, got none: load with LoadImaged"
                )
            name = unused(stem(str(volume.meta["filename_or_obj"])), self._written)
            rank = f"_rank{engine.state.rank}" if engine.state.rank else ""
            path = self.output_dir / f"{name}{rank}_adv.nii.gz"
            save_volume(volume.as_tensor(), path, affine=volume.affine, meta=volume.meta)


class SaveMasks:
    """Write an evaluator's binary 2-D predictions, named after their cases: PNG for pictures, NIfTI for slices.

    MONAI's own writers turn pictures and do not take single slices. A name that two files share gets a number.

    Args:
        output_dir: folder of the files ``<case>.png`` or ``<case>_seg.nii.gz``.
        key: of the postprocessed prediction, (1, H, W) of 0 and 1.
    """

    def __init__(self, output_dir: str | Path, *, key: str = "pred") -> None:
        self.output_dir = Path(output_dir)
        self.key = key
        self._written: set[str] = set()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self._written.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        for item in engine.state.output:
            image, mask = item["image"], item[self.key].as_subclass(Tensor)
            name = unused(stem(str(image.meta["filename_or_obj"])), self._written)
            if len(image) == 3:
                save_mask(mask, self.output_dir / f"{name}.png")
            else:
                path = self.output_dir / f"{name}_seg.nii.gz"
                save_volume(mask, path, affine=image.affine, meta=image.meta, description="medrobust", dtype=np.uint8)


def prepare(engine: Any) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """The current batch's image, label and the network's further arguments, as the engine itself takes them."""
    prepared = engine.prepare_batch(engine.state.batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    image, label, args, kwargs = prepared if len(prepared) == 4 else (*prepared, (), {})
    return image, label, args, kwargs


def targets(
    goal: Goal, label: Tensor, spacing: Sequence[Sequence[float] | float], place: Callable[[int], str]
) -> tuple[Tensor, Tensor]:
    """What the goal wants of each case, and for which (B,) it is possible; the others keep their label.

    Args:
        label: (B, 1, *S).
        spacing: in mm, one a case.
        place: says where a case is, for the warning.
    """
    found = label.as_subclass(Tensor).long().clone()
    possible = torch.ones(len(found), dtype=torch.bool, device=found.device)
    for case in range(len(found)):
        try:
            found[case] = goal(found[case : case + 1], spacing[case])[0]
        except ValueError as error:
            why = str(error).partition(" (case ")[0]
            warnings.warn(f"not attacked, the goal is impossible {place(case)}: {why}", stacklevel=2)
            possible[case] = False
    return found, possible


def spacings(source: Any) -> list[Sequence[float] | float]:
    """The voxel sizes in mm of each case of a batch (B, C, *S), from its affine; 1 where it has none."""
    if not isinstance(source, MetaTensor):
        return [1.0] * len(source)
    affine = source.affine.cpu().numpy()
    each = affine if affine.ndim == 3 else [affine] * len(source)
    return [[float(size) for size in voxel_sizes(one)[: source.ndim - 2]] for one in each]


def where(engine: Any, image_key: str = "image", *, case: int | None = None) -> str:
    """The current epoch, iteration and cases, by file name without folders, for a message; or one case of them."""
    meta = getattr(engine.state.batch.get(image_key), "meta", {})
    names = meta.get("filename_or_obj", "an unnamed case")
    names = [names] if isinstance(names, str) else names
    names = names if case is None or case >= len(names) else names[case : case + 1]
    cases = ", ".join(dict.fromkeys(stem(str(name)) for name in names))
    return f"in epoch {engine.state.epoch}, iteration {engine.state.iteration}, on {cases}"


def epochs_passed(engine: Any) -> float:
    """Epochs before the current iteration, a fraction within an epoch."""
    state = engine.state
    # A validator counts its iterations from one in every run, and its epochs as its trainer does.
    within = (state.iteration - 1) % state.epoch_length / state.epoch_length if state.epoch_length else 0
    return float(state.epoch - 1 + within)


def own_prediction(attack: Attack, model: nn.Module, image: Tensor) -> Tensor:
    """What the model says of the clean image, as a label to attack."""
    with frozen(model), torch.no_grad():
        return predict(model(image.as_subclass(Tensor)), attack.setting("objective").head)


def bare(network: nn.Module) -> nn.Module:
    """The module inside wrappers of distributed training and ``torch.compile``."""
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        else:
            return network


def with_meta_of(source: Any, image_adv: Tensor) -> Tensor:
    """``image_adv`` with the metadata of ``source``, which may be a plain tensor without any."""
    if not isinstance(source, MetaTensor):
        return image_adv
    return MetaTensor(image_adv).copy_meta_from(source, copy_attr=False)
