"""Bind a network to its inferer: one model, image -> logits, that attacks can differentiate at one window's memory.

A volume is usually segmented by overlapping windows whose logits are blended. To attack what is deployed, the gradient
has to pass through that blending; plain autograd keeps the activations of every window for it. Here the backward pass
recomputes them window by window: the same gradient to rounding, at the memory of one batch of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Index = tuple[Any, ...]
"""Where something lies in a tensor."""


def bind(network: nn.Module, inferer: Inferer | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """A module ``image (B, C, *S) -> logits (B, K, *S)`` that does what ``inferer(image, network)`` does.

    Args:
        network: the bare network (not wrapped for distributed training).
        inferer: MONAI's. A plain sliding window becomes :class:`WindowModel`, exact and at one window's memory. Any
            other inferer is called as it is, its network recomputed in the backward pass. ``None``: no inferer.
        args, kwargs: further arguments of the network, such as a prompt; bound once, the same for every window.
    """
    if inferer is None or type(inferer) is SimpleInferer:
        return BoundModel(network, lambda image, predictor: predictor(image), args, kwargs)
    if type(inferer) is SlidingWindowInferer and not (inferer.with_coord or inferer.device or inferer.sw_device):
        return WindowModel.of(network, inferer, *args, **kwargs)
    return BoundModel(network, lambda image, predictor: inferer(image, _Recomputed(predictor)), args, kwargs)


class BoundModel(nn.Module):
    """A network with an inferer and arguments attached to it."""

    def __init__(
        self, network: nn.Module, inferer: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network = network
        self.inferer = inferer
        self.args, self.kwargs = args, kwargs

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *S) -> (B, K, *S)."""
        return cast(Tensor, self.inferer(image, lambda x: self.network(x, *self.args, **self.kwargs)))


class _Recomputed:
    """A predictor that keeps no activations; its output is a copy, for inferers multiply it in place."""

    def __init__(self, predictor: Callable[..., Any]) -> None:
        self.predictor = predictor

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = checkpoint(self.predictor, x, *args, use_reentrant=False, **kwargs)
        return out.clone() if isinstance(out, Tensor) else out


