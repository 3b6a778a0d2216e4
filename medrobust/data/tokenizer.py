"""CLIP's tokenizer without a network: OpenAI's byte-pair merges are packaged, ``transformers`` applies them.

Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021. The ids are those of
OpenAI's own tokenizer. Texts with broken encodings or typographic quotes need ``ftfy`` installed for that, as there.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

SOT, EOT = 49406, 49407
"""Ids that start and end each text; a text is padded with ``EOT``."""
CONTEXT = 77
"""Tokens that CLIP reads, start and end among them."""

_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_MERGES = 48_894


def tokenize(
    texts: str | Sequence[str], *, context: int = CONTEXT, truncate: bool = False, pad: int = EOT
) -> tuple[Tensor, Tensor]:
    """Ids (B, context) int64 and attention mask (B, context) int64, 1 from the start of a text to its end.

    Args:
        texts: B texts; one alone is a batch of one. Case and white space do not matter.
        context: tokens to a text, start and end among them.
        truncate: cut texts that are longer, and keep the end token last; otherwise they are an error.
        pad: id after the end. CLIP and CLIPSeg never look at it; CRIS finds its padding by ``0``.

    Raises:
        ValueError: a text is longer than ``context``, or ``context`` has no room for any.
        ImportError: ``transformers`` is missing.
    """
    if context < 2:
        raise ValueError(f"expected a context of 2 tokens or more, for start and end, got {context}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = torch.full((len(texts), context), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        tokens = encode(text)
        if len(tokens) > context:
            if not truncate:
                raise ValueError(
                    f"expected a text of at most {context} tokens, got {len(tokens)} in {text[:40]!r}...: "
                    "shorten it, or pass truncate=True"
                )
            tokens = [*tokens[: context - 1], EOT]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
    return ids, attention_mask


def encode(text: str) -> list[int]:
    """Ids of one text of any length, with start and end.

    Raises:
        ImportError: ``transformers`` is missing.
    """
    # One by one: encoding a batch starts threads, and a data loader that forks afterwards prints warnings.
    tokens: list[int] = tokenizer().backend_tokenizer.encode(clean(text)).ids
    return tokens


def clean(text: str) -> str:
    """What OpenAI does before the byte pairs: mend the encoding, HTML entities and white space; lower case."""
    text = html.unescape(html.unescape(_mend()(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


@cache
def tokenizer() -> Any:
    """transformers' ``CLIPTokenizer`` with the packaged vocabulary; made once. It does not :func:`clean`.

    Raises:
        ImportError: ``transformers`` is missing.
        ValueError: the packaged file was altered.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise ImportError("text prompts need transformers: pip install 'medrobust[vlm]'") from error
    vocabulary, pairs = load_vocabulary()
    # Typed as text, but pairs are what the byte pairs behind it take.
    merges: Any = pairs
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def load_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the 49,408 tokens, and the 48,894 merges, the first one first.

    Raises:
        ValueError: the packaged file was altered.
    """
    packed = resources.files("medrobust.data").joinpath("vocabulary", _FILE).read_bytes()
    if (digest := hashlib.sha256(packed).hexdigest()) != _SHA256:
        raise ValueError(f"expected {_FILE} with sha256 {_SHA256[:12]}, got {digest[:12]}: install medrobust anew")
    # The first line is a version; OpenAI leaves out the merges that would be more than 49,408 tokens.
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + _MERGES]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    single = _byte_symbols()
    words = [*single, *(symbol + "</w>" for symbol in single), *(first + second for first, second in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def _byte_symbols() -> list[str]:
    """A printable symbol for each byte, in the order of their ids: first the bytes that are printable themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


@cache
def _mend() -> Callable[[str], str]:
    try:
        fix: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    except ImportError:
        return str
    return fix
