"""Images with masks and text prompts in MedVLSM's JSON format, and which prompt an image gets.

Poudel et al., *Exploring Transfer Learning in Medical Image Segmentation using Vision-Language Models*, MIDL 2024.
A listing is an array with one object a mask; other keys in it are not used::

    {"img_name": "a.jpg", "mask_name": "a.jpg", "prompts": {"p0": "", "p1": "polyp", "p7": ["polyp which ...", ...]}}

The prompt is drawn from a seed and the case's name alone, so training, attack and evaluation see the same one, in any
order and in any subset of the list. The ``repr`` of a policy is what a record needs to repeat it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from medrobust.data import images as pictures
from medrobust.data import slices
from medrobust.data.tokenizer import CONTEXT, encode
from medrobust.io import unused

Case = Mapping[str, Any]

CAVEAT = (
    "In MedVLSM's lists, prompts on number, size, colour, shape or place were made from the ground-truth mask or by a "
    "model that saw the image; BUSI's prompts say which images have no tumour. Scores with them are not scores of a "
    "user who does not know the answer."
)
"""To be printed wherever such prompts are scored."""

ANY_WINDOW = (0.0, 1.0)
"""To read a slice for its errors alone."""

EMPTY = "p0"
"""Key of the empty prompt, which is never drawn unless asked for."""


class Prompt(NamedTuple):
    """One text, and the key that it was under."""

    key: str
    text: str


class Policy(Protocol):
    """Which prompts a case gets; always the same for the same case."""

    def choose(self, case: Case) -> list[Prompt]:
        """One or more prompts out of ``case["prompts"]``.

        Raises:
            ValueError: the case lacks a key, or a key holds neither a text nor a list of texts.
        """


@dataclass(frozen=True)
class Fixed:
    """The prompt under ``key``; one of several texts there by the seed."""

    key: str
    seed: int = 0

    def choose(self, case: Case) -> list[Prompt]:
        texts = _texts(case, self.key)
        return [Prompt(self.key, texts[_draw(len(texts), self.seed, case, self.key)])]


@dataclass(frozen=True, kw_only=True)
class SeededRandom:
    """A key by the seed, each as likely as another, then one of its texts as in :class:`Fixed`.

    Attributes:
        seed: with the case's name, the only source of chance.
        keys: to draw from; ``None`` is all but the empty prompt.
    """

    seed: int = 0
    keys: tuple[str, ...] | None = None

    def choose(self, case: Case) -> list[Prompt]:
        keys = _keys(case, self.keys)
        return Fixed(keys[_draw(len(keys), self.seed, case)], self.seed).choose(case)


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """All texts under all ``keys``, in their order; ``None`` is all keys but the empty prompt."""

    keys: tuple[str, ...] | None = None

    def choose(self, case: Case) -> list[Prompt]:
        return [Prompt(key, text) for key in _keys(case, self.keys) for text in _texts(case, key)]


def datalist(
    listing: str | PathLike[str], *, images: str | PathLike[str], masks: str | PathLike[str]
) -> list[dict[str, Any]]:
    """Cases ``{"image": path, "label": path, "prompts": {...}, "case": name}`` in the order of the listing.

    A case is named after its mask, folders below ``masks`` or the listing's included, since several masks may share an
    image. That the files exist is left to :func:`check`.

    Args:
        listing: JSON file.
        images: folder of the images.
        masks: folder of the masks; ``mask_name`` may lie deeper in it.

    Raises:
        ValueError: no array, an empty one, or entries without one of the three; names the first 20 of them.
    """
    listing = Path(listing)
    try:
        rows = json.loads(listing.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {listing.name}, got {error}") from error
    if not isinstance(rows, list) or not rows:
        got = "an empty array" if rows == [] else f"JSON of another kind ({type(rows).__name__})"
        raise ValueError(f"expected an array of entries in {listing.name}, got {got}")
    wrong = [f"entry {number}: {lacks}" for number, row in enumerate(rows) if (lacks := _lacks(row))]
    if wrong:
        raise ValueError(
            f"expected img_name, mask_name and prompts in all {len(rows)} entries of {listing.name}, got "
            f"{len(wrong)} without: {_few(wrong, 20)}"
        )
    used: set[str] = set()
    return [
        {
            "image": str(Path(images, row["img_name"])),
            "label": str(Path(masks, row["mask_name"])),
            "prompts": row["prompts"],
            "case": unused(_name(row["mask_name"], (Path(masks).absolute(), listing.parent.absolute())), used),
        }
        for row in rows
    ]


def _name(mask: str, folders: Iterable[Path]) -> str:
    """A case's name, which names files: the mask's path, of an absolute one what is below the first folder it is in."""
    path = PurePosixPath(mask)
    for folder in folders:
        if path.is_relative_to(folder.as_posix()):
            path = path.relative_to(folder.as_posix())
            break
    return "_".join(part for part in path.with_suffix("").parts if part not in (path.anchor, ".."))


class Problem(NamedTuple):
    """What is wrong with one case: ``kind`` is the same words for all cases of a kind."""

    case: str
    kind: str
    detail: str


def problems(
    cases: Sequence[Case], policy: Policy, *, context: int | None = CONTEXT, threshold: int | None = None
) -> list[Problem]:
    """Everything wrong with the cases, each looked at whole: files, slices, sizes, grey levels, prompts of ``policy``.

    Args:
        cases: of :func:`datalist`.
        policy: whose prompts are looked at, and no others.
        context: most tokens of a prompt; ``None`` where longer ones will be cut.
        threshold: of :func:`medrobust.data.images.binarise`; with it, any grey levels pass.

    Raises:
        ImportError: ``transformers``, which counts the tokens, is missing; never with ``context=None``.
    """
    pairs = Counter(_what(case) for case in cases)
    found = []
    for case in cases:
        wrong = [*_wrong_files(case, threshold), *_wrong_prompts(case, policy, context)]
        if pairs[_what(case)] > 1:
            wrong.append(("listed twice", Path(case["label"]).name))
        found += [Problem(case["case"], kind, detail) for kind, detail in wrong]
    return found


def check(
    cases: Sequence[Case], policy: Policy, *, context: int | None = CONTEXT, threshold: int | None = None
) -> None:
    """Raise one error that counts all :func:`problems` by kind and names the first three cases of each.

    Raises:
        ValueError: there are no cases, or problems.
        ImportError: as in :func:`problems`.
    """
    if not cases:
        raise ValueError("expected cases to check, got an empty list")
    found = problems(cases, policy, context=context, threshold=threshold)
    if found:
        kinds = {kind: [problem for problem in found if problem.kind == kind] for _, kind, _ in found}
        raise ValueError(
            f"expected {len(cases)} whole cases, got problems in {len({problem.case for problem in found})}: "
            + ", ".join(
                f"{len(those)} {kind} ({_few(f'{problem.case}: {problem.detail}' for problem in those)})"
                for kind, those in kinds.items()
            )
        )


class Overlap(NamedTuple):
    """Two files of images in two splits that are one image: the same ``"name"``, the same ``"content"``, or both."""

    splits: tuple[str, str]
    images: tuple[str, str]
    same: tuple[str, ...]


def overlaps(splits: Mapping[str, Sequence[Case]]) -> list[Overlap]:
    """Images in more than one split, by file name or by sha256 of the file; BKAI's and ISIC's lists have some.

    An image that was encoded anew under another name is not found. The same name alone may be another image: CAMUS
    numbers its test patients from 1 again. A missing file is compared by name.
    """
    files = {name: sorted({str(case["image"]) for case in cases}) for name, cases in splits.items()}
    content = {path: _digest(path) for paths in files.values() for path in paths}
    found = []
    for one, other in combinations(files, 2):
        by_name, by_content = defaultdict(list), defaultdict(list)
        for path in files[other]:
            by_name[Path(path).name].append(path)
            by_content[content[path]].append(path)
        for path in files[one]:
            same_name = by_name.get(Path(path).name, [])
            same_content = by_content.get(content[path], []) if content[path] else []
            for twin in sorted({*same_name, *same_content}):
                same = (*["name"] * (twin in same_name), *["content"] * (twin in same_content))
                found.append(Overlap((one, other), (path, twin), same))
    return found


def check_splits(splits: Mapping[str, Sequence[Case]], *, names: bool = True) -> None:
    """Raise one error that counts the :func:`overlaps` of each two splits and names the first three images.

    Args:
        splits: cases by the split's name.
        names: whether the same name alone is a leak; pass False where names start anew in each split.

    Raises:
        ValueError: an image is in two splits.
    """
    found = [overlap for overlap in overlaps(splits) if names or "content" in overlap.same]
    if found:
        pairs = Counter(overlap.splits for overlap in found)
        shown = {
            pair: _few(Path(overlap.images[0]).name for overlap in found if overlap.splits == pair) for pair in pairs
        }
        raise ValueError(
            "expected splits without a common image, got "
            + ", ".join(f"{count} in {' and '.join(pair)} ({shown[pair]})" for pair, count in pairs.items())
            + ": take them out of one of the two"
        )


def _keys(case: Case, keys: tuple[str, ...] | None) -> tuple[str, ...]:
    chosen = tuple(key for key in case["prompts"] if key != EMPTY) if keys is None else keys
    if not chosen:
        raise ValueError(f"expected prompts to choose from for case {case['case']!r}, got none")
    return chosen


def _texts(case: Case, key: str) -> list[str]:
    prompts = case["prompts"]
    if key not in prompts:
        raise ValueError(f"expected a prompt key among {', '.join(prompts)} for case {case['case']!r}, got {key!r}")
    texts = [prompts[key]] if isinstance(prompts[key], str) else prompts[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a text or a list of texts under {key!r} for case {case['case']!r}, got {texts!r}")
    return texts


def _draw(count: int, seed: int, case: Case, key: str = "") -> int:
    """A number below ``count``; a hash, since a generator's numbers may change with its library's version."""
    words = json.dumps([seed, case["case"], key]).encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") % count


def _lacks(row: Any) -> str:
    """What one entry of a listing lacks; empty if nothing."""
    if not isinstance(row, dict):
        return "no object"
    kinds = {"img_name": str, "mask_name": str, "prompts": dict}
    lacks = [key for key, kind in kinds.items() if not isinstance(row.get(key), kind) or not row[key]]
    name = row.get("mask_name") or row.get("img_name") or "no name"
    return f"{name} has no {' and no '.join(lacks)}" if lacks else ""


def _what(case: Case) -> tuple[str, ...]:
    """What a case shows; a volume has many slices, and a slice many structures."""
    return tuple(str(case.get(key)) for key in ("image", "label", "slice", "value"))


def _wrong_files(case: Case, threshold: int | None) -> list[tuple[str, str]]:
    wrong = [
        (f"{what} missing", Path(case[key]).name)
        for key, what in (("image", "image"), ("label", "mask"))
        if not Path(case[key]).is_file()
    ]
    missing = {kind for kind, _ in wrong}
    if "slice" in case:
        return wrong or _wrong_slice(case)
    sizes = []
    if "image missing" not in missing:
        try:
            sizes.append(tuple(pictures.load_image(case["image"]).shape[1:]))
        except (OSError, ValueError) as error:
            wrong.append(("image unreadable", _without_folder(error, case["image"])))
    if "mask missing" not in missing:
        try:
            grey = pictures.load_grey(case["label"])
        except (OSError, ValueError) as error:
            wrong.append(("mask unreadable", _without_folder(error, case["label"])))
        else:
            sizes.append(tuple(grey.shape[1:]))
            try:
                pictures.binarise(grey, threshold=threshold)
            except ValueError as error:
                wrong.append(("mask not binary", str(error)))
    if len(set(sizes)) > 1:
        image, mask = sizes
        wrong.append(("image and mask of different size", f"{image} and {mask} rows and columns"))
    return wrong


def _wrong_slice(case: Case) -> list[tuple[str, str]]:
    wrong, sizes = [], []
    for key, what in (("image", "image"), ("label", "mask")):
        try:
            plane = slices.load_slice(case[key], case["slice"], window=ANY_WINDOW)
            sizes.append(tuple(plane.shape[1:]))
        except (OSError, ValueError) as error:
            wrong.append((f"{what} unreadable", _without_folder(error, case[key])))
    if len(set(sizes)) > 1:
        wrong.append(("image and mask of different size", f"{sizes[0]} and {sizes[1]} rows and columns"))
    return wrong


def _without_folder(error: Exception, path: str) -> str:
    name = Path(path).name
    said = str(error).replace(str(path), name)
    return said if name in said else f"{name}: {said}"


def _wrong_prompts(case: Case, policy: Policy, context: int | None) -> list[tuple[str, str]]:
    try:
        chosen = policy.choose(case)
    except ValueError as error:
        return [("prompt not usable", str(error))]
    if context is None:
        return []
    counts = [(prompt, len(encode(prompt.text))) for prompt in chosen]
    return [
        (f"prompt over {context} tokens", f"{prompt.key} has {count}, {prompt.text[:40]!r}...")
        for prompt, count in counts
        if count > context
    ]


def _digest(path: str) -> str:
    """sha256 of a file; empty if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def _few(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return "; ".join(listed[:most]) + ("; ..." if len(listed) > most else "")
