"""What an attacker wants to see, in clinical words: a goal turns a label map into the target of a targeted attack.

    target = MoveBoundary(class_index=6, mm=5)(label, spacing)
    image_adv = PGD(eps=4 / 255, targeted=True)(model, image, target)

Distances are Euclidean, in mm, between centres of voxels, and what lies within a distance includes what lies on it.
The border of the image is nobody's boundary: an organ that it cuts off does not shrink from there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

Fill = Literal["background", "nearest"]
"""What takes the place of a class that goes: the background, or for each voxel the nearest voxel of another class."""

Over = Literal["all", "background"]
"""What a growing class may take: every other class, or only the background."""

ROUNDING = 1e-5
"""Relative; a spacing of 0.7 comes from a file as 0.69999999, and that must not decide what lies within 2.1 mm."""


@dataclass(frozen=True, kw_only=True)
class Goal(ABC):
    """Base of all goals: settings at construction, a label map at call. Equal calls give equal targets."""

    @abstractmethod
    def change(self, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """The goal itself, for one case: class map (*S) -> a new one; ``__call__`` takes care of the rest."""

    @property
    @abstractmethod
    def classes(self) -> tuple[int, ...]:
        """Which structures the goal is about."""

    @abstractmethod
    def describe(self, class_names: Sequence[str]) -> str:
        """What the attacker wants, in words; ``class_names`` with the background first.

        Raises:
            ValueError: a class of the goal has no name.
        """

    @final
    def __call__(self, label: Tensor, spacing: float | Sequence[float]) -> Tensor:
        """What the attacker wants to see instead of ``label``.

        Args:
            label: (B, 1, H, W) or (B, 1, H, W, D) classes from 0; voxels of -1 have no say, and keep their -1. They are
                nobody's boundary and take no part in a volume. Metadata is dropped.
            spacing: voxel size in mm: one number, or one for each spatial axis.

        Returns:
            (B, 1, *S) int64 on the label's device; ``label`` is left alone.

        Raises:
            ValueError: no such label or spacing; a case lacks a class that the goal needs, or has no room for it, or
                would stay as it is.
        """
        classes = _classes(label)
        sizes = _sizes(spacing, classes.ndim - 1)
        targets = []
        for case, one in enumerate(classes):
            try:
                targets.append(np.where(one < 0, -1, self.change(one, sizes)))
                if np.array_equal(targets[-1], one):
                    raise ValueError(f"expected a goal that changes the label, got {self!r}: ask for more")
            except ValueError as error:
                raise ValueError(f"{error} (case {case} of the batch, spacing {sizes} mm)") from error
        return torch.from_numpy(np.stack(targets)[:, None]).to(label.device)


@dataclass(frozen=True, kw_only=True)
class Erase(Goal):
    """Make an organ, or one lesion, disappear.

    Args:
        class_index: of the organ.
        component: ``None`` for all of it, or which connected component (voxels that touch by a corner included):
            "largest", "smallest", or its rank by size from 1, the largest. Equal ones rank in the order of the array.
        fill: what takes its place.
    """

    class_index: int
    component: Literal["largest", "smallest"] | int | None = None
    fill: Fill = "background"

    @property
    def classes(self) -> tuple[int, ...]:
        return (self.class_index,)

    def __post_init__(self) -> None:
        _check_class("class_index", self.class_index)
        _check_option("fill", self.fill, Fill)
        if self.component not in (None, "largest", "smallest") and not _is_index(self.component):
            raise ValueError(
                f"expected component as None, 'largest', 'smallest' or a rank from 1, got {self.component!r}"
            )

    def change(self, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        gone = _mask(label, self.class_index)
        if self.component is not None:
            parts, number = ndimage.label(gone, structure=np.ones((3,) * gone.ndim))
            names = {"largest": 1, "smallest": number}
            rank = names[self.component] if isinstance(self.component, str) else self.component
            if rank > number:
                raise ValueError(f"expected a component of rank 1 to {number} of class {self.class_index}, got {rank}")
            by_size = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable")
            gone = parts == by_size[rank - 1] + 1
        return _filled(label, gone, self.class_index, self.fill, spacing)

    def describe(self, class_names: Sequence[str]) -> str:
        what = _name(class_names, self.class_index)
        if isinstance(self.component, str):
            what = f"the {self.component} component of {what}"
        elif self.component is not None:
            what = f"the component of {what} of rank {self.component} by size"
        return f"erase {what}, {_FILLED[self.fill]}"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The deepest point of a class: the voxel farthest from other classes and the border of the image."""

    class_index: int

    def __post_init__(self) -> None:
        _check_class("class_index", self.class_index)


