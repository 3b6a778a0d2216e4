"""VAFA-2D against the published loop in NumPy, on volumes slice by slice and on images."""

import numpy as np
import pytest
import torch

from medrobust.attacks import VAFA2D
from tests.vafa_oracle import assert_follows, coefficients, published, toy_case, toy_network

# The published VAFA-2D has no similarity term; ours is the same formula over the 2-D blocks.
SHAPES = [((1, 1, 16, 16, 5), (8, 8)), ((2, 1, 8, 12, 3), (4, 4)), ((2, 2, 12, 8), (4, 4)), ((1, 1, 16, 16), (8, 4))]


@pytest.mark.parametrize("ssim_weight", [0.0, 1.0])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_follows_the_published_loop(shape: tuple[int, ...], block: tuple[int, int], ssim_weight: float) -> None:
    model, (image, label) = toy_network(shape[1], 3, len(shape) - 2), toy_case(*shape)
    attack = VAFA2D(steps=6, block_size=block, ssim_weight=ssim_weight, reference=True)
    theirs = published(model, image, label, block=block, steps=6, ssim_weight=ssim_weight)
    assert_follows(attack.trajectory(model, image, label), theirs, 6)


def test_targeted_follows_the_published_loop_the_other_way() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 12, 3)
    attack = VAFA2D(steps=5, block_size=(4, 4), targeted=True, reference=True)
    theirs = published(model, image, label, block=(4, 4), steps=5, targeted=True)
    assert_follows(attack.trajectory(model, image, label), theirs, 5)


def test_reference_returns_the_last_forward() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 12, 3)
    theirs = list(published(model, image, label, block=(4, 4), steps=5))
    image_adv = VAFA2D(steps=5, block_size=(4, 4), reference=True)(model, image, label)
    np.testing.assert_allclose(image_adv.numpy(), np.clip(theirs[-1].image_adv, 0, 1), rtol=0, atol=1e-5)


def test_tables_have_a_row_for_every_slice() -> None:
    model, (image, label) = toy_network(2, 3, 3), toy_case(1, 2, 13, 9, 5)
    step = next(iter(VAFA2D(steps=1, block_size=(4, 4)).trajectory(model, image, label)))
    assert step.q.shape == (1, 2, 5, 4 * 3, 4, 4)
    model, (image, label) = toy_network(2, 3, 2), toy_case(1, 2, 13, 9)
    step = next(iter(VAFA2D(steps=1, block_size=(4, 4)).trajectory(model, image, label)))
    assert step.q.shape == (1, 2, 4 * 3, 4, 4)


def test_with_a_network_that_sees_one_slice_at_a_time_a_volume_is_its_slices() -> None:
    """The objective is a mean over voxels, so only here a slice's gradient keeps its sign alone."""
    flat = toy_network(1, 3, 2)
    image, label = toy_case(1, 1, 8, 8, 3)

    def slicewise(volume: torch.Tensor) -> torch.Tensor:
        return torch.stack([flat(volume[..., d]) for d in range(volume.shape[-1])], -1)

    def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, label[:, 0], reduction="none").flatten(1).mean(1)

    attack = VAFA2D(steps=5, block_size=(4, 4), objective=cross_entropy)
    # Step by step, because the best one is chosen for a case as a whole.
    for d in range(3):
        alone = attack.trajectory(flat, image[..., d], label[..., d])
        for together, one in zip(attack.trajectory(slicewise, image, label), alone, strict=True):
            torch.testing.assert_close(together.image_adv[..., d], one.image_adv, rtol=0, atol=1e-9)


def test_the_second_call_equals_the_first() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 3)
    attack = VAFA2D(steps=5, block_size=(4, 4))
    assert torch.equal(attack(model, image, label), attack(model, image, label))


@pytest.mark.parametrize("final", ["soft", "hard"])
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 2, 13, 9, 3), (4, 4)), ((2, 1, 9, 6), (8, 8)), ((1, 1, 8, 8), (4, 4))]
)
def test_no_block_changes_by_more_than_half_a_quantum(
    shape: tuple[int, ...], block: tuple[int, int], final: str
) -> None:
    model, (image, label) = toy_network(shape[1], 3, len(shape) - 2), toy_case(*shape)
    image_adv = VAFA2D(q_max=20, steps=4, block_size=block, final=final)(model, image, label)
    assert image_adv.min() >= 0
    assert image_adv.max() <= 1
    pads = [(0, 0), (0, 0), *((0, -n % b) for n, b in zip(shape[2:4], block, strict=True)), *[(0, 0)] * len(shape[4:])]
    change = np.pad((image_adv - image).numpy(), pads)
    rms = np.sqrt(((coefficients(change + 128 / 255, block) / 255) ** 2).mean((-2, -1)))
    assert rms.max() <= 10 / 255 + 1e-6
    assert rms.max() > 0.5 / 255


def test_constant_slices_stay_finite() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 4)
    image[..., 1:3] = 0.0
    image_adv = VAFA2D(steps=4, block_size=(4, 4))(model, image, label)
    assert torch.isfinite(image_adv).all()
    assert image_adv[..., 1:3].max() < 10 / 255


def test_final_hard_is_on_the_lattice_of_its_tables() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 3, low=0.3, high=0.7)
    image_adv = VAFA2D(q_max=12, q_min=12, steps=3, block_size=(4, 4), final="hard")(model, image, label).numpy()
    u = coefficients(image_adv, (4, 4)) / 12
    np.testing.assert_allclose(u, np.round(u), rtol=0, atol=1e-6)
    assert (np.round(u) != 0).mean() > 0.3
