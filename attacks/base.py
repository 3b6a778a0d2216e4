"""The contract that every attack keeps: settings at construction, data at call, nothing remembered between calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from medrobust.attacks.objectives import Objective, SoftDice, predict
from medrobust.attacks.scores import chooser
from medrobust.attacks.threat import ThreatModel, Within

Model = Callable[[Tensor], Tensor]
"""Anything with ``model(image) -> logits``, differentiable in ``image``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Attack(ABC):
    """Base of all attacks: a frozen set of settings that can be called on a model and data.

    A subclass says which images are allowed (``threat``) and writes ``perturb``. Sweeps are
    ``dataclasses.replace(attack, eps=4 / 255)``. A setting of ``None`` stands for a value that follows from the
    others (``defaults``), so that it follows them in a sweep as well; ``repr`` always shows the value.

    Args:
        objective: what the attacker maximises, per case.
        targeted: ``label`` is what the attacker wants to see; the objective is minimised.
    """

    blind: ClassVar[bool] = False
    """Looks at neither the model nor the label."""

    gradient_free: ClassVar[bool] = False
    """Asks the model for scores only."""

    objective: Objective | None = None
    targeted: bool = False

    def __post_init__(self) -> None:
        """Lists, as configurations have them, become tuples; a subclass that checks its settings calls this first."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, _tuples(value))

    @property
    @abstractmethod
    def threat(self) -> ThreatModel:
        """Which images are allowed."""

    @abstractmethod
    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """The attack itself: plain tensors in, adversarial image out; ``__call__`` takes care of the rest."""

    def defaults(self) -> dict[str, Any]:
        """What a setting left at ``None`` stands for."""
        return {"objective": SoftDice()}

    def setting(self, name: str) -> Any:
        """The value of a setting, with ``None`` resolved."""
        value = getattr(self, name)
        return self.defaults().get(name) if value is None else value

    @final
    def __call__(
        self,
        model: Model,
        image: Tensor,
        label: Tensor | None = None,
        *,
        region: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attack ``model`` on a batch.

        Args:
            model: ``model(image) -> logits (B, K, *S)``. A module is put into evaluation mode and its parameters are
                frozen meanwhile; both come back as they were, whatever happens. Of any other callable that is the
                caller's business: bind a network and its inferer with ``medrobust.inferers.bind``.
            image: (B, C, H, W) or (B, C, H, W, D), intensities in [0, 1]. Metadata is stripped, not carried over.
            label: (B, 1, *S) classes, or (B, K, *S) for overlapping sigmoid channels; voxels of -1 have no say. For a
                model that gives one answer an image, logits (B, K, 1, 1), the label is (B, 1, 1, 1).
                ``None``: the model's own prediction on the clean image, so that no annotation is needed.
            region: (B or 1, C or 1, *S) bool, the only voxels that may change, such as the body or one organ. A random
                start in an L2 ball spends part of the budget outside, where it is dropped: prefer attacks without one.
            generator: source of all chance. ``None``: a fresh one with seed 0, so that calls repeat.

        Returns:
            (B, C, *S) plain tensor, detached, in float32 (float64 for float64 images), allowed by ``threat``.

        Raises:
            TypeError, ValueError: the image or the label is not as above.
        """
        image, label = _plain(image), None if label is None else _plain(label)
        check_image(image, type(self).__name__)
        if self.targeted and label is None:
            raise ValueError(f"{type(self).__name__} expected a label to aim at, got none: targeted needs one")
        with frozen(model), torch.inference_mode(False), torch.enable_grad():
            image = image.detach().clone().to(torch.promote_types(image.dtype, torch.float32))
            if label is None:
                with torch.no_grad():
                    label = predict(model(image), self.setting("objective").head)
            label = label.detach().clone().to(image.device)
            check_label_grid(image, label, type(self).__name__)
            threat, asked = self.threat, model
            if region is not None:
                inside = check_region(image, _plain(region), type(self).__name__)
                threat = Within(threat, inside)
                clean = image

                def asked(x: Tensor) -> Tensor:
                    return model(torch.where(inside, x, clean))

            image_adv = self.perturb(asked, image, label, generator or torch.Generator().manual_seed(0)).detach()
            return threat.project(image_adv, image).detach()

    def score(self, model: Model, image: Tensor, label: Tensor) -> Tensor:
        """What the attacker maximises, (B,): the objective, or its negative when targeted.

        Raises:
            ValueError: it is not finite; no attack could tell a better image from a worse one.
        """
        return self.judge(self.setting("objective"), model(image), label)

    def judge(self, objective: Objective, logits: Tensor, label: Tensor) -> Tensor:
        """An objective's value as this attacker sees it, (B,): larger is better for the attacker.

        Raises:
            ValueError: it is not finite.
        """
        value: Tensor = aimed(objective, self.targeted)(logits, label)
        if not torch.isfinite(value).all():
            raise ValueError(f"expected finite objectives, got {value.tolist()}: does the model give NaN or infinity?")
        return -value if self.targeted else value

    def gradient(self, model: Model, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Score (B,) and its gradient with respect to the image only, (B, C, *S)."""
        value, gradient, _ = self.ascent(model, image, label, self.setting("objective"))
        return value, gradient

    def ascent(self, model: Model, image: Tensor, label: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """An objective's value (B,), its gradient, and the logits, so that other objectives cost no second forward."""
        image = image.detach().requires_grad_()
        logits = model(image)
        value = self.judge(objective, logits, label)
        (gradient,) = torch.autograd.grad(value.sum(), image)
        return value.detach(), gradient, logits.detach()

    def criterion_of(self) -> Objective:
        """What the best image is chosen by, for attacks that keep it."""
        return chooser(self.setting("objective"), targeted=self.targeted)

    def weigh(
        self, model: Model, image: Tensor, label: Tensor, step: int, steps: int, penalty: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """What is climbed at step ``step`` of ``steps``, and what the best image is chosen by, both (B,).

        After the last step, ``step`` is ``steps``. A penalty is taken off the objective, not off another number.
        """
        objective, criterion = self.setting("objective"), self.criterion_of()
        logits = model(image)
        score = self.judge(at(objective, step, max(steps, 1)), logits, label) - penalty
        same = criterion == objective
        return score, (score if same else self.judge(criterion, logits, label)).detach()

    def weighed_gradient(
        self, model: Model, image: Tensor, label: Tensor, step: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """What the best image is chosen by, (B,), and the gradient of what is climbed, (B, C, *S); as ``weigh``."""
        image = image.detach().requires_grad_()
        score, chosen = self.weigh(model, image, label, step, steps)
        (gradient,) = torch.autograd.grad(score.sum(), image)
        return chosen, gradient

    def __repr__(self) -> str:
        settings = ", ".join(f"{field.name}={self.setting(field.name)!r}" for field in fields(self))
        return f"{type(self).__name__}({settings})"


class Best:
    """The image of the highest score so far, per case."""

    def __init__(self) -> None:
        self.score: Tensor | None = None
        self.image_adv: Tensor | None = None

    def update(self, score: Tensor, image_adv: Tensor) -> Tensor:
        """Take over each case that scores higher than before; say which did, (B,) bool."""
        if self.score is None or self.image_adv is None:
            self.score, self.image_adv = score.clone(), image_adv.detach().clone()
            return torch.ones_like(score, dtype=torch.bool)
        better = score > self.score
        self.score = torch.where(better, score, self.score)
        self.image_adv = torch.where(per_case(better, image_adv), image_adv.detach(), self.image_adv)
        return better


def aimed(objective: Objective, targeted: bool) -> Objective:
    """The objective as a targeted attack reads it: one that looks at where the model is right then looks at where it is
    not yet what the attacker wants.
    """
    if not targeted or not hasattr(objective, "targeted"):
        return objective
    turned: Objective = replace(objective, targeted=True)  # type: ignore[type-var]
    return turned


def at(objective: Objective, step: int, steps: int) -> Objective:
    """The objective of step ``step`` of 0 .. ``steps`` - 1, for objectives that change on the way."""
    scheduled: Callable[[int, int], Objective] | None = getattr(objective, "at", None)
    return scheduled(step, steps) if scheduled else objective


def per_case(values: Tensor, like: Tensor) -> Tensor:
    """View (B,) so that it broadcasts over ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def draw(kind: Callable[..., Tensor], image: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of one case's shape, (1, C, *S), on the image's device.

    All cases of a batch share the draw: so a case's result never depends on its neighbours. It is made where the
    generator lives, in float64, so that a seed means the same on every device and for every precision.
    """
    values = kind((1, *image.shape[1:]), generator=generator, device=generator.device, dtype=torch.float64)
    return values.to(image)


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and no parameter gradients for the time of an attack; everything comes back as it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, want in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(want)


def check_image(image: Tensor, attack: str) -> None:
    """Refuse an image that is not (B, C, *S) floating point in [0, 1].

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.
    """
    if not image.is_floating_point():
        raise TypeError(f"{attack} expected a floating point image in [0, 1], got {image.dtype}: scale it first")
    if image.ndim not in (4, 5) or image.numel() == 0:
        raise ValueError(
            f"{attack} expected an image (B, C, H, W) or (B, C, H, W, D), got shape {tuple(image.shape)}: "
            "add the batch and channel dimensions"
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{attack} expected finite intensities, got NaN or infinity: repair the image first")
    low, high = image.min().item(), image.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"{attack} expected image intensities in [0, 1], got [{low:g}, {high:g}]: scale the image before attacking "
            "it, for example with MONAI's ScaleIntensityRange(..., b_min=0, b_max=1, clip=True)"
        )


def check_region(image: Tensor, region: Tensor, attack: str) -> Tensor:
    """The region as bool on the image's device.

    Raises:
        ValueError: it does not fit the image, is no mask, or is empty.
    """
    fits = region.ndim == image.ndim and region.shape[2:] == image.shape[2:]
    if not fits or any(have not in (1, want) for have, want in zip(region.shape[:2], image.shape[:2], strict=True)):
        raise ValueError(
            f"{attack} expected a region (B or 1, C or 1, *S) for an image {tuple(image.shape)}, got "
            f"{tuple(region.shape)}: resample it onto the image"
        )
    if region.dtype != torch.bool and not ((region == 0) | (region == 1)).all():
        raise ValueError(f"{attack} expected a region of 0 and 1, got other values: compare a label map with a class")
    if not region.any():
        raise ValueError(f"{attack} expected a region with voxels in it, got an empty one: is it the right class?")
    return region.bool().to(image.device).clone()  # a region made in inference mode cannot be saved for a gradient


def check_label_grid(image: Tensor, label: Tensor, attack: str) -> None:
    """Refuse a label that is not a whole-numbered map on the image's grid.

    Raises:
        ValueError: with what was expected, what came and what to do.
    """
    grids = (image.shape[2:], (1,) * (image.ndim - 2))  # of voxels, or of one answer for the whole image
    if label.ndim != image.ndim or label.shape[0] != image.shape[0] or label.shape[2:] not in grids:
        raise ValueError(
            f"{attack} expected a label (B, 1, *S) on the grid of the image {tuple(image.shape)}, "
            f"got {tuple(label.shape)}: resample it onto the image, or pass None to attack the model's prediction"
        )
    if label.is_floating_point() and not torch.equal(label, label.round()):
        raise ValueError(
            f"{attack} expected whole-numbered labels, got fractions or NaN: resample labels by nearest neighbour"
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _plain(x: Tensor) -> Tensor:
    """The tensor without its subclass: metadata would travel through autograd and come out on the wrong image."""
    return x.as_subclass(Tensor)
