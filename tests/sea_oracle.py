"""APGD and red-eps for segmentation (Croce et al., ECCV 2024) and their losses, in float64 NumPy, by hand.

Written from the formulas alone, for clarity and not for speed. Every loss takes logits (B, K, *S) (K = 1 is one sigmoid
channel) and labels (B, 1, *S) with -1 for ignored pixels, and returns its value per case, the sum over the pixels that
count divided by the number of all pixels, and dL/dlogits of the sum over cases. Only the gradient of the logits in the
image comes from autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Label = NDArray[np.int64]
Valued = tuple[Array, Array]
Loss = Callable[[Array, Label], Valued]
Score = Callable[[Array, Label], Array]

LOG2 = np.log(2)


class Pixels(NamedTuple):
    """All (B, 1, *S) but ``p`` (a channel a class, two for a sigmoid) and ``dce`` (d CE / d logits, as the logits)."""

    valid: Mask
    y: Label
    pred: Label
    correct: Mask
    log_py: Array
    p: Array
    dce: Array


def pixels(logits: Array, label: Label) -> Pixels:
    valid = label != -1
    y = np.where(valid, label, 0)
    pred = predict(logits)
    correct = valid & (pred == y)
    if logits.shape[1] == 1:
        s = 2 * y - 1
        log_py = -np.logaddexp(0, -s * logits)
        p = np.exp(np.concatenate([-np.logaddexp(0, logits), -np.logaddexp(0, -logits)], axis=1))
        return Pixels(valid, y, pred, correct, log_py, p, -s * np.exp(-np.logaddexp(0, s * logits)))
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    return Pixels(valid, y, pred, correct, np.take_along_axis(log_p, y, 1), p, p - one_hot(y, logits.shape[1]))


def predict(logits: Array) -> Label:
    """The first largest logit, or z > 0 for one sigmoid channel."""
    return (logits > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(1)[:, None]


def one_hot(y: Label, classes: int) -> Array:
    return np.moveaxis(np.eye(classes)[y[:, 0]], -1, 1)


def per_case(value: Array, gradient: Array) -> Valued:
    n = value[0].size
    return value.reshape(len(value), -1).sum(1) / n, gradient / n


def weighted_ce(at: Pixels, weight: Array | Mask) -> Valued:
    """Cross-entropy under weights that the gradient takes as constants."""
    weight = weight * at.valid
    return per_case(weight * -at.log_py, weight * at.dce)


def ce(logits: Array, label: Label) -> Valued:
    at = pixels(logits, label)
    return weighted_ce(at, at.valid)


def mask_ce(logits: Array, label: Label) -> Valued:
    at = pixels(logits, label)
    return weighted_ce(at, at.correct)


def mask_ce_bal(logits: Array, label: Label, *, weights: Array) -> Valued:
    """``weights`` one a class; (w_0, w_1) for a sigmoid."""
    at = pixels(logits, label)
    return weighted_ce(at, at.correct * np.asarray(weights, float)[at.y])


def js(logits: Array, label: Label) -> Valued:
    """Jensen-Shannon divergence of p and one-hot, in log space."""
    at = pixels(logits, label)
    p, log_p, log_1p = np.exp(at.log_py), at.log_py, np.log1p(np.exp(at.log_py))
    value = (LOG2 - log_1p) / 2 + (p * (LOG2 + log_p - log_1p) + (1 - p) * LOG2) / 2
    return per_case(at.valid * value, at.valid * (-p * (log_p - log_1p) / 2) * at.dce)


def segpgd(logits: Array, label: Label, *, lam: float) -> Valued:
    at = pixels(logits, label)
    return weighted_ce(at, np.where(at.correct, 1 - lam, lam))


def cospgd(logits: Array, label: Label) -> Valued:
    """The cosine of softmax and one-hot; a sigmoid counts as two classes."""
    at = pixels(logits, label)
    return weighted_ce(at, np.exp(at.log_py) / np.sqrt((at.p**2).sum(1, keepdims=True)))


def spherical(logits: Array, label: Label, *, masked: bool = True) -> Valued:
    """-u_y / |u|, the norm not detached; all logits zero gives zero."""
    assert logits.shape[1] > 1, "expected two logits or more, got one sigmoid channel; use mask_margin"
    at = pixels(logits, label)
    counted = (at.correct if masked else at.valid).astype(float)
    norm = np.sqrt((logits**2).sum(1, keepdims=True))
    norm = np.where(norm == 0, np.inf, norm)
    u_y = np.take_along_axis(logits, at.y, 1)
    gradient = -counted * (one_hot(at.y, logits.shape[1]) / norm - logits * u_y / norm**3)
    return per_case(-counted * u_y / norm, gradient)


def mask_margin(logits: Array, label: Label, *, tau: float = 1.0) -> Valued:
    """The masked bounded margin of one sigmoid channel: -c s z / sqrt(tau^2 + z^2)."""
    assert logits.shape[1] == 1, f"expected one sigmoid channel, got {logits.shape[1]} logits; use spherical"
    at = pixels(logits, label)
    cs, bound = at.correct * (2 * at.y - 1), tau**2 + logits**2
    return per_case(-cs * logits / np.sqrt(bound), -cs * tau**2 / bound**1.5)


def mce_dice(logits: Array, label: Label) -> Valued:
    """Masked cross-entropy, each correct pixel weighted by what its loss would take from a foreground class's Dice."""
    at = pixels(logits, label)
    runner_up = np.ones_like(at.y) if logits.shape[1] == 1 else 1 + logits[:, 1:].argmax(1)[:, None]
    omega = np.zeros(at.y.shape)
    for b, c in itertools.product(range(len(logits)), range(1, at.p.shape[1])):
        truth, said = at.valid[b] & (at.y[b] == c), at.valid[b] & (at.pred[b] == c)
        size = truth.sum() + said.sum()
        if size:
            dice = 2 * (truth & said).sum() / size
            omega[b][at.correct[b] & truth] = (2 - dice) / size
            omega[b][at.correct[b] & (at.y[b] == 0) & (runner_up[b] == c)] = dice / size
    return weighted_ce(at, at.correct * omega)


