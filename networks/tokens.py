"""What networks that read a prompt ask of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_EOS = 2
"""Configurations older than 2023 give this as the end of a text, where CLIP's true one is its largest token."""


def check_tokens(input_ids: Tensor, attention_mask: Tensor | None, batch: int, *, most: int, end: int) -> None:
    """Refuse tokens that are no prompts for a batch of images.

    Args:
        input_ids: (1 or batch, L) integers.
        attention_mask: of the same shape, or none.
        batch: number of images.
        most: longest prompt, in tokens.
        end: the token that ends a prompt; with ``FIRST_EOS`` there is no telling whether it is there.

    Raises:
        ValueError: another shape or type, or a prompt without its end.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] not in (1, batch) or not 0 < input_ids.shape[1] <= most:
        raise ValueError(
            f"expected tokens (1 or {batch}, at most {most}), got {tuple(input_ids.shape)}: give one prompt, or one "
            "for each image, and truncate long ones before their end token"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected tokens as integers, got {input_ids.dtype}: pass what the tokeniser returns")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"expected an attention mask shaped as the tokens {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}: pass the tokeniser's, or none"
        )
    if end != FIRST_EOS and not (input_ids == end).any(-1).all():
        raise ValueError(
            f"expected the end token {end} in every prompt, got one without it: truncate long prompts before their end "
            "token, not after"
        )
