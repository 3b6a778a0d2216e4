"""Ranks: the place of the right answer among all, from which top-k accuracy and recall at k follow.

Rank 1 is best. **Ties count against the model**: of equal scores the wrong ones come first, so a model that gives every
answer the same score is right about nothing. Every image and every caption is counted once. No rank is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank(logits: Tensor, label: Tensor) -> Tensor:
    """Place of the label's channel among all, (B, 1) float32 from 1 to K.

    Args:
        logits: (B, K) or (B, K, 1, 1).
        label: B whole numbers, in any shape that starts with B, such as (B, 1, 1, 1).

    Raises:
        ValueError: other shapes, a label without a channel, or NaN in the logits.
    """
    scores, y = _flat(logits), label.as_subclass(Tensor).flatten().long()
    if len(y) != len(scores):
        raise ValueError(f"expected one label for each of {len(scores)} images, got {tuple(label.shape)}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= scores.shape[1]):
        raise ValueError(f"expected labels from 0 to {scores.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
    own = scores.gather(1, y[:, None])
    # The label's own score is among those that are not below it: it is the 1 that a best rank is.
    return (scores >= own).sum(1, keepdim=True).float()


def top_k(logits: Tensor, label: Tensor, k: int = 1) -> Tensor:
    """1 where the label is among the k best of its image, else 0, (B, 1) float32; arguments as for :func:`rank`.

    Raises:
        ValueError: as there, or k outside 1..K: with k = K every answer would count.
    """
    classes = _flat(logits).shape[1]
    if not 1 <= k < classes:
        raise ValueError(f"expected k from 1 to {classes - 1} for {classes} classes, got {k}")
    return (rank(logits, label) <= k).float()


def caption_ranks(similarity: Tensor, images: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Ranks in retrieval: of each image's best own caption (I,), and of each caption's own image (N,), float32.

    An image's rank is that of the highest-placed of its captions, among captions of other images: one hit an image,
    however many captions it has. Recall at k is the share of ranks up to k.

    Args:
        similarity: (I, N), or (I, N, 1, 1); larger is closer.
        images: which image, from 0, each of the N captions belongs to.

    Raises:
        ValueError: an image without a caption, captions of images that are not there, other shapes, or NaN.
    """
    scores, owner = _flat(similarity), torch.as_tensor(images, device=similarity.device)
    if len(owner) != scores.shape[1] or set(owner.tolist()) != set(range(len(scores))):
        raise ValueError(
            f"expected the image, 0 to {len(scores) - 1}, of each of {scores.shape[1]} captions and none without, "
            f"got {len(owner)} numbers for {len(set(owner.tolist()))} images"
        )
    own = owner[None] == torch.arange(len(scores), device=owner.device)[:, None]
    best = torch.where(own, scores, -torch.inf).amax(1, keepdim=True)
    to_text = 1 + ((scores >= best) & ~own).sum(1)
    to_image = (scores >= scores[owner, torch.arange(len(owner), device=owner.device)]).sum(0)
    return to_text.float(), to_image.float()


def recall(ranks: Tensor, k: int) -> float:
    """Share of ranks up to k."""
    return float((ranks <= k).float().mean())


def _flat(logits: Tensor) -> Tensor:
    scores = logits.as_subclass(Tensor).flatten(1)
    if logits.ndim < 2 or scores.shape[1] != logits.shape[1]:
        raise ValueError(f"expected one answer an image, (B, K) or (B, K, 1, 1), got {tuple(logits.shape)}")
    if scores.isnan().any():
        raise ValueError("expected scores to rank, got NaN: does the model overflow?")
    return scores