@dataclass(frozen=True)
class Scheduled:
    """A loss of lambda_t = (t - 1) / 2T, t = 1..T the update that its gradient drives: ``Scheduled(segpgd)``."""

    loss: Callable[..., Valued]


AnyLoss = Loss | Scheduled


def at_time(loss: AnyLoss, updates_done: int, steps: int) -> Loss:
    return partial(loss.loss, lam=updates_done / (2 * max(steps, 1))) if isinstance(loss, Scheduled) else loss


def checkpoints(steps: int) -> list[int]:
    """The iterations, counted from 1, after which APGD may halve its step."""
    k, k_min, d = (max(percent * steps // 100, 1) for percent in (22, 6, 3))
    found, at = [], k
    while at <= steps:
        found.append(at)
        k = max(k - d, k_min)
        at += k
    return found


def accuracy(logits: Array, label: Label, ignored: bool | None = None) -> Array:
    """Of the pixels not ignored (1 where there are none), or of all, the ignored ones right or wrong as said."""
    right, valid = (x.reshape(len(label), -1) for x in (predict(logits) == label, label != -1))
    n = (valid if ignored is None else np.ones_like(valid)).sum(1)
    return np.where(n == 0, 1.0, np.where(valid, right, bool(ignored)).sum(1) / np.maximum(n, 1))


class Found(NamedTuple):
    x_best: Array
    x_adv: Array
    accuracy: Array
    loss: Array


def project(x: Array, image: Array, eps: float) -> Array:
    return np.clip(np.clip(x, image - eps, image + eps), 0, 1)


def forward(model: torch.nn.Module, x: Array, label: Label, loss: Loss) -> tuple[Array, Array]:
    """The logits, and the gradient in the image of the sum of the cases' losses."""
    image = torch.from_numpy(x.copy()).requires_grad_()
    logits = model(image)
    values = logits.detach().numpy().copy()
    (gradient,) = torch.autograd.grad(logits, image, torch.from_numpy(loss(values, label)[1]))
    return values, gradient.numpy()


def apgd(
    model: torch.nn.Module,
    image: Array,
    label: Label,
    eps: float,
    steps: int,
    loss: AnyLoss,
    track: AnyLoss,
    start: Array,
    *,
    as_published: bool = True,
    score: Score | None = None,
    early_stop: bool = False,
) -> Found:
    """L-infinity APGD from ``start``, taken as it is. ``x_adv`` has the lowest ``score`` (default: pixel accuracy).

    As published: ties go to the later iterate, the first look back reads the last slot of a history of zeros, and the
    start's accuracy counts ignored pixels as wrong. Otherwise: ties keep the earlier, the first look back reads the
    start's value, ignored pixels have no say. ``early_stop`` ends when the scores of the whole batch sum to 0.
    """
    assert not model.training

    def over_image(case: Array | Mask) -> Array | Mask:
        return case.reshape(-1, *[1] * (image.ndim - 1))

    def scored(logits: Array, at_start: bool) -> Array:
        if score is not None:
            return score(logits, label)
        return accuracy(logits, label, not at_start if as_published else None)

    x = previous = x_best = x_adv = start
    logits, g = forward(model, x, label, at_time(loss, 0, steps))
    g_best = g
    h_start = l_best = l_last = at_time(track, 0, steps)(logits, label)[0]
    a_best = scored(logits, at_start=True)
    history = np.zeros((steps, len(image)))
    step_size, reduced_last = np.full(len(image), 2 * eps), np.ones(len(image), bool)
    marks, last_mark = checkpoints(steps), 0
    for i in range(steps):
        a = 1.0 if i == 0 else 0.75
        z = project(x + over_image(step_size) * np.sign(g), image, eps)
        x, previous = project(x + a * (z - x) + (1 - a) * (x - previous), image, eps), x
        logits, g = forward(model, x, label, at_time(loss, i + 1, steps))
        now = scored(logits, at_start=False)
        x_adv = np.where(over_image(now <= a_best if as_published else now < a_best), x, x_adv)
        a_best = np.minimum(now, a_best)
        history[i] = at_time(track, i + 1, steps)(logits, label)[0]
        better = history[i] > l_best
        x_best, g_best = np.where(over_image(better), x, x_best), np.where(over_image(better), g, g_best)
        l_best = np.where(better, history[i], l_best)
        if i + 1 in marks:
            k, last_mark = i + 1 - last_mark, i + 1
            before = [history[t - 1] if t > 0 or as_published else h_start for t in range(i + 1 - k, i + 1)]
            rises = (history[i + 1 - k : i + 1] > before).sum(0)
            reduced_last = (4 * rises <= 3 * k) | (~reduced_last & (l_last >= l_best))
            l_last = l_best
            step_size = np.where(reduced_last, step_size / 2, step_size)
            x, g = np.where(over_image(reduced_last), x_best, x), np.where(over_image(reduced_last), g_best, g)
        if early_stop and a_best.sum() == 0:
            break
    return Found(x_best, x_adv, a_best, l_best)


def red_eps(
    model: torch.nn.Module,
    image: Array,
    label: Label,
    eps: float,
    steps: int,
    loss: AnyLoss,
    track: AnyLoss,
    noise: Array,
    **settings: Any,
) -> Found:
    """APGD (``settings``) at 2 eps, 1.5 eps, eps, each from the last ``x_adv``, the first from ``noise`` in [-1, 1]."""
    early = 3 * steps // 10
    start = np.clip(image + 2 * eps * noise, 0, 1)
    for radius, length in ((2 * eps, early), (1.5 * eps, early), (eps, steps - 2 * early)):
        start = project(start, image, radius)
        found = apgd(model, image, label, radius, length, loss, track, start, **settings)
        start = found.x_adv
    return found
