"""Noise at the edge of its ball: the norm is exact, whatever clipping and a region take away."""

from __future__ import annotations

import torch
from oracles import SmallNet, data
from torch import Tensor

from medrobust.attacks import RandomNoise


def half_air() -> tuple[Tensor, Tensor, Tensor]:
    """Images (2, 1, *S) of which one half is 0, their label, and a region (1, 1, *S) with some of both halves."""
    image, label = data(batch=2, side=12)
    image[..., :6, :, :] = 0
    region = torch.zeros_like(image[:1], dtype=torch.bool)
    region[..., 4:9, 2:9, 3:9] = True
    return image, label, region


def lengths(delta: Tensor) -> Tensor:
    return delta.flatten(1).double().norm(dim=1)


def test_the_norm_is_exact_in_half_air() -> None:
    image, label, region = half_air()
    for eps in (0.01, 0.5, 5.0):
        for where in (None, region):
            image_adv = RandomNoise(norm="l2", eps=eps)(SmallNet(), image, label, region=where)
            torch.testing.assert_close(lengths(image_adv - image), torch.full((2,), eps).double(), rtol=1e-5, atol=0)
            if where is not None:
                assert torch.equal(image_adv[~region.expand_as(image)], image[~region.expand_as(image)])
    rows = RandomNoise(norm="l2", eps=((0.5,), (2.0,)))(SmallNet(), image, label, region=region)
    torch.testing.assert_close(lengths(rows - image), torch.tensor([0.5, 2.0]).double(), rtol=1e-5, atol=0)


def test_it_is_white_noise_of_one_scale() -> None:
    """Where nothing clips, voxels are those of the same draw everywhere, and in a region a share of them, louder."""
    image, label, region = half_air()
    image = 0.5 + 0 * image
    (everywhere, inside) = (
        RandomNoise(norm="l2", eps=1.0)(SmallNet(), image, label, region=where) - image for where in (None, region)
    )
    ratio = (inside / everywhere)[region.expand_as(image)]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    share = lengths(everywhere * region)
    torch.testing.assert_close(ratio.mean().double(), 1 / share[0], rtol=1e-4, atol=0)


def test_a_region_too_small_for_the_norm_gets_the_largest_noise() -> None:
    image, label, region = half_air()
    image_adv = RandomNoise(norm="l2", eps=100.0)(SmallNet(), image, label, region=region)
    inside = image_adv[region.expand_as(image)]
    assert ((inside == 0) | (inside == 1)).all()
    assert 0.3 < inside.mean() < 0.7
    assert (lengths(image_adv - image) < 100).all()
    outside = ~region.expand_as(image)
    assert torch.equal(image_adv[outside], image[outside])


def test_no_noise_is_the_clean_image() -> None:
    image, label, region = half_air()
    assert torch.equal(RandomNoise(norm="l2", eps=0.0)(SmallNet(), image, label, region=region), image)
