"""Ids are OpenAI's: known ones, and those of byte pairs written out in plain Python."""

from __future__ import annotations

import gzip
import itertools
import re
import string
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrobust.data import tokenizer as vocabulary_module
from medrobust.data.tokenizer import EOT, SOT, clean, encode, load_vocabulary, tokenize, tokenizer

pytest.importorskip("transformers")

GOLDEN = {
    "": [],
    "polyp": [6833, 335],
    "skin melanoma": [3575, 40862],
    "foot ulcer": [4738, 914, 1925],
    "one small pink polyp": [637, 2442, 3360, 6833, 335],
    "one medium white octagon polyp, located in center of the image": [
        *(637, 8675, 1579, 49167, 6833, 335, 267, 5677, 530, 2119, 539, 518, 2867)
    ],
    "Left ventricular cavity in two-chamber view of the heart.": [
        *(1823, 1240, 9511, 4927, 43156, 530, 1237, 268, 7642, 1093, 539, 518, 1936, 269)
    ],
    "Pleural Effusion in a chest Xray.": [926, 33948, 1490, 9364, 530, 320, 10563, 87, 3077, 269],
    "No tumor in the breast ultrasound image.": [871, 22616, 530, 518, 9475, 29717, 2867, 269],
    "A person riding a motorcycle": [320, 2533, 6765, 320, 10297],
    "&amp; html &lt;b&gt;": [261, 18231, 283, 321, 285],
    "café naïve": [15304, 1097, 35689, 563],
    "12.5mm x-ray": [272, 273, 269, 276, 2848, 343, 268, 3077],
    "it's": [585, 568],
}
"""What OpenAI's tokenizer gives, without start and end."""

ENGLISH = [
    "the",
    "polyp",
    "ultrasound",
    "don't",
    "image's",
    "12.5mm",
    "x-ray",
    "two-chamber View,",
    "\tin",
    "top_left!?",
]
CHARACTERS = string.printable.replace("&", "")
"""Without HTML entities, which may stand for more than ASCII."""


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Ids of tokens, and ranks of merges."""
    ids, merges = load_vocabulary()
    return ids, {pair: rank for rank, pair in enumerate(merges)}


def merged(word: str) -> list[str]:
    """Byte pairs of one ASCII word by their definition: again and again, the earliest merge of any neighbours."""
    parts = [*word[:-1], word[-1] + "</w>"]
    ranks = vocabulary()[1]
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        kept: list[str] = []
        while parts:
            width = 2 if tuple(parts[:2]) == best else 1
            kept.append("".join(parts[:width]))
            parts = parts[width:]
        parts = kept
    return parts


def oracle(text: str) -> list[int]:
    """Ids of cleaned ASCII text, without start and end."""
    words = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text)
    ids, _ = vocabulary()
    return [ids[part] for word in words for part in merged(word)]


@pytest.mark.parametrize("text", GOLDEN)
def test_ids_are_openais(text: str) -> None:
    assert encode(text) == [SOT, *GOLDEN[text], EOT]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(ENGLISH) | st.text(CHARACTERS, max_size=12), max_size=8).map(" ".join))
def test_ids_are_those_of_plain_byte_pairs(text: str) -> None:
    assert encode(text) == [SOT, *oracle(clean(text)), EOT]


def test_the_vocabulary_is_complete() -> None:
    ids, merges = load_vocabulary()
    assert (len(ids), len(merges)) == (49408, 48894)
    assert sorted(ids.values()) == list(range(49408))
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"]) == (SOT, EOT)
    # The first of each group: a printable byte, the first one that is not, the same with a word's end, a merge.
    assert [ids[word] for word in ("!", "Ā", "!</w>", "in")] == [0, 188, 256, 512]


def test_cleaning() -> None:
    assert clean(" A \n\t Polyp&amp;amp;X  ") == "a polyp&x"


def test_an_encoding_is_mended_where_ftfy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ftfy = types.ModuleType("ftfy")
    vars(ftfy)["fix_text"] = lambda text: text.replace("’", "'")
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    vocabulary_module._mend.cache_clear()
    try:
        assert encode("It’s") == [SOT, *GOLDEN["it's"], EOT]
    finally:
        vocabulary_module._mend.cache_clear()


def test_an_altered_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"i n"))
    monkeypatch.setattr(vocabulary_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"sha256 924691ac288e, got .*: install medrobust anew"):
        load_vocabulary()


def test_a_batch_is_padded_and_masked() -> None:
    ids, attention_mask = tokenize(["polyp", "one small pink polyp", ""])
    assert ids.shape == attention_mask.shape == (3, 77)
    assert ids.dtype == attention_mask.dtype == torch.long
    assert attention_mask.sum(dim=1).tolist() == [4, 7, 2]
    assert ids[0].tolist() == [SOT, 6833, 335] + [EOT] * 74
    assert attention_mask[1].tolist() == [1] * 7 + [0] * 70
    # CLIP pools at the first end token: the last one that the mask lets through.
    assert (ids == EOT).int().argmax(dim=1).tolist() == [3, 6, 1]
    zeros, same_mask = tokenize(["polyp", "one small pink polyp", ""], pad=0)
    assert torch.equal(same_mask, attention_mask)
    assert torch.equal(zeros, ids * attention_mask)


def test_one_text_and_no_text_are_batches() -> None:
    assert torch.equal(tokenize("polyp")[0], tokenize(["polyp"])[0])
    assert tokenize([])[0].shape == (0, 77)


def test_what_is_too_long_is_refused_or_cut() -> None:
    # One token a word: 75 fit between start and end.
    just = " ".join(["the"] * 75)
    assert tokenize(just)[1].sum() == 77
    with pytest.raises(ValueError, match=r"at most 77 tokens, got 78 in 'the the the .*'\.\.\.: shorten it"):
        tokenize(["polyp", just + " polyp"[:4]])
    assert torch.equal(tokenize(just + " polyp", truncate=True)[0], tokenize(just)[0])
    ids, attention_mask = tokenize("one small pink polyp", context=4, truncate=True)
    assert ids.tolist() == [[SOT, 637, 2442, EOT]]
    assert attention_mask.tolist() == [[1, 1, 1, 1]]
    with pytest.raises(ValueError, match="context of 2 tokens or more"):
        tokenize("polyp", context=1, truncate=True)


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'medrobust\[vlm\]'"):
        tokenize("polyp")
