"""Can an evaluation itself be believed? Checks for gradients that mislead and for attacks that are too weak.

A low harm says "robust" only if the attack was able to find harm. The checks follow Athalye et al. (1802.00420),
Carlini et al. (1902.06705) and the indicators of attack failure of Pintor et al. (2106.09947). Each is one function of
a :class:`Case` that returns a :class:`Finding`; :func:`checklist` runs them all. Silence is no proof of robustness.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medrobust.attacks.apgd import APGD
from medrobust.attacks.base import Attack, Model, check_image, check_label_grid, check_region, frozen, per_case
from medrobust.attacks.norms import scaled, steepest
from medrobust.attacks.objectives import SoftDice, predict
from medrobust.attacks.pgd import PGD
from medrobust.attacks.random_noise import RandomNoise
from medrobust.attacks.scores import HardDice
from medrobust.attacks.square import Square
from medrobust.attacks.threat import radius
from medrobust.findings import MEANING, Finding, warnings
from medrobust.io import load_volume, save_volume

__all__ = ["MEANING", "Case", "Finding", "checklist", "warnings"]

CLEAN = 0.1
"""Clean Dice that a case needs at least: below it there is nothing to break, and every check would be silent."""
ZERO_INPUT = 0.99
"""Share of input voxels without any gradient that is too many. Networks with a receptive field leave far fewer."""
ZERO_LOGITS = 0.95
"""The same at the logits. Sure models have exact zeros only where a probability rounds to 1: in the foreground."""
REPEAT = 1e-3
"""Relative difference of two equal forwards or gradients. Parallel sums on a GPU differ by some 1e-6."""
SMALL_STEP = 1 / 20
"""Longest step of the slope check, as a share of eps: nearly linear also in networks that nobody hardened."""
RISE = 1e-3
"""Rise of the objective that the slope check aims at: far above the rounding of a sum, far below curvature."""
ROUNDING = 1e-6
"""Rise, relative to the objective, that single precision cannot tell from nothing."""
SLOPE = 0.25
"""Relative error of the predicted rise. Smooth and ReLU networks stay below 0.1, broken gradients miss by about 1."""
ZERO_DICE = 0.05
"""A Dice this low is a broken prediction: whoever reaches it need not get any lower."""
SLACK = 0.05
"""Dice by which an attack may be behind another before it counts: small maps change by some 0.01 from one voxel."""
AHEAD = 0.02
"""Dice by which another attack of equal gradients may be ahead: step rules that work end within 0.01 of each other."""
CONVERGED = 0.1
"""Dice that twice the steps may still take away."""
LARGE = 64 / 255
"""Radius, as root mean square for L2, at which an attack should destroy the prediction of any network."""
LARGE_SHARE = 0.25
"""Share of the clean Dice that may be left there."""
SPREAD = 0.1
"""Range of the final Dice over three seeds: attacks that work end at much the same place."""
NOISE = 0.01
"""Dice that an attack must take away beyond noise of the same budget."""
BATCH = 1e-2
"""Relative difference of logits alone and in a batch: other kernels give up to 1e-3 in reduced precision."""
STORED = 0.01
"""Dice that storing may change: float32 volumes come back bit for bit."""
QUERIES, QUICK_QUERIES = 1000, 100
"""Of the Square attack."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, data (B, C, *S) and (B, 1, *S) as attacks take them, and the attack that is asked about.

    Args:
        attack: untargeted, with ``eps``, ``norm`` and ``steps``, such as PGD or APGD.
        seed: of the attack; restarts take the ones that follow.
        region: (B, 1 or C, *S), the only voxels that attacks may change; ``None``: all.
    """

    model: Model
    image: Tensor
    label: Tensor
    attack: Any
    seed: int = 0
    region: Tensor | None = None

    def __post_init__(self) -> None:
        attack: Any = self.attack
        missing = [name for name in ("eps", "norm", "steps") if not hasattr(attack, name)]
        name = type(attack).__name__
        if missing or not isinstance(attack, Attack):
            raise TypeError(f"expected an attack with eps, norm and steps, got {name} without {', '.join(missing)}")
        if attack.targeted:
            raise ValueError(f"expected an untargeted attack, got {attack!r}: the checks ask for harm")
        check_image(self.image, name)
        check_label_grid(self.image, self.label, name)
        if self.region is not None:
            check_region(self.image, self.region, name)
        eps = torch.as_tensor(self.attack.eps)
        if eps.ndim > 1 or not (eps > 0).all():
            raise ValueError(f"expected eps > 0, the same for all cases, got {self.attack.eps}: replace it")

    @cached_property
    def inside(self) -> Tensor:
        """The voxels that attacks may change, (B, C, *S) bool."""
        everywhere = torch.ones_like(self.image, dtype=torch.bool)
        return everywhere if self.region is None else everywhere & self.region.bool()

    @cached_property
    def image_adv(self) -> Tensor:
        """What the attack makes of the image."""
        return self.attacked()

    def attacked(self, seed: int = 0, *, factor: float = 1.0, steps: int | None = None) -> Tensor:
        """The image under the attack with another seed, a radius (and step size) times ``factor``, or steps that
        are other in number, not in length.
        """
        changes: dict[str, Any] = {"eps": scaled(self.attack.eps, factor), "steps": steps or self.attack.steps}
        return self.by(replace(self.attack, **changes, **self.step_settings(factor)), seed)

    def step_settings(self, factor: float = 1.0) -> dict[str, Any]:
        """What says how long the steps are, with lengths times ``factor``: it must not follow the number of steps."""
        names = [name for name in ("step_size", "schedule") if hasattr(self.attack, name)]
        found = {name: value for name in names if (value := self.attack.setting(name)) is not None}
        return found if "step_size" not in found else {**found, "step_size": scaled(found["step_size"], factor)}

    def by(self, attack: Attack, seed: int = 0, model: Model | None = None) -> Tensor:
        """The image under any attack, made for the case's own model or for another."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return attack(model or self.model, self.image, self.label, region=self.region, generator=generator)

    def logits(self, image: Tensor) -> Tensor:
        with frozen(self.model), torch.no_grad():
            return self.model(image)

    def dice(self, image: Tensor) -> Tensor:
        """Mean Dice over the foreground, (B,)."""
        return 1 - HardDice(head=self.head)(self.logits(image), self.label)

    def chance(self) -> Tensor:
        """Dice of a prediction that has the label's size but ignores its place, (B,): a share of the voxels."""
        channels = self.logits(self.image).shape[1]
        shared_by = max(channels - 1, 1) if self.head == "softmax" else 1
        found = (self.label > 0).flatten(1).sum(1) / (self.label >= 0).flatten(1).sum(1).clamp_min(1)
        return found / shared_by

    def score(self, image: Tensor) -> Tensor:
        """What the attack maximises, summed in double precision, (B,)."""
        score: Tensor = self.attack.judge(self.attack.setting("objective"), self.logits(image).double(), self.label)
        return score

    @property
    def head(self) -> Any:
        return self.attack.setting("objective").head

    def gradients(self) -> tuple[Tensor | None, Tensor | None, str]:
        """Of the score with respect to logits and image; ``None`` and why where there is none."""
        with frozen(self.model), torch.inference_mode(False), torch.enable_grad():
            image = self.image.detach().clone().requires_grad_()
            logits = self.model(image)
            if not torch.isfinite(logits).all():
                return None, None, "the logits are not finite"
            value = self.attack.judge(self.attack.setting("objective"), logits, self.label)
            if not value.requires_grad:
                return None, None, "the logits do not depend on the image for autograd"
            try:
                found: Any = torch.autograd.grad(value.sum(), (logits, image), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return None, None, f"autograd failed: {error}"
        if found[1] is None:
            return None, None, "the logits do not depend on the image for autograd"
        return found[0], found[1], ""


def checklist(
    model: Model,
    image: Tensor,
    label: Tensor | None = None,
    *,
    attack: Attack,
    surrogate: Model | None = None,
    region: Tensor | None = None,
    generator: torch.Generator | None = None,
    quick: bool = True,
) -> list[Finding]:
    """All checks on one case or a small batch; about thirteen runs of the attack.

    Args:
        model: the model as it is evaluated; bind a network and its inferer with ``medrobust.inferers.bind``.
        image: (B, C, *S) in [0, 1].
        label: (B, 1, *S) classes; ``None``: the model's own prediction.
        attack: with ``eps``, ``norm`` and ``steps``.
        surrogate: another model of the same task, to make transfer attacks with.
        region: (B or 1, C or 1, *S), the only voxels that attacks may change; gradients are judged there. A large eps
            then need not destroy everything: it may not reach everything.
        generator: source of the seeds; ``None``: seed 0.
        quick: 100 queries instead of 1000 for the black-box attack, and no run of twice the steps.

    Returns:
        One finding a check. Where there is no usable gradient no attack can run, and the list ends after three.

    Raises:
        TypeError, ValueError: an attack, image or label that the checks cannot take.
    """
    image = image.as_subclass(Tensor).detach()
    if label is None:
        with frozen(model), torch.no_grad():
            label = predict(model(image), attack.setting("objective").head)
    seed = int(torch.randint(2**31, (), generator=generator)) if generator is not None else 0
    if region is not None:
        region = check_region(image, region, type(attack).__name__).expand(len(image), -1, *image.shape[2:])
    case = Case(model=model, image=image, label=label.as_subclass(Tensor), attack=attack, seed=seed, region=region)
    found = [gradient(case), repeat(case)]
    if math.isnan(found[0].value):
        return found
    checks: list[Callable[[Case], Finding]] = [
        clean,
        slope,
        partial(steps, thorough=not quick),
        equal_gradients,
        budget,
        partial(black_box, queries=QUICK_QUERIES if quick else QUERIES),
        restarts,
        noise,
        batch,
        stored,
    ]
    if surrogate is not None:
        checks.append(partial(transfer, surrogate=surrogate))
    return found + [check(case) for check in checks]


def clean(case: Case) -> Finding:
    """Is there a segmentation that could be broken?"""
    value = case.dice(case.image).min().item()
    return Finding(check="clean", ok=value >= CLEAN, text=f"clean Dice {value:.3f}", value=value)


def gradient(case: Case) -> Finding:
    """Is there a gradient: finite, in every case, at more than a few voxels? Value: share of input voxels without."""
    at_logits, at_image, why = case.gradients()
    if at_logits is None or at_image is None or not torch.isfinite(at_image).all():
        why = why or "the gradient is not finite"
        return Finding(check="gradient", ok=False, text=f"no gradient: {why}", value=math.nan)
    asked = (case.label >= 0).any(1, keepdim=True)
    flat = (at_logits == 0).all(1, keepdim=True) & asked
    at_logits_zero = (flat.flatten(1).sum(1) / asked.flatten(1).sum(1).clamp_min(1)).max().item()
    still = (at_image == 0) & case.inside
    zero = still.flatten(1).sum(1) / case.inside.flatten(1).sum(1).clamp_min(1)
    value = zero.max().item()
    text = (
        f"no gradient at {value:.1%} of the input voxels and {at_logits_zero:.1%} of the logits' voxels, "
        f"none at all in {int((zero == 1).sum())} of {len(zero)} cases"
    )
    return Finding(check="gradient", ok=value <= ZERO_INPUT and at_logits_zero <= ZERO_LOGITS, text=text, value=value)


def repeat(case: Case) -> Finding:
    """Do two equal forwards agree, and two gradients? Value: the larger relative difference."""
    logits = [case.logits(case.image) for _ in range(2)]
    gradients = [case.gradients()[1] for _ in range(2)]
    differences = {"logits": _difference(*logits)}
    if gradients[0] is not None and gradients[1] is not None:
        differences["gradients"] = _difference(gradients[0], gradients[1])
    value = max(differences.values())
    text = " and ".join(f"{name} that differ by {found:.2g}" for name, found in differences.items())
    ok = value <= REPEAT
    return Finding(check="repeat", ok=ok, text=f"twice the same: {text}{'' if ok else _culprit(case)}", value=value)


def slope(case: Case) -> Finding:
    """Does a small step along the gradient raise the objective as predicted? Value: relative error of the prediction.

    Central differences along the steepest direction of the attack's norm, clipped to [0, 1] as the attack is.
    """
    uphill = case.gradients()[1]
    if uphill is None or not torch.isfinite(uphill).all():
        return Finding(check="slope", ok=False, text="no finite gradient to follow", value=math.nan)
    uphill = uphill * case.inside
    whole = radius(case.attack.eps, case.image) * steepest(case.attack.norm, uphill)
    promised = (uphill.double() * whole).flatten(1).sum(1)
    share = (RISE / promised.clamp_min(1e-30)).clamp_max(SMALL_STEP)
    move = per_case(share, whole) * whole.double()
    ahead, behind = ((case.image + way * move).clamp(0, 1).to(case.image.dtype) for way in (1, -1))
    predicted = (uphill.double() * (ahead.double() - behind.double())).flatten(1).sum(1)
    there, here = case.score(ahead), case.score(behind)
    floor = ROUNDING * (1 + there.abs())
    error = (there - here - predicted).abs() / torch.maximum(predicted, floor)
    worst = int(error.argmax())
    flat = bool((predicted <= floor).any())
    text = f"a step that should raise the objective by {predicted[worst]:.2g} raised it by {(there - here)[worst]:.2g}"
    text = "the gradient is too small for a step along it to be measured" if flat else text
    return Finding(
        check="slope",
        ok=not flat and bool((error <= SLOPE).all()),
        text=text,
        value=math.nan if flat else error.max().item(),
    )


def steps(case: Case, *, thorough: bool = False) -> Finding:
    """Does the attack rise above the clean image, and do more steps not undo it? Value: Dice won back by later steps.

    Fewer and more steps are as long as the attack's own.

    Args:
        thorough: also ask whether twice the steps would still take away more; then that is the value if it is larger.
    """
    full = case.attack.steps
    fewer = max(full // 4, 4 if getattr(case.attack, "progressive", False) else 1)
    early = case.attacked(steps=fewer)
    scores = {name: case.score(x) for name, x in {"clean": case.image, "early": early, "adv": case.image_adv}.items()}
    early_dice, dice = case.dice(early), case.dice(case.image_adv)
    rises = scores["adv"] > scores["clean"]
    # An attack that chooses by hard Dice may end at a lower objective, and the other way round.
    undone = torch.where(scores["adv"] < scores["early"], dice - early_dice, 0)
    value = undone.max().item()
    ok = bool(rises.all()) and value <= SLACK
    text = f"Dice {early_dice.mean():.3f} after {fewer} steps, {dice.mean():.3f} after {full}"
    if not rises.all():
        text += f", and in {int((~rises).sum())} of {len(rises)} cases no higher objective than on the clean image"
    if thorough:
        longer = case.dice(case.attacked(steps=2 * full))
        left = (dice - longer).max().item()
        text += f", {longer.mean():.3f} after {2 * full}"
        ok, value = ok and left <= CONVERGED, max(value, left)
    return Finding(check="steps", ok=ok, text=text, value=value)


def equal_gradients(case: Case) -> Finding:
    """Do APGD, and the attack with twice and four times its step, stay behind at equal gradients? Value: mean Dice
    by which the best of them does better: of one case alone, chance may decide between two good attacks.

    APGD finds its own step; it climbs what the attack climbs, and soft Dice where that is something else. An attack
    that is APGD itself stands beside PGD.
    """
    attack, soft = case.attack, SoftDice(head=case.head)
    settings: dict[str, Any] = {name: getattr(attack, name) for name in ("eps", "norm", "steps")}
    settings["restarts"] = getattr(attack, "restarts", 1)
    cls: Any = PGD if isinstance(attack, APGD) else APGD
    own = attack.setting("objective")
    rivals: dict[str, Attack] = {cls.__name__: cls(objective=own, **settings)}
    if own != soft:
        rivals[f"{cls.__name__} on soft Dice"] = cls(objective=soft, **settings)
    if "step_size" in case.step_settings():
        for times, word in ((2, "twice the step"), (4, "four times the step")):
            rivals[word] = replace(attack, **case.step_settings(times))
    dice = {name: case.dice(case.by(rival)) for name, rival in rivals.items()}
    found = case.dice(case.image_adv)
    value = max((found - other).mean().item() for other in dice.values())
    shown = ", ".join(f"{other.mean():.3f} with {name}" for name, other in dice.items())
    text = f"Dice {found.mean():.3f} under the attack; for as many gradients {shown}"
    return Finding(check="equal gradients", ok=value <= AHEAD, text=text, value=value)


def budget(case: Case) -> Finding:
    """Does Dice fall with eps / 2, eps, 2 eps, and is nearly nothing left at a large eps? Value: share left there.

    A ball holds all smaller ones, so what was found in them counts at the large eps too: there a random start may land
    so far out that the search begins where nothing has a slope. What chance gives for free need not be taken away.
    """
    unit = math.sqrt(case.inside[0].sum().item()) if case.attack.norm == "l2" else 1.0
    factor = max(4.0, LARGE * unit / float(torch.as_tensor(case.attack.eps).max()))
    dice = [
        case.dice(case.image),
        case.dice(case.attacked(factor=0.5)),
        case.dice(case.image_adv),
        case.dice(case.attacked(factor=2.0)),
    ]
    rise = max((after - before).max().item() for before, after in pairwise(dice))
    dice.append(torch.stack([*dice, case.dice(case.attacked(factor=factor))]).amin(0))
    value = (dice[-1] / dice[0].clamp_min(1e-6)).max().item()
    shown = ", ".join(f"{found.mean():.3f}" for found in dice)
    gone = bool((dice[-1] <= torch.maximum(LARGE_SHARE * dice[0], case.chance().clamp_min(ZERO_DICE))).all())
    text = f"Dice {shown} at 0, 1/2, 1, 2 and up to {factor:.3g} times eps"
    # What lies outside a region may stay right whatever is done inside.
    ok = (gone or case.region is not None) and rise <= SLACK
    return Finding(check="budget", ok=ok, text=text, value=value)


def black_box(case: Case, *, queries: int = QUICK_QUERIES) -> Finding:
    """Does the Square attack, which sees no gradient, stay behind? Value: Dice by which it does better."""
    square = Square(eps=case.attack.eps, norm=case.attack.norm, queries=queries, objective=SoftDice(head=case.head))
    return _rival(case, "black box", f"Square with {queries} queries", case.by(square))


def transfer(case: Case, *, surrogate: Model) -> Finding:
    """Does the attack made for another model stay behind? Value: Dice by which it does better."""
    return _rival(case, "transfer", "the attack on the surrogate", case.by(case.attack, model=surrogate))


def restarts(case: Case) -> Finding:
    """Do three seeds end at the same Dice? Value: the range of Dice."""
    dice = torch.stack([case.dice(case.image_adv), *(case.dice(case.attacked(seed)) for seed in (1, 2))])
    value = (dice.amax(0) - dice.amin(0)).max().item()
    shown = ", ".join(f"{mean:.3f}" for mean in dice.mean(1).tolist())
    return Finding(check="restarts", ok=value <= SPREAD, text=f"Dice {shown} with three seeds", value=value)


def noise(case: Case) -> Finding:
    """Does noise of the same budget harm less? Value: Dice that the attack takes away beyond it."""
    dice = case.dice(case.image_adv)
    noisy = case.dice(case.by(RandomNoise(eps=case.attack.eps, norm=case.attack.norm)))
    beyond = torch.where(dice <= ZERO_DICE, math.inf, noisy - dice)
    value = (noisy - dice).min().item()
    text = f"Dice {noisy.mean():.3f} under noise, {dice.mean():.3f} under the attack"
    return Finding(check="noise", ok=bool((beyond >= NOISE).all()), text=text, value=value)


def batch(case: Case) -> Finding:
    """Is the first case alone what it is beside another? Value: relative difference of its clean logits.

    Beside the second case, or where there is none, beside itself mirrored and half as bright.
    """
    image, label, region = case.image[:2], case.label[:2], None if case.region is None else case.inside[:2]
    if len(image) == 1:
        image, label = torch.cat([image, image.flip(2) / 2]), torch.cat([label, label.flip(2)])
        region = None if region is None else torch.cat([region, region.flip(2)])
    pair = replace(case, image=image, label=label, region=region)
    alone = replace(case, image=image[:1], label=label[:1], region=None if region is None else region[:1])
    value = _difference(alone.logits(alone.image), pair.logits(pair.image)[:1])
    together = alone.dice(pair.image_adv[:1]).item()
    apart = alone.dice(alone.image_adv).item()
    text = f"logits that differ by {value:.2g}, Dice {apart:.3f} attacked alone and {together:.3f} in a batch of two"
    return Finding(check="batch", ok=value <= BATCH and abs(together - apart) <= SLACK, text=text, value=value)


def stored(case: Case) -> Finding:
    """Does the attacked image give the same Dice after saving and reading it back? Value: the change of Dice."""
    affine = np.eye(4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image_adv.nii.gz"
        volumes = []
        for volume in case.image_adv:
            save_volume(volume, path, affine=affine)
            volumes.append(load_volume(path, volume, affine))
    back = torch.stack(volumes).to(case.image)
    dice, again = case.dice(case.image_adv), case.dice(back)
    value = (again - dice).abs().max().item()
    text = f"Dice {dice.mean():.3f} before and {again.mean():.3f} after storing as float32"
    return Finding(check="stored", ok=value <= STORED, text=text, value=value)


def _rival(case: Case, check: str, name: str, image_adv: Tensor) -> Finding:
    """Compare the attack with another image of the same ball."""
    dice, other = case.dice(case.image_adv), case.dice(image_adv)
    value = (dice - other).max().item()
    text = f"Dice {other.mean():.3f} under {name}, {dice.mean():.3f} under the attack"
    return Finding(check=check, ok=value <= SLACK, text=text, value=value)


def _difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to that of the first; 0 for two zeros."""
    size = torch.linalg.vector_norm(a, dtype=torch.float64)
    return (torch.linalg.vector_norm(a - b, dtype=torch.float64) / size.clamp_min(1e-300)).item()


def _culprit(case: Case) -> str:
    """The innermost layer that answers the same input differently, as the end of a sentence; "" where none is seen."""
    if not isinstance(case.model, nn.Module):
        return ""
    names = {module: name for name, module in case.model.named_modules()}
    runs: list[list[tuple[nn.Module, float, float]]] = []

    # Sums, not copies: the activations of a whole volume twice would not fit.
    def note(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(answer, Tensor):
            runs[-1].append((module, given[0].double().sum().item(), answer.double().sum().item()))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        for _ in range(2):
            runs.append([])
            case.logits(case.image)
    finally:
        for handle in handles:
            handle.remove()
    for (module, given, answer), (_, given_again, answer_again) in zip(*runs, strict=False):
        if given == given_again and answer != answer_again:
            name = f"layer {names[module]!r}" if names[module] else "the model itself"
            return f"; the first to differ is {name}, a {type(module).__name__}"
    return ""
