"""Dice and IoU against closed form and MONAI."""

import torch
from monai.metrics import DiceMetric, MeanIoU
from monai.networks.utils import one_hot

from medrobust.metrics.dice import dice
from medrobust.metrics.dice_as_published import dice_as_published
from medrobust.metrics.iou import iou


def test_known_values() -> None:
    prediction = torch.tensor([0, 1, 1, 1, 3, 0]).view(1, 1, 2, 3)
    reference = torch.tensor([0, 0, 1, 1, 2, 2]).view(1, 1, 2, 3)
    # class 0: 2*1/(2+2); class 1: 2*2/(3+2); class 2 missed; class 3 invented; class 4 in neither
    torch.testing.assert_close(dice(prediction, reference, 5), torch.tensor([[0.5, 0.8, 0.0, 0.0, 1.0]]))
    # The same counts over unions: 1/3, 2/3.
    torch.testing.assert_close(iou(prediction, reference, 5), torch.tensor([[1 / 3, 2 / 3, 0.0, 0.0, 1.0]]))
    # over the classes of the reference: 0, 1 and 2
    torch.testing.assert_close(dice_as_published(prediction, reference, 5), torch.tensor([[1.3 / 3]]))


def test_all_equal_monai() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, reference = torch.randint(0, 5, (2, 3, 1, 6, 5, 4), generator=generator)
    prediction[0][prediction[0] == 2] = 0
    reference[1][reference[1] == 3] = 0
    maps = one_hot(prediction, 6), one_hot(reference, 6)

    whole = DiceMetric(include_background=True, ignore_empty=False, reduction="none")
    torch.testing.assert_close(dice(prediction, reference, 6), whole(*maps))

    overlap = MeanIoU(include_background=True, ignore_empty=False, reduction="none")
    torch.testing.assert_close(iou(prediction, reference, 6), overlap(*maps))

    published = DiceMetric(include_background=True, reduction="none")(*maps)
    assert published.isnan().any()
    torch.testing.assert_close(dice_as_published(prediction, reference, 6), published.nanmean(1, keepdim=True))


def test_a_reference_without_a_say_has_the_stated_value() -> None:
    """The second case has no voxel that counts; the first is as ever."""
    prediction = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]]).view(2, 1, 2, 2)
    reference = torch.tensor([[0, 0, 1, 1], [-1, -1, -1, -1]]).view(2, 1, 2, 2)
    torch.testing.assert_close(dice_as_published(prediction, reference, 2), torch.tensor([[(2 / 3 + 0.8) / 2], [1.0]]))