@dataclass(frozen=True, kw_only=True)
class Invent(Goal):
    """Make a ball of a class appear, over whatever is there; the border of the image may cut it.

    Args:
        class_index: of the ball; the label need not hold it.
        radius_mm: voxels within this distance of the centre's voxel.
        where: the centre: "random", anywhere that the whole ball fits in; a fraction of the image's extent in [0, 1]
            for each axis; or ``Inside(class_index=k)``.
        seed: of "random", and only then. Each case draws anew from it, so a case never depends on its neighbours.
    """

    class_index: int
    radius_mm: float
    where: str | Inside | tuple[float, ...]
    seed: int | None = None

    @property
    def classes(self) -> tuple[int, ...]:
        return (self.class_index,)

    def __post_init__(self) -> None:
        _check_class("class_index", self.class_index)
        if not 0 < self.radius_mm < math.inf:
            raise ValueError(f"expected radius_mm above 0, got {self.radius_mm!r}")
        if (self.where == "random") != (self.seed is not None):
            raise ValueError(f"expected a seed with where='random' and only then, got {self.seed!r}")
        if isinstance(self.where, Inside) or self.where == "random":
            return
        if isinstance(self.where, str) or not all(0 <= part <= 1 for part in self.where):
            raise ValueError(f"expected where as 'random', fractions in [0, 1] or Inside(...), got {self.where!r}")
        object.__setattr__(self, "where", tuple(float(part) for part in self.where))

    def change(self, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        centre = self._centre(label, spacing)
        axes = np.ogrid[tuple(slice(n) for n in label.shape)]
        square = sum(((axis - c) * size) ** 2 for axis, c, size in zip(axes, centre, spacing, strict=True))
        return np.where(square <= _with_rounding(self.radius_mm) ** 2, self.class_index, label)

    def _centre(self, label: np.ndarray, spacing: Sequence[float]) -> tuple[int, ...]:
        if isinstance(self.where, Inside):
            depth = ndimage.distance_transform_edt(np.pad(_mask(label, self.where.class_index), 1), sampling=spacing)
            inner = depth[(slice(1, -1),) * label.ndim].round(6)
            return tuple(int(place) for place in np.unravel_index(inner.argmax(), label.shape))
        if isinstance(self.where, str):
            reach = [int(_with_rounding(self.radius_mm) / size) for size in spacing]
            if any(2 * far >= n for far, n in zip(reach, label.shape, strict=True)):
                raise ValueError(f"expected room for a ball of {self.radius_mm:g} mm, got an image of {label.shape}")
            chance = np.random.default_rng(self.seed)
            return tuple(int(chance.integers(far, n - far)) for far, n in zip(reach, label.shape, strict=True))
        if len(self.where) != label.ndim:
            raise ValueError(f"expected where with {label.ndim} fractions, got {self.where!r}")
        return tuple(min(int(part * n), n - 1) for part, n in zip(self.where, label.shape, strict=True))

    def describe(self, class_names: Sequence[str]) -> str:
        if isinstance(self.where, Inside):
            place = f"at the deepest point of {_name(class_names, self.where.class_index)}"
        elif isinstance(self.where, str):
            place = f"at a random place (seed {self.seed})"
        else:
            place = f"at ({', '.join(f'{part:g}' for part in self.where)}) of the image's extent"
        return f"invent a ball of {_name(class_names, self.class_index)} of radius {self.radius_mm:g} mm {place}"


@dataclass(frozen=True, kw_only=True)
class _Resize(Goal):
    """What growing and shrinking share: voxels change sides by their distance from the other side."""

    class_index: int
    over: Over = "all"
    fill: Fill = "background"

    @property
    def classes(self) -> tuple[int, ...]:
        return (self.class_index,)

    def __post_init__(self) -> None:
        _check_class("class_index", self.class_index)
        _check_option("over", self.over, Over)
        _check_option("fill", self.fill, Fill)

    @abstractmethod
    def amount(self) -> float:
        """Above 0 to grow, below to shrink."""

    @abstractmethod
    def choose(self, distance: np.ndarray, allowed: np.ndarray, volume: int) -> np.ndarray:
        """Which of the allowed voxels change sides; ``distance`` in mm, ``volume`` of the class in voxels."""

    @final
    def change(self, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        mask = _mask(label, self.class_index)
        closed = mask | (label < 0)
        if closed.all():
            raise ValueError(f"expected class {self.class_index} to have a boundary, but it fills the image")
        if self.amount() > 0:
            distance = ndimage.distance_transform_edt(~mask, sampling=spacing)
            allowed = ~closed if self.over == "all" else label == 0
            return np.where(self.choose(distance, allowed, mask.sum()), self.class_index, label)
        lost = self.choose(ndimage.distance_transform_edt(closed, sampling=spacing), mask, mask.sum())
        if np.array_equal(lost, mask):
            raise ValueError(f"expected {self!r} to leave some of the class, got none: Erase makes it disappear")
        return _filled(label, lost, self.class_index, self.fill, spacing)


@dataclass(frozen=True, kw_only=True)
class MoveBoundary(_Resize):
    """Grow or shrink a class by a distance; ``class_index``, ``over`` and ``fill`` as for ``ChangeVolume``.

    Args:
        mm: grow by all voxels within this distance of the class; negative: lose those within it of another class.
    """

    mm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.mm) or self.mm == 0:
            raise ValueError(f"expected mm above 0 to grow or below 0 to shrink, got {self.mm!r}")

    def amount(self) -> float:
        return self.mm

    def choose(self, distance: np.ndarray, allowed: np.ndarray, volume: int) -> np.ndarray:
        return allowed & (distance <= _with_rounding(abs(self.mm)))

    def describe(self, class_names: Sequence[str]) -> str:
        name = _name(class_names, self.class_index)
        if self.mm > 0:
            return f"grow {name} by {self.mm:g} mm, {_OVER[self.over]}"
        return f"shrink {name} by {-self.mm:g} mm, {_FILLED[self.fill]}"


@dataclass(frozen=True, kw_only=True)
class ChangeVolume(_Resize):
    """Grow or shrink a class evenly until its volume has changed by a percentage, to the nearest voxel.

    Voxels change sides in the order of their distance from the other side, equal distances in the order of the array.

    Args:
        class_index: of what grows or shrinks.
        percent: of the volume before; 20 is a fifth more, -20 a fifth less.
        over: what growing may take. With "background" it passes over another class that lies between.
        fill: what takes the place of what shrinking frees.
    """

    percent: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -100 < self.percent < math.inf or self.percent == 0:
            raise ValueError(f"expected percent above -100 and not 0, got {self.percent!r}: Erase takes all of a class")

    def amount(self) -> float:
        return self.percent

    def choose(self, distance: np.ndarray, allowed: np.ndarray, volume: int) -> np.ndarray:
        number = math.floor(abs(self.percent) / 100 * volume + 0.5)
        places = np.flatnonzero(allowed)
        if number > len(places):
            raise ValueError(f"expected room for {number} voxels more, got {len(places)}: ask for a smaller change")
        # Distances that are equal but for the last bits must tie, or the order would depend on the machine.
        order = np.argsort(distance.ravel()[places].round(6), kind="stable")
        chosen = np.zeros(distance.shape, dtype=bool)
        chosen.flat[places[order[:number]]] = True
        return chosen

    def describe(self, class_names: Sequence[str]) -> str:
        how = f"larger, {_OVER[self.over]}" if self.percent > 0 else f"smaller, {_FILLED[self.fill]}"
        return f"make {_name(class_names, self.class_index)} {abs(self.percent):g} % {how}"


@dataclass(frozen=True, kw_only=True)
class Swap(Goal):
    """Take two classes for each other, such as the left kidney and the right. The label must hold both."""

    first: int
    second: int

    @property
    def classes(self) -> tuple[int, ...]:
        return (self.first, self.second)

    def __post_init__(self) -> None:
        _check_class("first", self.first)
        _check_class("second", self.second)
        if self.first == self.second:
            raise ValueError(f"expected two classes to swap, got {self.first} twice")

    def change(self, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        one, other = _mask(label, self.first), _mask(label, self.second)
        return np.where(one, self.second, np.where(other, self.first, label))

    def describe(self, class_names: Sequence[str]) -> str:
        return f"swap {_name(class_names, self.first)} and {_name(class_names, self.second)}"


_FILLED = {"background": "background in its place", "nearest": "the nearest other class in its place"}
_OVER = {"all": "over every other class", "background": "over background only"}


def _mask(label: np.ndarray, class_index: int) -> np.ndarray:
    mask = label == class_index
    if not mask.any():
        held = ", ".join(str(k) for k in np.unique(label) if k >= 0) or "none"
        raise ValueError(f"expected class {class_index} in the label, got {held}: leave this case out")
    return mask


def _filled(label: np.ndarray, gone: np.ndarray, class_index: int, fill: Fill, spacing: Sequence[float]) -> np.ndarray:
    if fill == "background":
        return np.where(gone, 0, label)
    own = (label == class_index) | (label < 0)
    if own.all():
        raise ValueError(f"expected another class to fill with, but class {class_index} fills the image")
    nearest = ndimage.distance_transform_edt(own, sampling=spacing, return_distances=False, return_indices=True)
    return np.where(gone, label[tuple(nearest)], label)


def _with_rounding(mm: float) -> float:
    return mm * (1 + ROUNDING)


def _name(class_names: Sequence[str], class_index: int) -> str:
    if class_index >= len(class_names):
        raise ValueError(f"expected a name for class {class_index}, got {len(class_names)}: {list(class_names)}")
    return class_names[class_index]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_class(name: str, value: Any) -> None:
    if not _is_index(value):
        raise ValueError(f"expected {name} as a whole number from 1, got {value!r}: class 0 is the background")


def _check_option(name: str, value: Any, options: Any) -> None:
    if value not in get_args(options):
        raise ValueError(f"expected {name} among {', '.join(get_args(options))}, got {value!r}")


def _classes(label: Tensor) -> np.ndarray:
    plain = label.detach().as_subclass(Tensor).cpu()
    if plain.ndim not in (4, 5) or plain.shape[1] != 1 or plain.numel() == 0:
        raise ValueError(f"expected a label (B, 1, H, W) or (B, 1, H, W, D), got shape {tuple(plain.shape)}")
    whole = plain.long()
    if not torch.equal(whole.to(plain), plain) or whole.min() < -1:
        raise ValueError(
            "expected whole classes from 0, or -1, in the label, got others: resample labels by nearest neighbour"
        )
    return whole[:, 0].numpy()


def _sizes(spacing: float | Sequence[float], dims: int) -> list[float]:
    sizes = [float(spacing)] * dims if isinstance(spacing, (int, float)) else [float(size) for size in spacing]
    if len(sizes) != dims or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"expected spacing in mm as one positive number or {dims} of them, got {spacing!r}")
    return sizes
