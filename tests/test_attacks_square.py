"""The Square attack: its published schedule and shapes, the rules of its search, and worst cases in closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracles import LinearObjective, SmallNet, VoxelLinear, data
from torch import Tensor

from medrobust.attacks import RandomNoise, SoftDice, Square
from medrobust.attacks.square import bump, bumps, edges, fraction, place

EPS = 8 / 255
NORMS = [("linf", EPS), ("l2", 0.5)]

PUBLISHED = [
    (0, 1),
    (11, 2),
    (51, 4),
    (201, 8),
    (501, 16),
    (1001, 32),
    (2001, 64),
    (4001, 128),
    (6001, 256),
    (8001, 512),
]
"""First iteration of 10000, and by what p_init is divided from there on."""


def seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Spy:
    """A model that remembers every image it was asked about."""

    def __init__(self, model: object) -> None:
        self.model, self.seen = model, []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.model(x)


@dataclass(frozen=True)
class OneVoxel:
    """The intensity of one voxel of the first channel, brighter is worse; ``offset`` drowns it in single precision."""

    voxel: tuple[int, ...]
    offset: float = 0.0
    head: str = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        return logits[(slice(None), 0, *self.voxel)] + self.offset


@dataclass(frozen=True)
class Nearness:
    """Highest at the clean image, which here is 1/2 everywhere."""

    head: str = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        return -(logits - 0.5).square().flatten(1).sum(1)


def test_the_fraction_follows_the_published_table() -> None:
    ends = [first for first, _ in PUBLISHED[1:]] + [10000]
    for (first, divisor), end in zip(PUBLISHED, ends, strict=True):
        assert {fraction(0.8, i, 10000) for i in range(first, end)} == {0.8 / divisor}


@pytest.mark.parametrize("queries", [100, 500, 1000, 20000])
def test_the_table_is_stretched_to_the_queries(queries: int) -> None:
    for i in range(queries):
        divisor = max(halved for first, halved in PUBLISHED if i * 10000 // queries >= first)
        assert fraction(0.3, i, queries) == 0.3 / divisor


def test_windows_are_squares_and_cubes_of_the_fraction() -> None:
    for p, side in itertools.product((0.8, 0.4, 0.05, 0.001, 1e-6), (7, 32, 224)):
        assert edges(p, (side, side)) == [max(round(math.sqrt(p) * side), 1)] * 2
        assert edges(p, (side,) * 3) == [max(round(p ** (1 / 3) * side), 1)] * 3
    assert edges(1, (5, 9)) == [5, 9]


def test_windows_of_flat_volumes_are_longer() -> None:
    """A cube of 0.8 of 512 x 512 x 30 voxels would stick out of it: the other edges make up for that."""
    assert edges(0.8, (512, 512, 30)) == [458, 458, 30]
    assert edges(0.01, (512, 512, 30)) == [51, 51, 30]
    assert edges(0.001, (512, 512, 30)) == [20, 20, 20]


def test_windows_lie_anywhere_up_to_the_last_row() -> None:
    """The published code never draws the last position."""
    generator = seed()
    starts = {tuple(s.start for s in place([2, 3], (5, 4), generator)[1:]) for _ in range(300)}
    assert starts == set(itertools.product(range(4), range(2)))


def peak(sides: tuple[int, ...]) -> np.ndarray:
    """The published sum of boxes: the k-th reaches k voxels from the middle and adds 1 / (k + 1)^2."""
    height = np.zeros(sides)
    for k in range(max(sides) // 2 + 1):
        box = tuple(slice(max(n // 2 - k, 0), n // 2 + k + 1) for n in sides)
        height[box] += 1 / (k + 1) ** 2
    return height / np.sqrt((height**2).sum())


@pytest.mark.parametrize("sides", [(7, 7), (8, 5), (3, 3, 3), (5, 5, 4), (1, 1), (2, 1, 3)])
def test_bumps_are_two_opposite_peaks(sides: tuple[int, ...]) -> None:
    for axis in range(len(sides)):
        half = sides[axis] // 2
        first, second = (tuple(np.where(np.arange(len(sides)) == axis, n, sides)) for n in (half, sides[axis] - half))
        parts = ([peak(first)] if half else []) + [-peak(second)]
        expected = np.concatenate(parts, axis)
        expected /= np.linalg.norm(expected)
        got = bump(sides, axis, torch.zeros((), dtype=torch.float64)).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spatial_dims", "channels"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_linf_starts_from_stripes_along_the_first_axis(spatial_dims: int, channels: int) -> None:
    image, _ = data(spatial_dims, channels=channels)
    delta = Square().start(image, seed()) - image
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, EPS), rtol=0, atol=1e-6)
    up = delta > 0
    assert torch.equal(up, up[:1, :, :1].expand_as(up))
    for axis in range(3, up.ndim):
        assert not torch.equal(up, up.narrow(axis, 0, 1).expand_as(up))


@pytest.mark.parametrize("size", [(25, 25), (23, 31), (12, 10, 17), (3, 9, 5)])
def test_l2_starts_from_a_grid_of_bumps(size: tuple[int, ...]) -> None:
    """Five along each axis (fewer where there are not five voxels), all of one norm, of either sign and any axis."""
    image = torch.full((2, 2, *size), 0.5, dtype=torch.float64)
    delta = bumps(image, seed())
    assert delta.shape == (1, 2, *size)
    sides, counts = [max(n // 5, 1) for n in size], [min(n, 5) for n in size]
    shapes = [bump(sides, axis, image).numpy() for axis in range(len(size))]
    left = delta.numpy().copy()
    found = []
    for channel, tile in itertools.product(range(2), itertools.product(*map(range, counts))):
        starts = [(n - s * c) // 2 + s * t for n, s, c, t in zip(size, sides, counts, tile, strict=True)]
        at = (0, channel, *(slice(start, start + s) for start, s in zip(starts, sides, strict=True)))
        kinds = [(a, sign) for a, shape in enumerate(shapes) for sign in (1, -1) if np.allclose(left[at], sign * shape)]
        assert kinds
        found += kinds
        left[at] = 0
    assert not left.any()
    assert {sign for _, sign in found} == {1, -1}
    assert {axis for axis, _ in found} == set(range(len(size)))
    start = Square(norm="l2", eps=0.3).start(image, seed())
    torch.testing.assert_close((start - image).flatten(1).norm(dim=1), torch.full((2,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize(("spatial_dims", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_every_linf_query_sets_one_window_to_the_edge_of_the_ball(spatial_dims: int, channels: int) -> None:
    """Seen from outside: each try differs from the best image so far in one window, by one sign per channel."""
    model, (image, label) = SmallNet(spatial_dims, channels).eval(), data(spatial_dims, channels=channels, batch=1)
    image = (1.4 * image - 0.2).clamp(0, 1)
    spy, queries = Spy(model), 60
    Square(queries=queries)(spy, image, label, generator=seed())
    assert torch.equal(spy.seen[0], image)
    low, high = (image - EPS).clamp(0, 1), (image + EPS).clamp(0, 1)
    score = [SoftDice()(model(x).double(), label).item() for x in spy.seen]
    best = 1
    for i, tried in enumerate(spy.seen[2:]):
        assert ((tried == low) | (tried == high)).all()
        changed = (tried != spy.seen[best])[0]
        if channels == 1:
            assert changed.any()  # no query is wasted on what is there already
        sides = edges(fraction(0.8, i, queries), image.shape[2:])
        for axis, side in enumerate(sides):
            where = changed.movedim(axis + 1, 0).flatten(1).any(1).nonzero()
            assert len(where) == 0 or where.max() - where.min() < side
        for channel, sinks in zip(changed, (tried == low)[0], strict=True):
            assert len(sinks[channel].unique()) <= 1
        best = i + 2 if score[i + 2] > score[best] else best


def test_l2_moves_the_norm_of_two_windows_into_a_bump() -> None:
    """Algorithm 3 in NumPy, with the same draws."""
    image, eps = torch.full((2, 3, 12, 11, 10), 0.5, dtype=torch.float64), 0.4
    delta = torch.randn(image.shape, generator=seed(), dtype=torch.float64)
    delta *= (
        eps
        * torch.tensor([1.0, 0.7], dtype=torch.float64).view(2, 1, 1, 1, 1)
        / delta.flatten(1).norm(dim=1).view(2, 1, 1, 1, 1)
    )
    attack = Square(norm="l2", eps=eps)
    got = (attack.change(image + delta, image, 20, seed(5)) - image).numpy()

    generator = seed(5)
    sides = [max(n, 3) | 1 for n in edges(fraction(0.8, 20, attack.queries), image.shape[2:])]
    first, second = (place(sides, image.shape[2:], generator) for _ in range(2))
    shape = bump(sides, int(torch.randint(3, (), generator=generator)), image).numpy()
    sign = np.where(torch.rand((1, 3, 1, 1, 1), generator=generator, dtype=torch.float64).numpy() < 0.5, -1, 1)
    for case in range(2):
        old = delta[case].numpy()
        inside = np.zeros(old.shape, dtype=bool)
        inside[first] = inside[second] = True
        new = np.where(inside, 0, old)
        for channel in range(3):
            free = max(eps**2 - (old**2).sum(), 0) / 3 + (old[channel] ** 2)[inside[channel]].sum()
            window = old[channel][first[1:]]
            direction = sign[0, channel] * shape + window / np.linalg.norm(window)
            new[channel][first[1:]] = direction / np.linalg.norm(direction) * np.sqrt(free)
        np.testing.assert_allclose(np.linalg.norm(new), eps, rtol=1e-12)
        np.testing.assert_allclose(got[case], new, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_every_query_stays_in_the_ball_and_the_best_is_returned(norm: str, eps: float) -> None:
    model, (image, label) = SmallNet(2).eval(), data(2)
    spy, attack = Spy(model), Square(norm=norm, eps=eps, queries=60)
    image_adv = attack(spy, image, label)
    for x in spy.seen:
        assert torch.equal(attack.threat.project(x, image), x)
    scores = torch.stack([SoftDice()(model(x).double(), label) for x in spy.seen])
    best = scores.argmax(0)
    assert (best > 1).all()
    assert torch.equal(image_adv, torch.stack([spy.seen[i][case] for case, i in enumerate(best)]))


@pytest.mark.parametrize(("norm", "eps"), NORMS)
@pytest.mark.parametrize("queries", [2, 3, 40])
def test_queries_are_counted(norm: str, eps: float, queries: int) -> None:
    model, (image, label) = SmallNet(2).eval(), data(2, batch=3)
    spy = Spy(model)
    Square(norm=norm, eps=eps, queries=queries)(spy, image, label)
    assert len(spy.seen) == queries


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_no_gradient_is_asked_for(norm: str, eps: float) -> None:
    """A model that leaves torch on the way has none to give."""

    class Scanner(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            evidence = torch.from_numpy(6 * (x.numpy() - 0.5))
            return torch.cat([-evidence, evidence], 1)

    image, label = data(2, classes=2)
    attack = Square(norm=norm, eps=eps, queries=100)
    image_adv = attack(Scanner(), image, label)
    harm, clean = (SoftDice()(VoxelLinear()(x), label) for x in (image_adv, image))
    assert (harm > clean + 0.02).all()
    assert torch.is_grad_enabled()

    class NoGrad(VoxelLinear):
        @torch.no_grad()
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image)

    torch.testing.assert_close(attack(NoGrad(), image, label), image_adv, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [(0, 0), (3, 4), (2, 2), (2, 2, 3)])
@pytest.mark.parametrize("targeted", [False, True])
def test_finds_the_corner_of_a_model_that_looks_at_one_voxel(at: tuple[int, ...], targeted: bool) -> None:
    image, label = data(len(at), side=4)
    attack = Square(queries=150, objective=OneVoxel(at), targeted=targeted)
    moved = (attack(lambda x: x, image, label) - image)[(slice(None), 0, *at)]
    torch.testing.assert_close(moved, torch.full((2,), -EPS if targeted else EPS), rtol=0, atol=1e-6)


def test_what_single_precision_would_round_away_still_counts() -> None:
    """Around 1e8, float32 has steps of 8, and the voxel moves by 8/255."""
    image, label = data(2)
    attack = Square(queries=60, objective=OneVoxel((4, 4), offset=1e8))
    moved = (attack(lambda x: x, image, label) - image)[:, 0, 4, 4]
    torch.testing.assert_close(moved, torch.full((2,), EPS), rtol=0, atol=1e-6)


def test_linf_reaches_the_worst_image_of_a_linear_model() -> None:
    """Every voxel at its own edge; each case its own, though all try the same squares."""
    image, label = data(2, batch=3, side=4, classes=2)
    image_adv = Square(queries=1000)(VoxelLinear(), image, label)
    torch.testing.assert_close(image_adv, VoxelLinear.worst(image, label, EPS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_case_and_channel_has_a_radius_of_its_own(norm: str) -> None:
    model, (image, label) = SmallNet(2, 2).eval(), data(2, channels=2)
    eps = ((EPS, EPS / 4), (EPS / 2, EPS)) if norm == "linf" else ((0.5,), (0.2,))
    image_adv = Square(eps=eps, norm=norm, queries=40)(model, image, label)
    dims = (2, 3) if norm == "linf" else (1, 2, 3)
    order = float("inf") if norm == "linf" else 2
    moved = torch.linalg.vector_norm(image_adv - image, order, dim=dims)
    torch.testing.assert_close(moved, torch.tensor(eps).view_as(moved), rtol=1e-4, atol=0)


def test_l2_comes_near_the_closed_form_on_a_linear_objective() -> None:
    image, objective = torch.full((1, 1, 4, 5), 0.5), LinearObjective()
    best = 0.4 * objective.weights(image).norm()
    reached = []
    for queries in (2, 100, 600):
        image_adv = Square(norm="l2", eps=0.4, queries=queries, objective=objective)(
            lambda x: x, image, image[:, :1] * 0
        )
        reached.append((objective(image_adv - image, image) / best).item())
    assert reached[-1] <= 1 + 1e-6
    assert reached[-1] > 0.75
    assert reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_is_never_worse_than_the_clean_image(norm: str, eps: float) -> None:
    image = torch.full((2, 1, 6, 7), 0.5)
    attack = Square(norm=norm, eps=eps, queries=30, objective=Nearness())
    assert torch.equal(attack(lambda x: x, image, image * 0), image)


@pytest.mark.parametrize(("norm", "eps"), NORMS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_beats_the_best_of_as_many_noises(norm: str, eps: float, spatial_dims: int) -> None:
    model, (image, label) = SmallNet(spatial_dims).eval(), data(spatial_dims)
    queries = 60
    harm = SoftDice()(model(Square(norm=norm, eps=eps, queries=queries)(model, image, label)), label)
    noise, generator = RandomNoise(norm=norm, eps=eps), seed()
    draws = torch.stack(
        [SoftDice()(model(noise(model, image, generator=generator)), label).detach() for _ in range(queries)]
    )
    clean = SoftDice()(model(image), label)
    assert (harm - clean > 1.2 * (draws.max(0).values - clean)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 1}, "2 whole queries"),
        ({"queries": 10.5}, "2 whole queries"),
        ({"p_init": 0}, "p_init in"),
        ({"p_init": 1.5}, "p_init in"),
        ({"p_init": float("nan")}, "p_init in"),
        ({"eps": -1}, "eps >= 0"),
        ({"norm": "l1"}, "norm 'linf' or 'l2'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Square(**settings)
