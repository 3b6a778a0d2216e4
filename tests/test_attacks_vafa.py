"""VAFA against the published loop in NumPy, and what its default mode promises."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from medrobust.attacks import VAFA, DiceCE, SoftDice
from tests.oracles import LinearObjective
from tests.vafa_oracle import (
    assert_follows,
    coefficients,
    loss_and_gradient,
    published,
    render,
    ssim_loss_and_gradient,
    tables,
    toy_case,
    toy_network,
)


def test_the_oracle_itself_has_the_gradient_of_its_loss() -> None:
    shape, block = (2, 1, 8, 8, 8), (4, 4, 4)
    model, (image, label) = toy_network(1, 3, 3), toy_case(*shape)
    rng = np.random.default_rng(0)
    q = 5 + 15 * rng.random(tables(shape, block, 0).shape)

    def loss(q: np.ndarray) -> float:
        return loss_and_gradient(model, image.numpy(), label, q, 0.07, block, ssim_weight=1.0)[0]

    gradient = loss_and_gradient(model, image.numpy(), label, q, 0.07, block, ssim_weight=1.0)[1]
    for at in rng.choice(q.size, 20, replace=False):
        nudge = np.zeros(q.size)
        nudge[at] = 1e-4
        slope = (loss(q + nudge.reshape(q.shape)) - loss(q - nudge.reshape(q.shape))) / 2e-4
        assert slope == pytest.approx(gradient.flat[at], rel=1e-5, abs=1e-5 * np.abs(gradient).mean())


@pytest.mark.parametrize("ssim_weight", [0.0, 1.0])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((1, 1, 16, 16, 16), (8, 8, 8)), ((2, 1, 8, 12, 8), (4, 4, 4))])
def test_follows_the_published_loop(
    shape: tuple[int, ...], block: tuple[int, int, int], targeted: bool, ssim_weight: float
) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(*shape)
    attack = VAFA(steps=6, block_size=block, ssim_weight=ssim_weight, targeted=targeted, reference=True)
    theirs = published(model, image, label, block=block, steps=6, ssim_weight=ssim_weight, targeted=targeted)
    assert_follows(attack.trajectory(model, image, label), theirs, 6)


def test_follows_the_published_loop_into_the_bounds_with_two_channels() -> None:
    model, (image, label) = toy_network(2, 4, 3), toy_case(2, 2, 8, 8, 4, classes=4, low=0.2, high=0.7)
    attack = VAFA(q_max=9.5, q_min=7, step_size=0.75, steps=8, block_size=(4, 2, 4), ssim_weight=0, reference=True)
    theirs = list(published(model, image, label, block=(4, 2, 4), steps=8, q_max=9.5, q_min=7, step_size=0.75))
    assert_follows(attack.trajectory(model, image, label), iter(theirs), 8)
    last = theirs[-1].q
    assert (last == 7).any()
    assert (last == 9.5).any()


def test_the_similarity_term_changes_the_published_loop() -> None:
    """Or the comparison above could not tell whether the term is there."""
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 16, 16, 16)
    with_term, without = (
        list(published(model, image, label, block=(8, 8, 8), steps=3, ssim_weight=weight))[-1].q
        for weight in (1.0, 0.0)
    )
    assert (with_term != without).mean() > 0.001


def test_reference_returns_the_last_forward() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8)
    attack = VAFA(steps=5, block_size=(4, 4, 4), reference=True)
    theirs = list(published(model, image, label, block=(4, 4, 4), steps=5, ssim_weight=1.0))
    image_adv = attack(model, image, label)
    np.testing.assert_allclose(image_adv.numpy(), np.clip(theirs[-1].image_adv, 0, 1), rtol=0, atol=1e-5)
    assert np.abs(theirs[-1].image_adv - theirs[-2].image_adv).max() > 1e-3


def test_one_step_in_single_precision() -> None:
    """Float32 rounding can turn a sign of a vanishing gradient, so each step is judged from the tables it had."""
    model, (image, label) = toy_network(1, 3, 3).float(), toy_case(1, 1, 16, 16, 16)
    attack = VAFA(steps=4, block_size=(8, 8, 8), reference=True)
    taken = list(attack.trajectory(model, image.float(), label))
    model, exact = model.double(), image.float().double().numpy()
    for i, (now, after) in enumerate(pairwise(taken)):
        q = now.q.double().numpy()
        _, gradient, image_adv = loss_and_gradient(
            model, exact, label, q, 0.1 * (1 - i / 4), (8, 8, 8), ssim_weight=1.0
        )
        np.testing.assert_allclose(now.image_adv.detach().numpy(), image_adv, rtol=0, atol=1e-5)
        sure = np.abs(gradient) > 1e-3 * np.abs(gradient).mean()
        assert sure.mean() > 0.98
        np.testing.assert_array_equal(after.q.numpy()[sure], np.clip(q - np.sign(gradient), 5, 20)[sure])


def test_settings_left_open_are_resolved_and_printed() -> None:
    names = ("q_min", "q_init", "step_size", "solver", "schedule", "ssim_weight")
    paper, soft, reference = VAFA(q_max=30), VAFA(q_max=30, solver="soft"), VAFA(q_max=30, reference=True)
    assert [paper.setting(name) for name in names] == [1, 1, 15, "projected", "cosine", 0]
    assert [soft.setting(name) for name in names] == [1, 30, 1, "soft", "constant", 0]
    assert [reference.setting(name) for name in names] == [5, 30, 1, "soft", "constant", 1]
    assert [VAFA(q_max=0.5).setting(name) for name in names[:2]] == [0.5, 0.5]
    assert VAFA(q_min=3).setting("q_init") == 3
    assert VAFA(step_size=3).setting("schedule") == "constant"
    assert VAFA(step_size=3, schedule="linear").setting("schedule") == "linear"
    assert paper.setting("objective") == SoftDice(include_background=False)
    assert reference.setting("objective") == DiceCE()
    assert (VAFA(q_min=3, reference=True).setting("q_min"), VAFA(q_init=4).setting("q_init")) == (3, 4)
    assert "q_min=5" in repr(reference)
    assert "None" not in repr(paper) + repr(reference)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_are_obeyed(steps: int) -> None:
    calls = []
    network, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            calls.append(1)
        return network(x)

    attack = VAFA(steps=steps, block_size=(4, 4, 4), reference=True)
    assert len(list(attack.trajectory(model, image, label))) == steps
    calls.clear()
    attack(model, image, label)
    assert len(calls) == steps
    # The default mode also looks at where its last step led.
    assert len(list(VAFA(steps=steps, block_size=(4, 4, 4)).trajectory(model, image, label))) == steps + 1


def test_the_soft_solver_walks_by_the_sign_of_its_own_gradient() -> None:
    """Same loop without the stretch: clipped to [0, 1], soft Dice of the foreground, tables in [1, q_max]."""
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8, low=0.3, high=0.7)
    attack = VAFA(steps=5, block_size=(4, 4, 4), q_init=3, q_max=5, solver="soft", ssim_weight=1)
    taken = list(attack.trajectory(model, image, label))
    moved = 0
    for i, (now, after) in enumerate(pairwise(taken)):
        q = now.q.numpy()
        _, gradient, image_adv = loss_and_gradient(
            model,
            image.numpy(),
            label,
            q,
            0.1 * (1 - i / 5),
            (4, 4, 4),
            loss=lambda logits, label: SoftDice(include_background=False)(logits, label).mean(),
            ssim_weight=1.0,
            stretched=False,
        )
        np.testing.assert_allclose(now.image_adv.detach().numpy(), image_adv, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(after.q.numpy(), np.clip(q - np.sign(gradient), 1, 5))
        moved += (after.q != now.q).sum().item()
    assert moved > 0
    assert (taken[0].q == 3).all()


@pytest.mark.parametrize("reference", [False, True])
def test_targeted_takes_the_opposite_first_step(reference: bool) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 8, low=0.3, high=0.7)
    first = []
    for targeted in (False, True):
        attack = VAFA(
            steps=2,
            block_size=(4, 4, 4),
            q_min=10,
            q_init=15,
            ssim_weight=0,
            targeted=targeted,
            solver="soft",
            reference=reference,
        )
        taken = list(attack.trajectory(model, image, label))
        first.append(taken[1].q - taken[0].q)
    assert torch.equal(first[0], -first[1])
    assert (first[0].abs() == 1).float().mean() > 0.99


@pytest.mark.parametrize("reference", [False, True])
def test_the_second_call_equals_the_first_and_a_case_stands_alone(reference: bool) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8)
    attack = VAFA(steps=5, block_size=(4, 4, 4), reference=reference)
    image_adv = attack(model, image, label)
    assert torch.equal(attack(model, image, label), image_adv)
    for case in range(2):
        alone = attack(model, image[case : case + 1], label[case : case + 1])
        torch.testing.assert_close(alone, image_adv[case : case + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "soft"}, {"reference": True}, {"q_init": 1.0, "solver": "soft"}, {"q_min": 2.5, "step_size": 3.0}],
)
def test_tables_stay_in_their_bounds(options: dict[str, float]) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 8)
    attack = VAFA(q_max=8, steps=10, block_size=(4, 4, 4), **options)
    taken = list(attack.trajectory(model, image, label))
    assert (taken[0].q == attack.setting("q_init")).all()
    assert min(step.q.min() for step in taken) == attack.setting("q_min")
    assert max(step.q.max() for step in taken) == 8


@pytest.mark.parametrize("options", [{}, {"solver": "soft"}, {"solver": "soft", "final": "hard"}])
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 2, 13, 9, 7), (4, 4, 4)), ((2, 1, 5, 6, 3), (8, 8, 8)), ((2, 1, 8, 8, 8), (4, 4, 4))]
)
def test_no_block_changes_by_more_than_half_a_quantum(
    shape: tuple[int, ...], block: tuple[int, int, int], options: dict[str, str]
) -> None:
    """Rounding moves an orthonormal coefficient by at most q / 2, so a block's RMS by at most q_max / 2."""
    model, (image, label) = toy_network(shape[1], 3, 3), toy_case(*shape)
    image_adv = VAFA(q_max=20, steps=4, block_size=block, **options)(model, image, label)
    assert image_adv.shape == image.shape
    assert image_adv.min() >= 0
    assert image_adv.max() <= 1
    pads = [(0, 0), (0, 0), *((0, -n % b) for n, b in zip(shape[2:], block, strict=True))]
    change = np.pad((image_adv - image).numpy(), pads)
    energy = (coefficients(change + 128 / 255, block) / 255) ** 2
    rms = np.sqrt(energy.mean((-3, -2, -1)))
    assert rms.max() <= 10 / 255 + 1e-6
    assert rms.max() > 0.5 / 255


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", [{}, {"solver": "soft"}, {"solver": "soft", "final": "hard"}])
def test_constant_images_and_slices_stay_finite(value: float, options: dict[str, str]) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8)
    image[0] = value
    image[1, :, :, :, 2:6] = value
    image_adv = VAFA(steps=4, block_size=(4, 4, 4), **options)(model, image, label)
    assert torch.isfinite(image_adv).all()
    assert (image_adv - image).abs().mean() < 10 / 255


