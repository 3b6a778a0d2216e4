"""How LPIPS cuts a volume into slices; the network itself is a stand-in whose distance is known."""

import sys

import pytest
import torch
from torch import Tensor

from medrobust.metrics.lpips import SLICES_AT_ONCE, lpips


class StandIn:
    """Mean absolute difference of each slice, in the shape of the package's own answer."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen.append((a, b))
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_mean_over_axial_slices_mapped_to_minus_one_to_one() -> None:
    depth = SLICES_AT_ONCE + 3
    image = torch.rand((2, 1, 5, 4, depth), generator=torch.Generator().manual_seed(0))
    network = StandIn()
    value = lpips(image, torch.zeros_like(image), network)
    torch.testing.assert_close(value, 2 * image.mean(dim=(2, 3, 4)))  # |(2x - 1) - (-1)| = 2x
    assert [len(a) for a, _ in network.seen] == [SLICES_AT_ONCE, 3] * 2
    first, zero = network.seen[0]
    assert first.shape[1:] == (3, 5, 4)
    assert (zero == -1).all()
    for channel in range(3):
        torch.testing.assert_close(first[2, channel], 2 * image[0, 0, :, :, 2] - 1)


def test_two_dimensions_and_colours() -> None:
    image = torch.rand((2, 3, 6, 5), generator=torch.Generator().manual_seed(0))
    network = StandIn()
    lpips(image, image, network)
    torch.testing.assert_close(network.seen[1][0], 2 * image[1:] - 1)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 or 3 channels, got 2"):
        lpips(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), StandIn())


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install 'medrobust\[lpips\]'"):
        lpips(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
