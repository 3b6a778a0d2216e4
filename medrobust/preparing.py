"""From the words of a command line to a run and its cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medrobust.bundle import Bundle, read_list
from medrobust.data.images import as_stored
from medrobust.evaluation import (
    PROMPTS,
    TILES,
    WHOLE,
    Evaluation,
    Surrogate,
    conditions,
    minimum_conditions,
    prompt_conditions,
    transfer_conditions,
)
from medrobust.parsing import parse_attacks, parse_goal, parse_minimum, parse_overrides, parse_region, sweep
from medrobust.run import Run, saved_conditions
from medrobust.run_tables import fingerprint


def prepare(
    *,
    bundle: Path,
    output: Path,
    attack: list[str] | None = None,
    weights: Path | None = None,
    split: str = "validation",
    data_list: Path | None = None,
    section: str = "validation",
    image: Path | None = None,
    label: Path | None = None,
    override: list[str] | None = None,
    overlay: list[Path] | None = None,
    eps: str | None = None,
    prompts: str | None = None,
    stored: str | None = None,
    seed: int = 0,
    protocol: str = "whole",
    label_free: bool = False,
    saved: Path | None = None,
    pictures: bool = True,
    lpips: bool = False,
    minimum_eps: list[str] | None = None,
    below: float = 0.5,
    most: str | None = None,
    broken_by: str = "dice",
    per_structure: bool = False,
    transfer: list[str] | None = None,
    region: str | None = None,
    purpose: str = "",
) -> tuple[Run, list[dict[str, Any]]]:
    """The run that a command line asks for, and all of its cases; the arguments are those of ``medrobust evaluate``.

    Everything that can be wrong is found here, before any work is done.

    Args:
        purpose: what the run is for, where it is no evaluation that a user asked for.

    Raises:
        ValueError, TypeError, OSError, ImportError: words that do not fit together, a bundle that cannot be opened.
    """
    named, wishes = parse_attacks(attack or [])
    if eps is not None:
        named = sweep(named, eps.split(","))
        wishes = {name: wishes[old] for name in named for old in (name, name.rpartition(" ")[0]) if old in wishes}
    searches = dict(parse_minimum(word, below=below, most=most, judge=broken_by) for word in minimum_eps or [])
    if not searches and (per_structure or broken_by != "dice"):
        raise ValueError("expected --minimum-eps with --per-structure and --broken-by, got none")
    keys = [key.strip() for key in prompts.split(",")] if prompts else []
    forms = [form.strip() for form in stored.split(",")] if stored else []
    protocols = _protocols(protocol)
    overrides = parse_overrides(override)
    if named and saved is not None:
        raise ValueError("expected either --attack or --saved, got both")
    if saved is not None and (searches or forms):
        raise ValueError(
            "expected --saved without --minimum-eps and --stored, which need attacks of this run, got both: "
            "do them in a run of their own"
        )
    for form in forms:
        as_stored(torch.zeros(1, 1, 1), form)  # says what is wrong with it
    if label is not None and image is None:
        raise ValueError("expected --image with --label, got --label alone")
    if region and (TILES in protocols or searches or saved):
        raise ValueError("expected --region with attacks on whole volumes, not with tiles, --minimum-eps or --saved")
    if len(searches) < len(minimum_eps or []):
        raise ValueError("expected searches of different names, got one twice: write 'strong: pgd ...'")
    if not (named or keys or searches or saved):
        raise ValueError(
            "expected at least one --attack (see `medrobust list`), --minimum-eps, --prompts or --saved, got none"
        )

    opened = Bundle(root=bundle, overrides=overrides, weights=weights, overlays=overlay or [])
    if image is not None:
        cases: list[dict[str, Any]] = [{"image": str(image), **({"label": str(label)} if label else {})}]
        label_free = label_free or label is None
    else:
        cases = opened.cases(split) if data_list is None else read_list(data_list, section)
    if not cases:
        raise ValueError("expected at least one case, got an empty list")
    if per_structure:
        # Before any work: an attack that cannot aim at one structure is refused here.
        of_each = {
            f"{name}, {structure}": search.of_structure(index)
            for name, search in searches.items()
            for index, structure in enumerate(opened.class_names)
            if index
        }
        if taken := of_each.keys() & searches.keys():
            raise ValueError(f"expected searches of different names, got {taken.pop()!r} twice: name yours otherwise")
        searches = of_each | searches
    where = parse_region(region, opened.class_names) if region else None
    others = _surrogates(transfer or [], opened)
    evaluation = Evaluation(
        network=opened.network,
        inferer=opened.inferer,
        class_names=opened.class_names,
        channels=opened.channels,
        seed=seed,
        label_free=label_free,
        lpips=lpips,
        model=opened.model,
        device=opened.device,
        region=where,
        surrogates={name: surrogate for name, (surrogate, _) in others.items()},
    )
    goals = {name: parse_goal(wish, opened.class_names) for name, wish in wishes.items()}
    found = (
        saved_conditions(saved, opened.class_names)
        if saved
        else conditions(named, protocols, forms, goals=goals, asked=wishes, class_names=opened.class_names)
    )
    run = Run(
        folder=output,
        evaluation=evaluation,
        conditions=[
            replace(one, region=where.word) if where and one.attack and not one.prompt else one
            for one in (
                *found,
                *transfer_conditions(named, {name: weights for name, (_, weights) in others.items()}),
                *minimum_conditions(searches),
                *prompt_conditions(keys),
            )
        ],
        preprocessing=opened.preprocessing,
        pictures=pictures,
        saved=saved,
        arguments=opened.arguments,
        settings={
            "bundle": bundle.resolve().name,
            "overlays": [path.name for path in overlay or []],
            "overrides": overrides,
            "purpose": purpose,
            **({"saved volumes": fingerprint(saved)} if saved else {}),
        },
    )
    return run, cases


def _surrogates(words: Sequence[str], target: Bundle) -> dict[str, tuple[Surrogate, str]]:
    """Other networks from ``NAME=BUNDLE`` or ``NAME=WEIGHTS``, which are weights for the target's own network."""
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        path = Path(text)
        if not (name and equals and text) or name in found:
            raise ValueError(f"expected --transfer NAME=BUNDLE or NAME=WEIGHTS, each name once, got {word!r}")
        if not path.exists():
            raise FileNotFoundError(f"expected a bundle or weights in {path}, got nothing")
        other = Bundle(root=path, overrides={}) if path.is_dir() else replace(target, weights=path)
        found[name] = Surrogate(network=other.network, inferer=other.inferer), other.model
    return found


def _protocols(word: str) -> list[str]:
    known = {"whole": [WHOLE], "tiles": [TILES], "both": [WHOLE, TILES], "prompts": [WHOLE, PROMPTS]}
    if word not in known:
        raise ValueError(f"expected --protocol whole, tiles, both or prompts, got {word!r}")
    return known[word]