def test_reference_leaves_a_constant_slice_as_it_was() -> None:
    """The published code divides 0 by 0 here and loses the whole case."""
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 12)
    image[..., :4] = 0.4
    image_adv = VAFA(steps=3, block_size=(4, 4, 4), reference=True)(model, image, label)
    assert torch.isfinite(image_adv).all()
    assert (image_adv[..., :4] - 0.4).abs().max() < 10 / 255
    assert image_adv[..., 4:].amin((-3, -2)).max() == 0
    assert image_adv[..., 4:].amax((-3, -2)).min() == 1


@pytest.mark.parametrize("options", [{}, {"solver": "soft"}, {"solver": "soft", "final": "hard"}])
def test_a_tiny_table_gives_the_image_back(options: dict[str, str]) -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(1, 1, 8, 8, 8)
    attack = VAFA(q_max=1e-4, q_min=1e-4, steps=2, block_size=(4, 4, 4), **options)
    torch.testing.assert_close(attack(model, image, label), image, rtol=0, atol=1e-5)


def test_final_hard_is_on_the_lattice_of_its_tables() -> None:
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8, low=0.3, high=0.7)
    attack = VAFA(q_max=12, q_min=12, steps=3, block_size=(4, 4, 4), final="hard", solver="soft")
    image_adv = attack(model, image, label).numpy()
    assert image_adv.min() > 0
    assert image_adv.max() < 1
    np.testing.assert_allclose(
        image_adv, render(image.numpy(), np.float64(12) + tables(image.shape, (4, 4, 4), 0), 0, (4, 4, 4)) / 255
    )
    u = coefficients(image_adv, (4, 4, 4)) / 12
    np.testing.assert_allclose(u, np.round(u), rtol=0, atol=1e-6)
    assert (np.round(u) != 0).mean() > 0.3


