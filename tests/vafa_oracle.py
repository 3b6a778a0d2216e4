"""The published VAFA and VAFA-2D loops (Hanif et al., MICCAI 2023) in float64 NumPy, block by block, by hand.

Written from the formulas alone, for clarity and not for speed. The gradient of the tables is derived by hand: the
adjoint of the orthonormal inverse DCT is the DCT, and d/dq [phi(c/q) q] = phi(u) - u phi'(u) with u = c/q. Only the
gradient of the network's loss in its input image comes from autograd. Sizes must be divisible by the block, as in the
published code. The published loop also ends when every voxel of the batch is wrong; this one takes all its steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

Array = NDArray[np.float64]
Index = tuple[int | slice, ...]
Model = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DICE_CE = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-6)
WINDOW = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * 1.5**2))
WINDOW /= WINDOW.sum()


@dataclass(frozen=True)
class Step:
    """What went into the model at one step, the tables that rendered it, and dL/dq of the loss that falls."""

    image_adv: Array
    q: Array
    gradient: Array


def phi(u: Array, alpha: float) -> Array:
    """Soft rounding (Gong et al. 2019, by way of AdvDrop); ``alpha`` 0 is rounding down from u + 1/2."""
    below = np.floor(u)
    if alpha == 0:
        return below + (u - below > 0.5)
    k, s = np.log(2 / alpha - 1), 1 / (1 - alpha)
    return below + (np.tanh(k * (u - below - 0.5)) * s + 1) / 2


def phi_prime(u: Array, alpha: float) -> Array:
    k, s = np.log(2 / alpha - 1), 1 / (1 - alpha)
    return k * s / 2 / np.cosh(k * (u - np.floor(u) - 0.5)) ** 2


def boxes(size: tuple[int, ...], block: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Non-overlapping boxes that tile ``size``, the first axis slowest."""
    starts = itertools.product(*(range(0, n, b) for n, b in zip(size, block, strict=True)))
    return [tuple(slice(at, at + b) for at, b in zip(start, block, strict=True)) for start in starts]


def tiles(shape: tuple[int, ...], block: tuple[int, ...]) -> list[tuple[Index, Index]]:
    """Pairs (index into q, index into the image), one per block: of a volume, or of each axial slice of one."""
    pairs: list[tuple[Index, Index]] = []
    for b, c in np.ndindex(*shape[:2]):
        if len(block) == len(shape) - 2:
            pairs += [((b, c, n), (b, c, *box)) for n, box in enumerate(boxes(shape[2:], block))]
        else:
            for d in range(shape[-1]):
                pairs += [((b, c, d, n), (b, c, *box, d)) for n, box in enumerate(boxes(shape[2:4], block))]
    return pairs


