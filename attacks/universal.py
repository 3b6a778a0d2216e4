"""One perturbation for all images (Moosavi-Dezfooli et al., CVPR 2017, 1610.08401), made by ``medrobust.universal``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.attacks.base import Attack, Model
from medrobust.attacks.norms import ball
from medrobust.attacks.threat import Eps, ThreatModel, radius


@dataclass(frozen=True, kw_only=True, repr=False)
class Universal(Attack):
    """Add a saved perturbation, resized to the image; looks at neither the model nor the label.

    What it does to cases that it was not made from is the measure; its control is :class:`RandomNoise` of the same eps.

    Args:
        file: written by :func:`medrobust.universal.save`; none changes nothing. Records name it by its hash.
        eps: radius of the Linf ball, or a tuple as PGD takes it; a perturbation that was made for another one is scaled
            to it.
    """

    blind: ClassVar[bool] = True

    file: str = ""
    eps: Eps = 8 / 255
    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball("linf", self.eps)
        if self.file:
            load(self.file)

    def setting(self, name: str) -> Any:
        if name == "file" and self.file:
            return f"{Path(self.file).name} sha256:{_digest(Path(self.file))[:12]}"
        return super().setting(name)

    @property
    def threat(self) -> ThreatModel:
        return ball("linf", self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        if not self.file:
            return image
        delta, eps = load(self.file)
        if delta.shape[0] not in (1, image.shape[1]) or delta.ndim != image.ndim - 1:
            raise ValueError(
                f"expected a universal perturbation for images {tuple(image.shape[1:])}, got one of shape "
                f"{tuple(delta.shape)}: make one on images of these channels and dimensions"
            )
        return image + resized(delta[None].to(image), image) * (radius(self.eps, image) / eps)


def resized(delta: Tensor, like: Tensor) -> Tensor:
    """A perturbation (1, C, *s) on the grid of ``like`` (B, C, *S); interpolation never exceeds its largest value."""
    size = like.shape[2:]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return delta if delta.shape[2:] == size else F.interpolate(delta, size, mode=mode)


def load(file: str) -> tuple[Tensor, float]:
    """The perturbation (C, *s) in a file, and the eps it was made for.

    Raises:
        FileNotFoundError, ValueError: no such file, or another content.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"expected a universal perturbation in {path}, got no such file: make one first")
    return _read(path, _digest(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def _read(path: Path, digest: str) -> tuple[Tensor, float]:
    """As :func:`load`; the digest is there so that a file that was written anew is read anew."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not {"delta", "eps"} <= found.keys():
        raise ValueError(f"expected a file written by medrobust.universal.save, got another in {path.name}")
    return found["delta"], float(found["eps"])
