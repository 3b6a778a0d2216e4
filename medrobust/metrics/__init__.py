"""Metrics: pure functions ``name(prediction, reference, ...) -> (B, C)``, one a file, and one adapter to MONAI.

Every file states ``IDEAL`` (the value of a perfect match), ``HIGHER_IS_BETTER``, ``UNIT`` and ``INPUTS``: "classes" for
integer class maps ``(B, 1, *S)``, "images" for images ``(B, C, *S)`` in [0, 1]. No metric returns NaN.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from torch import Tensor

from medrobust.metrics._class_maps import Status, status

__all__ = ["About", "FunctionMetric", "Status", "about", "load", "names", "status"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a metric's file says about it."""

    ideal: float
    higher_is_better: bool
    unit: str
    inputs: Literal["classes", "images"]


def names() -> tuple[str, ...]:
    """Every metric's name, sorted: the public files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Callable[..., Tensor]:
    """The metric function of this name, imported now."""
    return getattr(_module(name), name)


def about(name: str) -> About:
    """Ideal value, direction, unit and kind of inputs of the metric of this name."""
    module = _module(name)
    return About(ideal=module.IDEAL, higher_is_better=module.HIGHER_IS_BETTER, unit=module.UNIT, inputs=module.INPUTS)


def _module(name: str) -> Any:
    if name not in names():
        raise ValueError(f"expected a metric among {', '.join(names())}, got {name!r}")
    return import_module(f"{__name__}.{name}")


class FunctionMetric(CumulativeIterationMetric):
    """A metric function as MONAI's ``CumulativeIterationMetric``, so ``monai.handlers.IgniteMetricHandler`` takes it.

    ``settings`` go to every call of ``function``. ``include_background=False`` drops column 0, for metrics of class
    maps. ``reduction`` is MONAI's; "mean" is over the classes of a case first, then over cases.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        include_background: bool = True,
        reduction: str = "mean",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.function = function
        self.include_background = include_background
        self.reduction = reduction
        self.settings = settings

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        if y is None:
            raise ValueError("expected a prediction and a reference, got a prediction alone; pass both")
        value = self.function(y_pred, y, **(self.settings | kwargs))
        if self.include_background:
            return value
        if value.shape[1] < 2:
            raise ValueError(
                f"expected a column for each class to drop the background from, got shape {tuple(value.shape)}; "
                "leave include_background=True for metrics with one number a case"
            )
        return value[:, 1:]

    def aggregate(self, reduction: str | None = None) -> Tensor:
        """All cases seen since ``reset``, reduced."""
        values = self.get_buffer()
        if values is None:
            raise ValueError("expected at least one case before aggregate(), got none; call the metric first")
        return do_metric_reduction(values, reduction or self.reduction)[0]
