"""One offset per structure, within its range, and the label map untouched."""

from __future__ import annotations

import torch

from medrobust.transforms.structure_contrast import RandStructureContrastd


def test_each_structure_moves_as_one_and_within_its_range() -> None:
    structures = torch.tensor([[[0, 0, 52], [52, 5, 5]]])
    case = {"image": torch.zeros(1, 2, 3), "structures": structures}
    transform = RandStructureContrastd("image", "structures", {52: (100, 200), 5: (-40, -20)}, jitter=3.0)
    drawn = set()
    for seed in range(20):
        transform.set_random_state(seed)
        image = transform(case)["image"]
        for structure, low, high in ((0, -3, 3), (52, 97, 203), (5, -43, -17)):
            values = image[structures == structure].unique()
            assert len(values) == 1
            assert low <= values.item() <= high
        drawn.add(image[0, 0, 2].item())
    assert len(drawn) == 20
    assert torch.equal(case["image"], torch.zeros(1, 2, 3))


def test_probability_zero_changes_nothing() -> None:
    case = {"image": torch.ones(1, 2), "structures": torch.ones(1, 2)}
    transform = RandStructureContrastd("image", "structures", {1: (5, 6)}, prob=0.0)
    assert torch.equal(transform(case)["image"], case["image"])