class WindowModel(nn.Module):
    """Sliding-window inference whose backward pass recomputes one batch of windows at a time.

    Forward values are those of MONAI's ``sliding_window_inference``, summed in the image's precision. The gradient is
    that of full autograd through the blended logits, with respect to the image only: windows whose share of the
    upstream gradient is zero are skipped. Volumes smaller than a window are padded and cropped back.

    Args:
        network: the bare network.
        roi_size: window, one size per spatial axis; sizes below 1 mean the whole axis.
        sw_batch_size: windows in one call of the network.
        overlap: share of a window that the next one covers, in [0, 1), one for all axes or one per axis.
        mode: ``"constant"`` or ``"gaussian"`` weights when windows are blended.
        sigma_scale: width of the Gaussian, relative to the window.
        padding_mode, cval: how a volume smaller than a window is continued, as in ``torch.nn.functional.pad``.
        args, kwargs: further arguments of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        roi_size: Sequence[int] | int,
        *args: Any,
        sw_batch_size: int = 1,
        overlap: float | Sequence[float] = 0.5,
        mode: str = "gaussian",
        sigma_scale: float | Sequence[float] = 0.125,
        padding_mode: str = "constant",
        cval: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.network = network
        self.roi_size = roi_size
        self.args, self.kwargs = args, kwargs
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.mode = str(mode)
        self.sigma_scale = sigma_scale
        self.padding_mode, self.cval = str(padding_mode), cval

    @classmethod
    def of(cls, network: nn.Module, inferer: SlidingWindowInferer, *args: Any, **kwargs: Any) -> WindowModel:
        """The same windows as MONAI's inferer."""
        model = cls(
            network,
            inferer.roi_size,
            *args,
            sw_batch_size=inferer.sw_batch_size,
            overlap=inferer.overlap,
            mode=inferer.mode,
            sigma_scale=inferer.sigma_scale,
            padding_mode=inferer.padding_mode,
            cval=inferer.cval,
        )
        model.kwargs = kwargs
        return model

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *S) -> blended logits (B, K, *S).

        Raises:
            ValueError: several cases, and an argument with a row for each.
            RuntimeError: parameters of the network require gradients; they would not get any here.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.network.parameters()):
            if image.requires_grad:
                raise RuntimeError(
                    "expected frozen parameters when differentiating a WindowModel, got parameters that require "
                    "gradients: only the image gets one here. Attacks freeze them; train on patches instead"
                )
            with torch.no_grad():
                return self._blend(image.as_subclass(Tensor))
        return cast(Tensor, _Blend.apply(image.as_subclass(Tensor), self))

    def _blend(self, image: Tensor) -> Tensor:
        """Weighted mean of the windows' logits."""
        self._check_arguments(len(image))
        padded, inner = self._pad(image)
        weight, count = self._weights(padded)
        total: Tensor | None = None
        for places in self._batches(padded):
            logits = self._predict(padded, places)
            if total is None:
                total = padded.new_zeros(padded.shape[0], logits.shape[1], *padded.shape[2:])
            for window, place in zip(logits, places, strict=True):
                total[place] += window * weight
        assert total is not None
        return (total / count)[inner]

    def _vjp(self, image: Tensor, upstream: Tensor) -> Tensor:
        """Gradient of ``sum(upstream * logits)`` with respect to the image, one batch of windows at a time."""
        padded, inner = self._pad(image)
        weight, count = self._weights(padded)
        spread = upstream.new_zeros(*upstream.shape[:2], *padded.shape[2:])
        spread[inner] = upstream
        spread /= count
        gradient = torch.zeros_like(padded)
        for places in self._batches(padded):
            live = [place for place in places if spread[place].any()]
            if not live:
                continue
            windows = self._cut(padded, live).requires_grad_()
            with torch.enable_grad():
                logits = self.network(windows, *self.args, **self.kwargs)
                seen = torch.stack([spread[place] for place in live]) * weight
                (part,) = torch.autograd.grad(logits, windows, seen.to(logits.dtype))
            for window, place in zip(part, live, strict=True):
                gradient[place] += window
        if gradient.shape == image.shape:
            return gradient
        if self.padding_mode == "constant":
            return gradient[inner]
        with torch.enable_grad():  # repeated voxels hand their gradient back to where they came from
            source = image.detach().requires_grad_()
            return torch.autograd.grad(self._pad(source)[0], source, gradient)[0]

    def _check_arguments(self, cases: int) -> None:
        for value in (*self.args, *self.kwargs.values()):
            if cases > 1 and isinstance(value, Tensor) and value.ndim and len(value) == cases:
                raise ValueError(
                    f"expected arguments that are the same for all windows, got a tensor {tuple(value.shape)} beside "
                    f"{cases} cases: a window would get another case's. Take one case at a time"
                )

    def _predict(self, padded: Tensor, places: list[Index]) -> Tensor:
        logits = self.network(self._cut(padded, places), *self.args, **self.kwargs)
        if not isinstance(logits, Tensor) or logits.shape[2:] != self._window(padded):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"expected logits of the window's size {self._window(padded)}, got {got}: bind one output")
        return logits

    @staticmethod
    def _cut(padded: Tensor, places: list[Index]) -> Tensor:
        return torch.stack([padded[place] for place in places])

    def _window(self, image: Tensor) -> tuple[int, ...]:
        roi = [self.roi_size] * (image.ndim - 2) if isinstance(self.roi_size, int) else list(self.roi_size)
        if len(roi) != image.ndim - 2:
            raise ValueError(f"expected one window size per spatial axis of {tuple(image.shape)}, got {roi}")
        return tuple(r if r and r > 0 else s for r, s in zip(roi, image.shape[2:], strict=True))

    def _pad(self, image: Tensor) -> tuple[Tensor, Index]:
        """The image, at least one window large, and where the original lies in it."""
        padding: list[int] = []
        inner: list[Any] = []
        for size, roi in zip(reversed(image.shape[2:]), reversed(self._window(image)), strict=True):
            missing = max(roi - size, 0)
            padding += [missing // 2, missing - missing // 2]
            inner.insert(0, slice(missing // 2, missing // 2 + size))
        if any(padding):
            cval = {"value": self.cval} if self.padding_mode == "constant" else {}
            image = F.pad(image, padding, mode=self.padding_mode, **cval)
        return image, (..., *inner)

    def _batches(self, padded: Tensor) -> Iterator[list[Index]]:
        """Windows in MONAI's order, ``sw_batch_size`` at a time."""
        roi, size = self._window(padded), padded.shape[2:]
        overlap = [self.overlap] * len(roi) if isinstance(self.overlap, float | int) else list(self.overlap)
        interval = [r if r == s else max(int(r * (1 - o)), 1) for r, s, o in zip(roi, size, overlap, strict=True)]
        slices = dense_patch_slices(size, roi, interval)
        places: list[Index] = [(case, slice(None), *place) for case in range(padded.shape[0]) for place in slices]
        for start in range(0, len(places), self.sw_batch_size):
            yield places[start : start + self.sw_batch_size]

    def _weights(self, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Importance of a window's voxels (*roi), and its sum over all windows (*S)."""
        roi = self._window(padded)
        weight = compute_importance_map(roi, self.mode, self.sigma_scale, padded.device, padded.dtype)
        count = padded.new_zeros(padded.shape[2:])
        for places in self._batches(padded[:1]):
            for place in places:
                count[place[2:]] += weight
        return weight, count


class _Blend(torch.autograd.Function):
    """Sliding-window inference as one differentiable operation of the image."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, model: WindowModel) -> Tensor:
        ctx.model = model
        ctx.autocast = _autocast_of(image)
        ctx.save_for_backward(image)
        return model._blend(image)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (image,) = ctx.saved_tensors
        with ctx.autocast():
            return ctx.model._vjp(image, upstream), None


def _autocast_of(image: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """The mixed-precision state of now, to be entered again in the backward pass."""
    kind = image.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