@pytest.mark.parametrize("ssim_weight", [0.0, 100.0])
def test_the_best_step_of_each_case_is_returned(ssim_weight: float) -> None:
    """Judged by what the attack raises: soft Dice plus the weighted similarity. Hard, its tables are rendered again."""
    block = (4, 4, 4)
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8, low=0.3, high=0.7)
    attack = VAFA(steps=6, step_size=4, block_size=block, ssim_weight=ssim_weight, solver="soft")
    taken = list(attack.trajectory(model, image, label))
    soft, hard = attack(model, image, label), replace(attack, final="hard")(model, image, label)
    best = []
    for case in range(2):
        one, truth = image[case : case + 1], label[case : case + 1]
        scores = []
        for step in taken:
            image_adv = step.image_adv[case : case + 1].detach()
            similarity = 1 - ssim_loss_and_gradient(one.numpy(), image_adv.numpy(), block)[0]
            raised = SoftDice(include_background=False)(model(image_adv), truth).item()
            scores.append(raised + ssim_weight * similarity)
        best.append(int(np.argmax(scores)))
        step = taken[best[-1]]
        torch.testing.assert_close(soft[case], step.image_adv[case].detach(), rtol=0, atol=1e-9)
        rounded = render(one.numpy(), step.q[case : case + 1].numpy(), 0, block) / 255
        np.testing.assert_allclose(hard[case : case + 1].numpy(), rounded, rtol=0, atol=1e-9)
    # Neither the first step nor the last one, which an attack that keeps no score would return.
    assert min(best) > 0
    assert max(best) < 6


