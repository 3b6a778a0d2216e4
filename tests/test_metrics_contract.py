"""What every metric promises, whatever its name, and the adapter to MONAI and Ignite."""

import math

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from torch import Tensor

from medrobust import metrics
from medrobust.metrics import FunctionMetric
from medrobust.metrics.dice import dice
from medrobust.metrics.flip_rate import flip_rate

CLASSES = 4
COLUMNS = dict.fromkeys(("dice", "iou", "hd95", "missed_rate", "nsd", "volume_error"), CLASSES)
SETTINGS = {
    "dice": {"num_classes": CLASSES},
    "iou": {"num_classes": CLASSES},
    "hd95": {"num_classes": CLASSES, "spacing": 1.5},
    "missed_rate": {"num_classes": CLASSES, "found_share": 0.9},
    "nsd": {"num_classes": CLASSES, "spacing": 1.5},
    "volume_error": {"num_classes": CLASSES},
    "dice_as_published": {"num_classes": CLASSES},
    "hd95_as_published": {"num_classes": CLASSES},
    "lpips": {"network": lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))},
}
SIZES = [(12, 10), (8, 7, 6)]


def pair(name: str, size: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if metrics.about(name).inputs == "images":
        a, b = torch.rand((2, 3, 1, *size), generator=generator)
        return a, b
    a, b = torch.randint(0, CLASSES, (2, 3, 1, *size), generator=generator)
    a[0][a[0] == 1] = 0  # case 0 misses class 1, case 1 invents class 2, case 2 holds no class 3 at all
    b[1][b[1] == 2] = 0
    a[2][a[2] == 3], b[2][b[2] == 3] = 0, 0
    return a, b


def call(name: str, prediction: Tensor, reference: Tensor) -> Tensor:
    return metrics.load(name)(prediction, reference, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
@pytest.mark.parametrize("name", metrics.names())
class TestEveryMetric:
    def test_shape_type_and_no_nan(self, name: str, size: tuple[int, ...]) -> None:
        value = call(name, *pair(name, size))
        assert value.shape == (3, COLUMNS.get(name, 1))
        assert value.dtype == torch.float32
        assert not value.isnan().any()

    def test_a_case_alone_is_the_case_in_a_batch(self, name: str, size: tuple[int, ...]) -> None:
        a, b = pair(name, size)
        alone = torch.cat([call(name, a[k : k + 1], b[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(call(name, a, b), alone, rtol=1e-6, atol=1e-6)

    def test_a_perfect_match_is_ideal_and_anything_else_is_worse(self, name: str, size: tuple[int, ...]) -> None:
        a, b = pair(name, size)
        about = metrics.about(name)
        assert call(name, b, b.clone()).eq(about.ideal).all()
        value = call(name, a, b)[:, 0].abs()  # an error of either sign is one
        assert (value < about.ideal if about.higher_is_better else value > about.ideal).all()

    def test_inputs_are_left_alone_and_metadata_is_dropped(self, name: str, size: tuple[int, ...]) -> None:
        a, b = pair(name, size)
        meta_a, meta_b = MetaTensor(a.clone()), MetaTensor(b.clone())
        value = call(name, meta_a, meta_b)
        assert type(value) is Tensor
        torch.testing.assert_close(value, call(name, a, b))
        assert torch.equal(meta_a.as_tensor(), a)
        assert torch.equal(meta_b.as_tensor(), b)

    def test_different_shapes_are_refused(self, name: str, size: tuple[int, ...]) -> None:
        a, b = pair(name, size)
        with pytest.raises(ValueError, match="of one shape"):
            call(name, a, b[..., :-1])


@pytest.mark.parametrize("name", [name for name in metrics.names() if metrics.about(name).inputs == "classes"])
def test_what_is_no_class_map_is_refused(name: str) -> None:
    a, b = pair(name, (6, 5))
    with pytest.raises(ValueError, match=r"expected prediction as class indices .* argmax"):
        call(name, a.expand(-1, 2, -1, -1), b.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="whole class indices in prediction, got fractions"):
        call(name, a + 0.5, b)
    with pytest.raises(ValueError, match=r"expected classes from 0.* in prediction, got -1"):
        call(name, a - 1, b)


@pytest.mark.parametrize("name", ["dice", "iou", "volume_error", "missed_rate", "hd95", "nsd"])
def test_voxels_labelled_minus_one_have_no_say(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randint(0, 3, (2, 2, 1, 7, 9), generator=generator)
    ignored = torch.rand(b.shape, generator=generator) < 0.3
    found = metrics.load(name)(a, b.masked_fill(ignored, -1), 3)
    if name in ("hd95", "nsd", "missed_rate"):  # what looks at neighbours sees background there
        expected = metrics.load(name)(a.masked_fill(ignored, 0), b.masked_fill(ignored, 0), 3)
        torch.testing.assert_close(found[:, 1:], expected[:, 1:])
    else:
        for case in range(2):
            left = ~ignored[case]
            expected = metrics.load(name)(a[case][left].view(1, 1, 1, -1), b[case][left].view(1, 1, 1, -1), 3)
            torch.testing.assert_close(found[case], expected[0])
    with pytest.raises(ValueError, match=r"and -1 for voxels without a say in reference, got -2"):
        metrics.load(name)(a, b - 2, 3)


def test_a_class_beyond_num_classes_is_refused() -> None:
    a, b = pair("dice", (6, 5))
    with pytest.raises(ValueError, match=r"from 0 to 2 in prediction, got 0 to 3; correct num_classes"):
        dice(a, b, 3)


def test_names_and_unknown_names() -> None:
    assert {"dice", "hd95", "ssim", "psnr", "linf", "l2", "flip_rate", "lpips"} <= set(metrics.names())
    with pytest.raises(ValueError, match=r"expected a metric among .*dice.*, got 'jaccard'"):
        metrics.load("jaccard")


def test_status_has_a_word_for_each_of_the_four_cases() -> None:
    prediction = torch.tensor([[0, 1, 3, 3], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    reference = torch.tensor([[0, 1, 2, 2], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    assert metrics.status(prediction, reference, 5) == [
        ["ok", "ok", "missed", "invented", "both empty"],
        ["invented", "missed", "both empty", "both empty", "both empty"],
    ]


def test_adapter_accumulates_cases_as_batches_and_as_lists() -> None:
    a, b = pair("dice", (8, 7))
    expected = dice(a, b, CLASSES)[:, 1:]
    metric = FunctionMetric(dice, num_classes=CLASSES, include_background=False)
    metric(a[:2], b[:2])
    metric([a[2]], [b[2]])
    torch.testing.assert_close(metric.get_buffer(), expected)
    assert metric.aggregate().item() == pytest.approx(expected.mean(1).mean().item())
    torch.testing.assert_close(metric.aggregate("mean_batch"), expected.mean(0))
    metric.reset()
    with pytest.raises(ValueError, match="at least one case"):
        metric.aggregate()


def test_adapter_refuses_a_missing_reference_and_a_background_that_is_not_there() -> None:
    a, b = pair("flip_rate", (8, 7))
    with pytest.raises(ValueError, match="got a prediction alone"):
        FunctionMetric(flip_rate)(a)
    with pytest.raises(ValueError, match="column for each class"):
        FunctionMetric(flip_rate, include_background=False)(a, b)


def test_ignite_handler_reports_the_mean_and_every_case() -> None:
    a, b = pair("dice", (8, 7))
    engine = Engine(lambda engine, batch: batch)
    handler = IgniteMetricHandler(FunctionMetric(dice, num_classes=CLASSES), output_transform=lambda output: output)
    handler.attach(engine, "dice")
    engine.run([(a[:1], b[:1]), (a[1:], b[1:])])
    expected = dice(a, b, CLASSES)
    assert math.isclose(engine.state.metrics["dice"], expected.mean().item(), rel_tol=1e-6)
    torch.testing.assert_close(engine.state.metric_details["dice"], expected)
