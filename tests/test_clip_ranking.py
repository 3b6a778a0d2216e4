"""Ranks, top-k and recall against scikit-learn, brute force, and cases that one can see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from medrobust.metrics import FunctionMetric
from medrobust.ranking import caption_ranks, rank, recall, top_k


def scores(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_scikit_learns(k: int) -> None:
    logits, label = scores(200, 7), torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(1))
    expected = top_k_accuracy_score(label.numpy(), logits.numpy(), k=k, labels=range(7))
    assert top_k(logits, label, k).mean().item() == pytest.approx(expected, abs=1e-7)
    assert recall(rank(logits, label), k) == pytest.approx(expected, abs=1e-7)
    metric = FunctionMetric(top_k, k=k)
    for part in (slice(0, 130), slice(130, 200)):
        metric(logits[part][..., None, None], label[part].view(-1, 1, 1, 1))
    assert metric.aggregate().item() == pytest.approx(expected, abs=1e-6)


def test_ties_count_against_the_model() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 1.0], [3.0, 1.0, 1.0, 0.0]])
    assert rank(logits, torch.tensor([0, 1, 2])).flatten().tolist() == [4, 2, 3]
    assert top_k(logits, torch.tensor([0, 1, 2])).flatten().tolist() == [0, 0, 0]


def brute_force(similarity: Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    images, texts = similarity.shape
    to_text = []
    for image in range(images):
        places = []
        for text in (t for t in range(texts) if owner[t] == image):
            wrong = [t for t in range(texts) if owner[t] != image and similarity[image, t] >= similarity[image, text]]
            places.append(1 + len(wrong))
        to_text.append(min(places))
    to_image = [
        1 + sum(bool(similarity[i, t] >= similarity[owner[t], t]) for i in range(images) if i != owner[t])
        for t in range(texts)
    ]
    return to_text, to_image


def test_caption_ranks_are_those_of_counting_by_hand() -> None:
    owner = [0, 0, 1, 2, 2, 2, 3, 4, 4]
    similarity = scores(5, 9).mul(2).round()  # with ties
    to_text, to_image = caption_ranks(similarity, owner)
    assert (to_text.tolist(), to_image.tolist()) == brute_force(similarity, owner)
    assert max(to_text) > 1


def test_several_captions_of_one_image_are_one_hit() -> None:
    similarity = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    to_text, to_image = caption_ranks(similarity[..., None, None], [0, 0, 1, 1])
    assert to_text.tolist() == [1, 1]
    assert to_image.tolist() == [1, 1, 1, 1]
    assert recall(to_text, 1) == 1.0
    to_text, _ = caption_ranks(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), [0, 0, 1])
    assert to_text.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rank(scores(3, 4), torch.tensor([0, 1])), "one label for each of 3"),
        (lambda: rank(scores(3, 4), torch.tensor([0, 1, 4])), "labels from 0 to 3, got 0 to 4"),
        (lambda: rank(scores(3, 4, 2, 2), torch.tensor([0, 1, 2])), "one answer an image"),
        (lambda: rank(torch.full((1, 2), torch.nan), torch.tensor([0])), "got NaN"),
        (lambda: top_k(scores(3, 4), torch.tensor([0, 1, 2]), 4), "k from 1 to 3"),
        (lambda: caption_ranks(scores(2, 3), [0, 0, 0]), "a caption|captions and none without"),
        (lambda: caption_ranks(scores(2, 3), [0, 1]), "of each of 3 captions"),
    ],
)
def test_what_cannot_be_ranked_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