def tables(shape: tuple[int, ...], block: tuple[int, ...], value: float) -> Array:
    """Tables of one value: (B, C, N, *block), or (B, C, D, N, h, w) for 2-D blocks of a volume."""
    spatial = shape[2 : 2 + len(block)]
    n = int(np.prod([s // b for s, b in zip(spatial, block, strict=True)]))
    depth = shape[2 + len(block) :]
    return np.full((*shape[:2], *depth, n, *block), float(value))


def coefficients(image: Array, block: tuple[int, ...]) -> Array:
    """DCT coefficients of every block on the 0..255 scale, 128 taken off; laid out as ``tables``."""
    c = tables(image.shape, block, 0)
    for at_q, at_x in tiles(image.shape, block):
        c[at_q] = dctn(255 * image[at_x] - 128, norm="ortho")
    return c


def render(image: Array, q: Array, alpha: float, block: tuple[int, ...]) -> Array:
    """The image with its coefficients quantised by q, on the 0..255 scale, neither stretched nor clipped."""
    out = np.empty_like(image)
    c = coefficients(image, block)
    for at_q, at_x in tiles(image.shape, block):
        out[at_x] = idctn(phi(c[at_q] / q[at_q], alpha) * q[at_q], norm="ortho") + 128
    return out


def render_backward(image: Array, q: Array, alpha: float, block: tuple[int, ...], gradient: Array) -> Array:
    """dL/dq from dL/d(rendered image)."""
    out = np.empty_like(q)
    c = coefficients(image, block)
    for at_q, at_x in tiles(image.shape, block):
        u = c[at_q] / q[at_q]
        out[at_q] = dctn(gradient[at_x], norm="ortho") * (phi(u, alpha) - u * phi_prime(u, alpha))
    return out


def axial(shape: tuple[int, ...]) -> Iterator[Index]:
    """Indices of every (H, W) slice of every case and channel."""
    for b, c, *d in np.ndindex(*shape[:2], *shape[4:]):
        yield (b, c, slice(None), slice(None), *d)


def stretch(raw: Array) -> Array:
    """Every axial slice min-max stretched to [0, 1]."""
    out = np.empty_like(raw)
    for at in axial(raw.shape):
        low, high = raw[at].min(), raw[at].max()
        out[at] = (raw[at] - low) / (high - low)
    return out


def stretch_backward(raw: Array, gradient: Array) -> Array:
    """dL/d(raw) from dL/d(stretched); ties of a minimum or maximum share its gradient evenly."""
    out = np.empty_like(raw)
    for at in axial(raw.shape):
        r, g = raw[at], gradient[at]
        low, high = r.min(), r.max()
        a, span = (r - low) / (high - low), high - low
        to_low = (g * (a - 1)).sum() / span
        to_high = -(g * a).sum() / span
        out[at] = g / span + to_low * (r == low) / (r == low).sum() + to_high * (r == high) / (r == high).sum()
    return out


def smooth(x: Array) -> Array:
    """3-tap Gaussian window along every axis, no padding: each axis loses two."""
    out = np.zeros([n - 2 for n in x.shape])
    for offset in itertools.product(range(3), repeat=x.ndim):
        weight = np.prod([WINDOW[o] for o in offset])
        out += weight * x[tuple(slice(o, o + n - 2) for o, n in zip(offset, x.shape, strict=True))]
    return out


def smooth_adjoint(y: Array) -> Array:
    out = np.zeros([n + 2 for n in y.shape])
    for offset in itertools.product(range(3), repeat=y.ndim):
        weight = np.prod([WINDOW[o] for o in offset])
        out[tuple(slice(o, o + n) for o, n in zip(offset, y.shape, strict=True))] += weight * y
    return out


def ssim_and_gradient(x: Array, y: Array) -> tuple[float, Array]:
    """Mean SSIM of one block y against x, intensities in [0, 1], and its gradient in y."""
    c1, c2 = 0.01**2, 0.03**2
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    top1, bottom1, top2, bottom2 = 2 * mx * my + c1, mx**2 + my**2 + c1, 2 * vxy + c2, vx + vy + c2
    luminance, contrast = top1 / bottom1, top2 / bottom2
    ssim = luminance * contrast
    by_vy, by_vxy = -ssim / bottom2, luminance * 2 / bottom2
    by_my = contrast * (2 * mx - luminance * 2 * my) / bottom1 - 2 * my * by_vy - mx * by_vxy
    gradient = smooth_adjoint(by_my) + 2 * y * smooth_adjoint(by_vy) + x * smooth_adjoint(by_vxy)
    return float(ssim.mean()), gradient / ssim.size


def ssim_loss_and_gradient(image: Array, image_adv: Array, block: tuple[int, ...]) -> tuple[float, Array]:
    """1 - mean over the blocks of max(SSIM, 0), and its gradient in image_adv."""
    pairs = tiles(image.shape, block)
    total, gradient = 0.0, np.zeros_like(image_adv)
    for _, at in pairs:
        value, slope = ssim_and_gradient(image[at], image_adv[at])
        if value > 0:
            total += value / len(pairs)
            gradient[at] = -slope / len(pairs)
    return 1 - total, gradient


def model_loss_and_gradient(model: Model, image: Array, label: torch.Tensor, loss: Loss) -> tuple[float, Array]:
    leaf = torch.from_numpy(image.copy()).requires_grad_()
    value = loss(model(leaf), label)
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient.numpy()


def loss_and_gradient(
    model: Model,
    image: Array,
    label: torch.Tensor,
    q: Array,
    alpha: float,
    block: tuple[int, ...],
    *,
    loss: Loss = DICE_CE,
    ssim_weight: float = 0.0,
    targeted: bool = False,
    stretched: bool = True,
) -> tuple[float, Array, Array]:
    """The loss that the attack lowers, its gradient in q, and the image that went into the model.

    ``stretched=False`` clips to [0, 1] where the published code stretches.
    """
    raw = render(image, q, alpha, block)
    image_adv = stretch(raw) if stretched else np.clip(raw / 255, 0, 1)
    sign = 1 if targeted else -1
    value, gradient = model_loss_and_gradient(model, image_adv, label, loss)
    value, gradient = sign * value, sign * gradient
    if ssim_weight:
        ssim_value, ssim_gradient = ssim_loss_and_gradient(image, image_adv, block)
        value, gradient = value + ssim_weight * ssim_value, gradient + ssim_weight * ssim_gradient
    gradient = stretch_backward(raw, gradient) if stretched else gradient * (raw == np.clip(raw, 0, 255)) / 255
    return value, render_backward(image, q, alpha, block, gradient), image_adv


def published(
    model: Model,
    image: torch.Tensor,
    label: torch.Tensor,
    *,
    block: tuple[int, ...],
    steps: int,
    q_max: float = 20.0,
    q_min: float = 5.0,
    step_size: float = 1.0,
    ssim_weight: float = 0.0,
    targeted: bool = False,
) -> Iterator[Step]:
    """Steps 0 .. steps - 1 of the published loop. image (B, C, H, W[, D]) float64 in [0, 1]; block of 2 or 3 sizes."""
    x = image.numpy()
    q = tables(x.shape, block, q_max)
    for i in range(steps):
        alpha = 0.1 * (1 - i / steps)
        _, gradient, image_adv = loss_and_gradient(
            model, x, label, q, alpha, block, ssim_weight=ssim_weight, targeted=targeted
        )
        yield Step(image_adv, q, gradient)
        q = np.clip(q - step_size * np.sign(gradient), q_min, q_max)


def toy_network(in_channels: int, out_channels: int, spatial_dims: int, seed: int = 0) -> torch.nn.Module:
    """A fixed smooth random float64 network whose logits depend on each voxel's neighbourhood."""
    generator = torch.Generator().manual_seed(seed)
    conv: type[torch.nn.Module] = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[spatial_dims]
    network = torch.nn.Sequential(
        conv(in_channels, 6, 3, padding=1), torch.nn.Tanh(), conv(6, out_channels, 3, padding=1)
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return network.eval()


def toy_case(
    *shape: int, classes: int = 3, seed: int = 1, low: float = 0.0, high: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random float64 image of ``shape`` (B, C, *S) within [low, high], and a random label (B, 1, *S)."""
    generator = torch.Generator().manual_seed(seed)
    image = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return image, torch.randint(0, classes, (shape[0], 1, *shape[2:]), generator=generator)


def assert_follows(steps_taken: Iterator[object], steps_published: Iterator[Step], steps: int) -> None:
    """Both take ``steps`` steps with the same images and the same tables.

    A table may differ by chance only where its gradient vanished in some earlier step.
    """
    doubtful, moved, taken = False, 0, 0
    for ours, theirs in zip(steps_taken, steps_published, strict=True):
        image_adv, q = (getattr(ours, name).detach().double().numpy() for name in ("image_adv", "q"))
        assert q.shape == theirs.q.shape
        np.testing.assert_allclose(image_adv, theirs.image_adv, rtol=0, atol=1e-5)
        differs = (q != theirs.q) & ~np.asarray(doubtful)
        assert not differs.any(), f"{differs.sum()} of {q.size} table entries differ at step {taken}"
        moved += int((theirs.q != theirs.q.max()).sum())
        doubtful = doubtful | (np.abs(theirs.gradient) < 1e-7 * np.abs(theirs.gradient).max())
        taken += 1
    assert taken == steps
    assert np.mean(doubtful) < 0.01
    assert moved > 0
