"""A network of one image size on images of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.attacks import PGD
from medrobust.inferers import bind
from medrobust.resize import ResizeInferer


class Brightness(torch.nn.Module):
    """Logits are the first channel of the image; only 8 x 8 pixels are taken."""

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2:] == (8, 8)
        return image[:, :1] - 0.5


def test_logits_have_the_size_of_the_image() -> None:
    image = torch.rand(2, 3, 21, 13, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(image, (8, 8), mode="bilinear", antialias=True)
    expected = F.interpolate(small[:, :1] - 0.5, (21, 13), mode="bilinear")
    assert torch.allclose(ResizeInferer(8)(image, Brightness()), expected, atol=1e-6)


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ResizeInferer(8)(image, Brightness()), image - 0.5)


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (9, 24)])
def test_squares_keep_proportions(size: tuple[int, int]) -> None:
    """A square of ones stays as wide as it is high, wherever the image is padded."""
    seen: list[Tensor] = []

    def network(image: Tensor) -> Tensor:
        seen.append(image)
        return image

    logits = ResizeInferer(24, square=True)(torch.ones(1, 1, *size), network)
    assert logits.shape == (1, 1, *size)
    assert torch.allclose(logits, torch.ones(1, 1, *size))
    assert seen[0].sum() == size[0] * size[1]


def test_attacks_pass_through_the_resizing() -> None:
    """On brightness the worst Linf change is the same everywhere; the gradient knows it although the image shrinks."""
    image = torch.full((1, 1, 32, 32), 0.6)
    label = torch.ones(1, 1, 32, 32)
    model = bind(Brightness(), ResizeInferer(8))
    adv = PGD(eps=0.1, steps=3, random_start=False)(model, image, label)
    assert torch.allclose(adv, image - 0.1, atol=1e-6)


@pytest.mark.parametrize("size", [0, (8, 0)])
def test_sizes_are_checked(size: int) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        ResizeInferer(size)


def test_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match="slice volumes first"):
        ResizeInferer(8)(torch.zeros(1, 1, 8, 8, 8), Brightness())
