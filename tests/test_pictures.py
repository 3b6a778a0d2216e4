"""Pictures show the right slice, the right way up, in the right proportions."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from medrobust import charts, pictures
from medrobust.charts import dice_by_class
from medrobust.pictures import panel

NAMES = ["background", "liver", "spleen"]


def read(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png), format="png")


def case(size: tuple[int, ...] = (9, 8, 7)) -> list[Any]:
    image = np.zeros((1, *size), dtype=np.float32)
    label = np.zeros((1, *size), dtype=np.int64)
    return [image, image.copy(), label, label.copy(), label.copy()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the canvas."""
    seen: dict[str, Any] = {}
    draw = pictures._draw

    def spy(planes: Any, shown: Any, pixel: Any, names: Any, title: str, radiological: bool) -> bytes:
        seen.update(planes=planes, pixel=pixel, title=title)
        return draw(planes, shown, pixel, names, title, radiological)

    monkeypatch.setattr(pictures, "_draw", spy)
    return seen


def test_patients_right_is_on_the_left_and_anterior_is_up(drawn: dict[str, Any]) -> None:
    arrays = case()
    arrays[0][0, -1, -1, 3] = 1.0  # rightmost and most anterior voxel of a RAS array
    arrays[4][0, 0, 0, 3] = 1  # leftmost and most posterior
    panel(*arrays, spacing=(2.0, 3.0, 5.0), class_names=NAMES)
    image, *_, pred_adv = drawn["planes"]
    assert image.shape == (8, 9)
    assert np.argwhere(image == 1).tolist() == [[0, 0]]
    assert np.argwhere(pred_adv == 1).tolist() == [[7, 8]]
    assert drawn["pixel"] == (3.0, 2.0)


def test_as_stored_rows_stay_rows(drawn: dict[str, Any]) -> None:
    arrays = case((9, 8))
    arrays[0][0, 8, 0] = 1.0
    panel(*arrays, spacing=(2.0, 3.0), class_names=NAMES, radiological=False)
    assert np.argwhere(drawn["planes"][0] == 1).tolist() == [[8, 0]]
    assert drawn["pixel"] == (2.0, 3.0)


def test_slice_with_most_changed_voxels_then_most_anatomy(drawn: dict[str, Any]) -> None:
    arrays = case()
    arrays[2][0, 2:5, 2:5, 1] = 1
    panel(*arrays, class_names=NAMES, title="case a")
    assert drawn["title"] == "case a   slice 1"
    arrays[4][0, 3, 3, 5] = 2
    panel(*arrays, class_names=NAMES)
    assert drawn["title"] == "slice 5"


def test_tensors_and_arrays_give_the_same_bytes_every_time() -> None:
    arrays = case()
    arrays[1][0, 4, 4, 3] = 4 / 255
    tensors = [torch.from_numpy(array).requires_grad_(array.dtype == np.float32) for array in arrays]
    assert panel(*arrays, class_names=NAMES) == panel(*tensors, class_names=NAMES)


def test_magnification_and_share_changed_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    save = pictures.png
    monkeypatch.setattr(
        pictures, "png", lambda figure: titles.extend(axes.get_title() for axes in figure.axes) or save(figure)
    )
    arrays = case((10, 10))
    arrays[1][0, 0, 0] = 4 / 255
    arrays[4][0, 0, :5] = 1
    panel(*arrays, class_names=NAMES)
    assert titles[2] == "difference ×64, full colour ±4.0/255"
    assert titles[5] == "prediction, adversarial: 5.0% changed"


def test_what_the_reference_leaves_open_is_not_painted() -> None:
    arrays = case((10, 10))
    open_, liver = arrays[2].copy(), arrays[2].copy()
    open_[0, 3:6, 3:6], liver[0, 3:6, 3:6] = -1, 1
    background, ignored, painted = (
        panel(*arrays[:2], label, *arrays[3:], class_names=NAMES) for label in (arrays[2], open_, liver)
    )
    assert ignored == background
    assert painted != background


def test_wide_voxels_make_a_wide_picture() -> None:
    def ratio(spacing: tuple[float, float]) -> float:
        height, width, _ = read(panel(*case((20, 20)), spacing=spacing, class_names=NAMES)).shape
        return height / width

    assert ratio((1.0, 2.0)) > ratio((1.0, 1.0)) > ratio((2.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: np.zeros((1, 9, 8, 6))}, "five arrays of one shape"),
        ({4: np.full((1, 9, 8, 7), 3)}, "a name for each class up to 3, got 3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[int, np.ndarray], message: str) -> None:
    arrays = [change.get(k, array) for k, array in enumerate(case())]
    with pytest.raises(ValueError, match=message):
        panel(*arrays, class_names=NAMES)
    with pytest.raises(ValueError, match="spacing in mm as one positive number or 3"):
        panel(*case(), class_names=NAMES, spacing=(1.0, 1.0))


def test_dice_by_class_sorts_by_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    save = charts.png

    def spy(figure: Figure, legend: int) -> bytes:
        labels.extend(text.get_text() for text in figure.axes[0].get_yticklabels())
        return save(figure, legend)

    monkeypatch.setattr(charts, "png", spy)
    png = dice_by_class({"clean": {"liver": 0.9, "spleen": 0.8}, "PGD": {"liver": 0.1, "spleen": 0.4, "aorta": 0.2}})
    assert labels == ["liver", "aorta", "spleen"]
    assert read(png).ndim == 3
