"""The window-wise model gives MONAI's values and full autograd's gradient."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from medrobust.attacks.base import frozen
from medrobust.inferers import WindowModel, bind


def network(spatial_dims: int = 3, last: nn.Module | None = None) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    net = nn.Sequential(conv(1, 4, 3, padding=1), nn.InstanceNorm3d(4) if spatial_dims == 3 else nn.Tanh(), nn.Tanh())
    net.append(conv(4, 3, 3, padding=1))
    if last is not None:
        net.append(last)
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return net


CASES = [
    {"roi_size": (8, 8, 8), "sw_batch_size": 1, "overlap": 0.5, "mode": "gaussian"},
    {"roi_size": (8, 8, 8), "sw_batch_size": 3, "overlap": 0.25, "mode": "constant"},
    {"roi_size": (8, 8, 8), "sw_batch_size": 4, "overlap": (0.5, 0.25, 0.0), "mode": "gaussian"},
    {"roi_size": (24, 8, 16), "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian"},
    {"roi_size": (24, 16, 16), "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian", "padding_mode": "replicate"},
    {"roi_size": (16, 14, 12), "sw_batch_size": 2, "overlap": 0.5, "mode": "constant", "cval": 0.3},
    {"roi_size": (8, -1, 8), "sw_batch_size": 2, "overlap": 0.5, "mode": "constant"},
]


@pytest.mark.parametrize("settings", CASES)
def test_values_and_gradient_equal_full_autograd(settings: dict) -> None:
    net = network()
    image = torch.rand(2, 1, 17, 13, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inferer = SlidingWindowInferer(**settings)
    upstream = torch.randn(2, 3, 17, 13, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with frozen(net):
        full = image.clone().requires_grad_()
        logits = inferer(full, net)
        (expected,) = torch.autograd.grad((logits * upstream).sum(), full)
        ours = image.clone().requires_grad_()
        model = bind(net, inferer)
        assert isinstance(model, WindowModel)
        got = model(ours)
        (gradient,) = torch.autograd.grad((got * upstream).sum(), ours)
    torch.testing.assert_close(got, logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


def test_float32_gradient_within_the_promised_tolerance() -> None:
    net = network().float()
    image = torch.rand(1, 1, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer(roi_size=(8, 8, 8), sw_batch_size=4, overlap=0.5, mode="gaussian")
    with frozen(net):
        full, ours = image.clone().requires_grad_(), image.clone().requires_grad_()
        (expected,) = torch.autograd.grad(inferer(full, net).square().sum(), full)
        (gradient,) = torch.autograd.grad(bind(net, inferer)(ours).square().sum(), ours)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_two_dimensions() -> None:
    net = network(2)
    image = torch.rand(1, 1, 19, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inferer = SlidingWindowInferer(roi_size=(8, 8), sw_batch_size=2, overlap=0.5, mode="gaussian")
    with frozen(net):
        full, ours = image.clone().requires_grad_(), image.clone().requires_grad_()
        (expected,) = torch.autograd.grad(inferer(full, net).square().sum(), full)
        (gradient,) = torch.autograd.grad(bind(net, inferer)(ours).square().sum(), ours)
    torch.testing.assert_close(gradient, expected)


def test_networks_that_end_in_an_activation() -> None:
    """MONAI weights the network's output in place, which breaks autograd for a final sigmoid."""
    net = network(last=nn.Sigmoid())
    image = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inferer = SlidingWindowInferer(roi_size=(8, 8, 8), sw_batch_size=2, overlap=0.5)
    with frozen(net):
        probe = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(bind(net, inferer)(probe).sum(), probe)
        step = 1e-5
        moved = image.clone()
        moved[0, 0, 5, 6, 7] += step
        slope = (bind(net, inferer)(moved).sum() - bind(net, inferer)(image).sum()) / step
    assert gradient[0, 0, 5, 6, 7].item() == pytest.approx(slope.item(), rel=1e-3)


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.windows = 0
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += len(x)
        self.largest = max(self.largest, len(x))
        return self.inner(x)


def test_windows_without_upstream_gradient_are_skipped() -> None:
    net = Counting(network())
    model = WindowModel(net, (8, 8, 8), sw_batch_size=2, overlap=0.0)
    image = torch.rand(1, 1, 32, 8, 8, dtype=torch.float64).requires_grad_()
    with frozen(model):
        value = model(image)[:, :, :8].sum()
        assert net.windows == 4
        torch.autograd.grad(value, image)
    assert net.windows == 5
    assert net.largest == 2


def test_parameters_that_want_gradients_are_refused() -> None:
    model = WindowModel(network(), (8, 8, 8))
    with pytest.raises(RuntimeError, match="expected frozen parameters"):
        model(torch.rand(1, 1, 8, 8, 8, dtype=torch.float64).requires_grad_())


def test_wrong_number_of_window_sizes() -> None:
    with pytest.raises(ValueError, match="one window size per spatial axis"):
        WindowModel(network(), (8, 8))(torch.rand(1, 1, 8, 8, 8, dtype=torch.float64))


def test_arguments_reach_the_network() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float, *, shift: float) -> Tensor:
            return x * factor + shift

    image = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for inferer in (None, SimpleInferer(), SlidingWindowInferer((4, 4, 4), overlap=0.5)):
        torch.testing.assert_close(bind(Scaled(), inferer, 2.0, shift=1.0)(image), image * 2 + 1)


def test_an_argument_of_each_case_does_not_reach_another_case() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x + shift[:, None, None]

    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((4, 4), sw_batch_size=2, overlap=0.5)
    each = torch.tensor([[1.0], [5.0]])
    with pytest.raises(ValueError, match=r"the same for all windows, got a tensor \(2, 1\) beside 2 cases"):
        bind(Shifted(), inferer, each)(image)
    for case in range(2):
        one = slice(case, case + 1)
        torch.testing.assert_close(bind(Shifted(), inferer, each[one])(image[one]), image[one] + each[case])


def test_windows_are_summed_in_the_precision_of_the_image() -> None:
    """Else many overlapping windows would add up their rounding."""
    net = network(2).float()
    image = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((8, 8), sw_batch_size=4, overlap=0.75, mode="gaussian")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = inferer(image, lambda window: net(window).float()), bind(net, inferer)(image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_inferers_are_called_as_they_are() -> None:
    net = network(2)
    inferer = SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2, overlap=0.5)
    image = torch.rand(1, 1, 8, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with frozen(net):
        full, ours = image.clone().requires_grad_(), image.clone().requires_grad_()
        (expected,) = torch.autograd.grad(inferer(full, net).square().sum(), full)
        (gradient,) = torch.autograd.grad(bind(net, inferer)(ours).square().sum(), ours)
    torch.testing.assert_close(gradient, expected)


def test_mixed_precision_state_is_the_same_in_both_passes() -> None:
    """A backward pass outside autocast must recompute what the forward pass inside computed."""
    net = network().float()
    image = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    with frozen(net):
        seen: list[torch.dtype] = []
        net.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        probe = image.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = WindowModel(net, (8, 8, 8))(probe).float().sum()
        torch.autograd.grad(value, probe)
    assert set(seen) == {torch.bfloat16}
