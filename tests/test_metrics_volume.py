"""Volume error and missed lesions, on boxes whose voxels are counted by hand."""

import pytest
import torch
from torch import Tensor

from medrobust.metrics.missed_rate import missed_rate
from medrobust.metrics.volume_error import volume_error


def test_volume_error_has_a_sign_and_rules_for_empty_classes() -> None:
    prediction, reference = torch.zeros(2, 2, 1, 10, 10, dtype=torch.long)
    reference[0, 0, 0, :10], prediction[0, 0, 5, :4] = 1, 1  # 10 voxels, 4 predicted, somewhere else
    reference[0, 0, 1, :8], prediction[0, 0, 1:3, :6] = 2, 2  # 8 voxels, 12 predicted
    reference[0, 0, 3, :3], prediction[0, 0, 6, :3] = 3, 4  # 3 is missed, 4 invented, 5 in neither
    value = volume_error(prediction, reference, 6)
    background = ((100 - 19) - (100 - 21)) / (100 - 21)
    torch.testing.assert_close(value[0], torch.tensor([background, -0.6, 0.5, -1.0, 1.0, 0.0]))
    assert value[1].eq(0).all()


def lesions() -> tuple[Tensor, Tensor]:
    """Class 1: lesions of 10, 4 and 1 voxels, the 4 in two pairs that touch by a corner. Class 2: one of 6."""
    prediction, reference = torch.zeros(2, 1, 1, 9, 12, 3, dtype=torch.long)
    reference[0, 0, 0, :10, 0] = 1
    reference[0, 0, 3, 0:2, 0] = reference[0, 0, 4, 2:4, 1] = 1
    reference[0, 0, 8, 11, 2] = 1
    reference[0, 0, 6, 4:10, 0] = 2
    return prediction, reference


@pytest.mark.parametrize(
    ("found_share", "missed"), [(0.0, 1 / 3), (0.3, 1 / 3), (0.31, 2 / 3), (0.5, 2 / 3), (0.51, 1.0), (1.0, 1.0)]
)
def test_a_lesion_is_missed_when_less_than_the_share_is_found(found_share: float, missed: float) -> None:
    prediction, reference = lesions()
    prediction[0, 0, 0, :3, 0] = 1  # 3 of 10
    prediction[0, 0, 4, 2:4, 1] = 1  # 2 of 4
    prediction[0, 0, 8, 11, 2] = 2  # 0 of 1: another class does not count
    prediction[0, 0, 6, :, 0] = 2  # all 6
    value = missed_rate(prediction, reference, 3, found_share=found_share)
    torch.testing.assert_close(value[0, 1:], torch.tensor([missed, 0.0]))


def test_exactly_the_share_is_found_whatever_the_rounding() -> None:
    reference = torch.ones(1, 1, 10, 10, dtype=torch.long)
    prediction = torch.zeros_like(reference)
    prediction[0, 0, 0, :7] = 1
    assert 0.07 * 100 > 7
    assert missed_rate(prediction, reference, 2, found_share=0.07).tolist() == [[0.0, 0.0]]


def test_nothing_to_miss_counts_0_and_an_empty_prediction_misses_all() -> None:
    prediction, reference = lesions()
    assert missed_rate(prediction, reference, 4).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert missed_rate(reference, prediction, 4).tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("found_share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(found_share: float) -> None:
    with pytest.raises(ValueError, match=r"expected found_share in \[0, 1\]"):
        missed_rate(*lesions(), 3, found_share=found_share)