def test_every_projected_step_is_what_true_rounding_with_its_tables_gives() -> None:
    block = (4, 4, 4)
    model, (image, label) = toy_network(1, 3, 3), toy_case(2, 1, 8, 8, 8, low=0.3, high=0.7)
    taken = list(VAFA(steps=5, block_size=block).trajectory(model, image, label))
    assert len(taken) == 6
    assert (taken[0].q == 1).all()
    for step in taken:
        assert step.q.min() >= 1
        assert step.q.max() <= 20
        rounded = render(image.numpy(), step.q.numpy(), 0, block) / 255
        np.testing.assert_allclose(step.image_adv.numpy(), rounded, rtol=0, atol=1e-9)
    assert (taken[-1].image_adv - image).abs().max() > 5 / 255


@pytest.mark.parametrize(
    ("q_min", "q_max", "options"), [(1.0, 20.0, {}), (1.0, 20.0, {"step_size": 20}), (5.0, 9.0, {"step_size": 9})]
)
def test_the_projected_solver_reaches_the_worst_tables_of_a_linear_model(
    q_min: float, q_max: float, options: dict[str, float]
) -> None:
    """Where the objective is linear in the voxels, each coefficient has its own worst quantum."""
    block, weight = (4, 4, 4), LinearObjective()
    image, label = toy_case(1, 1, 8, 8, 8, low=0.3, high=0.7)
    attack = VAFA(q_min=q_min, q_max=q_max, steps=10, block_size=block, ssim_weight=0, objective=weight, **options)
    image_adv = attack(lambda x: x, image, label)

    c = coefficients(image.numpy(), block)
    slope = coefficients(weight.weights(image).numpy() + 128 / 255, block)  # the shift by 128 taken back
    grid = np.linspace(q_min, q_max, 4001)
    reachable = np.round(c[..., None] / grid) * grid
    best = (slope[..., None] * (reachable - c[..., None])).max(-1).sum() / 255 / 255
    reached = (weight(image_adv, label) - weight(image, label)).item()
    assert reached > 0.995 * best
    assert reached < 1.005 * best
    assert (
        weight(replace(attack, solver="soft")(lambda x: x, image, label), label) - weight(image, label)
    ) < 0.9 * best


def test_the_projected_solver_is_stronger_at_equal_steps_and_bounds() -> None:
    for seed in range(3):
        model, (image, label) = toy_network(1, 3, 3, seed=seed), toy_case(2, 1, 8, 8, 8, low=0.3, high=0.7)
        attack = VAFA(steps=8, block_size=(4, 4, 4), ssim_weight=0)
        harm = [SoftDice()(model(a(model, image, label)), label) for a in (attack, replace(attack, solver="soft"))]
        assert (harm[0] > harm[1]).all()


@pytest.mark.parametrize("options", [{"solver": "newton"}, {"solver": "projected", "reference": True}])
def test_an_unknown_solver_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected solver='projected' or 'soft'"):
        VAFA(**options)


def test_dice_ce_gives_the_published_number() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 14, 12, 12, 12, generator=generator)
    label = torch.randint(0, 13, (2, 1, 12, 12, 12), generator=generator)
    value = DiceCE()(logits, label)
    assert value.shape == (2,)
    assert value.mean().item() == pytest.approx(3.96646, abs=5e-6)


@pytest.mark.parametrize("size", [(6, 7), (4, 5, 6)])
def test_dice_ce_equals_monai_case_by_case(size: tuple[int, ...]) -> None:
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-6)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 5, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 4, (3, 1, *size), generator=generator)
    label[1] = 0
    expected = torch.stack([theirs(logits[b : b + 1], label[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(DiceCE()(logits, label), expected)
