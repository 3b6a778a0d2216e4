"""Threat models: an image is allowed if and only if projection leaves it unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrobust.attacks.threat import BlockRMSBall, IntensityRange, L2Ball, LinfBall, ThreatModel

THREATS: list[Any] = [
    IntensityRange(),
    LinfBall(8 / 255),
    LinfBall(0.0),
    L2Ball(0.7),
    L2Ball(0.0),
    BlockRMSBall(0.05, (4, 4, 4)),
    BlockRMSBall(0.05, (4, 4)),
    BlockRMSBall(0.0, (3, 5, 2)),
]


def pair(seed: int, dtype: torch.dtype, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 2, 6, 5, 7, generator=generator).to(dtype)
    return image, image + reach * torch.randn(image.shape, generator=generator).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    threat=st.sampled_from(THREATS),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    reach=st.sampled_from([1e-6, 0.01, 0.3, 100.0]),
)
def test_projection_is_idempotent_and_the_clean_image_allowed(
    threat: ThreatModel, seed: int, dtype: torch.dtype, reach: float
) -> None:
    image, image_adv = pair(seed, dtype, reach)
    projected = threat.project(image_adv, image)
    assert torch.equal(threat.project(projected, image), projected)
    assert torch.equal(threat.project(image, image), image)
    assert projected.min() >= 0
    assert projected.max() <= 1


def test_linf_and_l2_bounds() -> None:
    image, image_adv = pair(0, torch.float64, 0.3)
    assert (LinfBall(0.1).project(image_adv, image) - image).abs().max() <= 0.1 + 1e-12
    delta = (L2Ball(0.7).project(image_adv, image) - image).flatten(1).norm(dim=1)
    assert (delta <= 0.7 * (1 + 2e-6)).all()


def test_what_lies_within_is_left_alone() -> None:
    image, _ = pair(0, torch.float64, 0.0)
    inner = image * 0.5 + 0.25
    for threat, delta in ((LinfBall(0.1), 0.09), (L2Ball(1.0), 0.9 / math.sqrt(inner[0].numel()))):
        torch.testing.assert_close(threat.project(inner + delta, inner), inner + delta, rtol=0, atol=0)


@pytest.mark.parametrize("block", [(3, 5, 2), (3, 5)])
def test_block_bound_by_loops(block: tuple[int, ...]) -> None:
    image, image_adv = pair(3, torch.float64, 0.3)
    eps = 0.05
    delta = BlockRMSBall(eps, block).project(image_adv, image) - image
    for case in range(2):
        for channel in range(2):
            for z in range(0, 7, block[2] if len(block) == 3 else 1):
                for y in range(0, 5, block[1]):
                    for x in range(0, 6, block[0]):
                        depth = block[2] if len(block) == 3 else 1
                        cut = delta[case, channel, x : x + block[0], y : y + block[1], z : z + depth]
                        assert cut.square().sum() <= eps**2 * math.prod(block) * (1 + 1e-5)


def test_a_small_block_change_is_left_alone() -> None:
    image = torch.full((1, 1, 8, 8, 8), 0.5)
    image_adv = image + 0.05
    assert torch.equal(BlockRMSBall(0.0501, (4, 4, 4)).project(image_adv, image), image_adv)
