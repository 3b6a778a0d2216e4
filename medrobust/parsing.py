"""Attacks and numbers as a person types them: ``"pgd eps=8/255 steps=40 objective=DiceCE"``."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from medrobust import attacks
from medrobust.attacks import objectives, scores, voxel_losses
from medrobust.attacks.base import Attack
from medrobust.goals import ChangeVolume, Erase, Goal, Inside, Invent, MoveBoundary, Swap
from medrobust.minimum_eps import JUDGES, MinimumEps
from medrobust.regions import BODY, LABEL, Region

OBJECTIVES = ("objective", "criterion", "track")
"""Settings that are objectives, and go by their names."""

GOALS: dict[str, type[Goal]] = {
    "erase": Erase,
    "invent": Invent,
    "move": MoveBoundary,
    "volume": ChangeVolume,
    "swap": Swap,
}

_FRACTION = re.compile(r"^\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*/\s*([\d.]+)\s*$")


def parse_attack(text: str) -> tuple[str, Attack]:
    """An attack from its name and ``setting=value`` words; returns what to call it, and the attack.

    A first word ``label:`` names the condition: ``"strong: pgd steps=100"``. Fractions are divided, commas make tuples,
    and an objective goes by its name.

    Raises:
        ValueError: unknown attack, setting or value, with the nearest that exists.
    """
    label, _, rest = text.rpartition(":")
    words = shlex.split(rest)
    if not words:
        raise ValueError(f"expected an attack such as 'pgd eps=8/255', got {text!r}")
    cls = attacks.load(words[0])
    known = [field.name for field in fields(cls)]
    settings: dict[str, Any] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected setting=value after {words[0]}, got {word!r}")
        check_name(name, known, f"setting of {cls.__name__}")
        settings[name] = _objective(value) if name in OBJECTIVES else parse_value(value)
    try:
        attack: Attack = cls(**settings)
        repr(attack)
        _ = attack.threat
    except TypeError as error:
        raise ValueError(f"expected values that {cls.__name__} understands, got {settings}: {error}") from error
    return label.strip() or cls.__name__, attack


def parse_overrides(words: Iterable[str] | None) -> dict[str, Any]:
    """Configuration ids and values from words such as ``a#b=3``.

    Raises:
        ValueError: a word without ``=``.
    """
    overrides: dict[str, Any] = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected --set id=value, got {word!r}")
        overrides[name] = parse_value(value)
    return overrides


def split_goal(text: str) -> tuple[str, str]:
    """An attack as typed without its ``goal=...`` word, and what that word says; "" where there is none."""
    words = shlex.split(text)
    goals = [word for word in words if word.startswith("goal=")]
    if len(goals) > 1:
        raise ValueError(f"expected one goal, got {', '.join(goals)}: attack once for each")
    rest = [word for word in words if not word.startswith("goal=")]
    return (shlex.join(rest), goals[0].removeprefix("goal=")) if goals else (text, "")


def parse_attacks(words: Sequence[str]) -> tuple[dict[str, Attack], dict[str, str]]:
    """The attacks by their names, and what the targeted ones among them want, still as typed.

    Raises:
        ValueError: unknown attack, setting or value, or a name twice.
    """
    named: dict[str, Attack] = {}
    wishes: dict[str, str] = {}
    for word in words:
        rest, wish = split_goal(word)
        if wish:
            name, parsed = parse_attack(rest)
            name = name if ":" in rest else f"{name} {wish.replace(':', ' ').replace(',', ' ')}"
            if parsed.objective is None and isinstance(parsed.setting("objective"), objectives.SoftDice):
                # Soft Dice hardly slopes where a structure shall be absent; what an attack is named after stays.
                parsed = dataclasses.replace(parsed, objective=objectives.CrossEntropy())
            found = {name: dataclasses.replace(parsed, targeted=True)}
            wishes[name] = wish
        else:
            found = parse_ensemble(word) or dict([parse_attack(word)])
        for name, parsed in found.items():
            if name in named:
                raise ValueError(f"expected attacks of different names, got {name!r} twice: write 'strong: {word}'")
            named[name] = parsed
    return named, wishes


def parse_goal(text: str, class_names: Sequence[str]) -> Goal:
    """A goal such as ``erase:liver``, ``move:liver,mm=-5``, ``invent:tumour,radius_mm=8,where=inside:liver``.

    A structure goes by its name (an underscore stands for a space) or its number. ``where`` is ``inside:STRUCTURE``,
    ``random`` with a ``seed``, or fractions of the image's extent as in ``0.5:0.5:0.3``.

    Raises:
        ValueError: unknown goal, structure or setting, with the nearest that exists.
    """
    name, _, rest = text.partition(":")
    check_name(name, GOALS, "goal")
    cls = GOALS[name]
    settings: dict[str, Any] = {}
    structures = []
    for word in rest.split(","):
        key, equals, value = word.partition("=")
        if not equals:
            structures.append(_structure(word, class_names))
            continue
        check_name(key, [field.name for field in fields(cls) if "class" not in field.name], f"setting of {name}")
        if key == "where" and ":" in value:
            kind, _, inside = value.partition(":")
            fractions = tuple(parse_value(part) for part in value.split(":")) if kind != "inside" else ()
            settings[key] = fractions or Inside(class_index=_structure(inside, class_names))
        else:
            settings[key] = parse_value(value)
    wanted = ("first", "second") if cls is Swap else ("class_index",)
    if len(structures) != len(wanted):
        raise ValueError(f"expected {len(wanted)} structure(s) after {name}:, got {rest!r}")
    try:
        return cls(**dict(zip(wanted, structures, strict=True)), **settings)
    except TypeError as error:
        raise ValueError(f"expected the settings of {cls.__name__}, got {text!r}: {error}") from error


def parse_minimum(text: str, *, below: float, most: str | None, judge: str = "dice") -> tuple[str, MinimumEps]:
    """A search for the smallest eps of an attack such as ``"pgd steps=20"``; returns what to call it, and the search.

    Args:
        below: a case is broken when its Dice, or what else ``judge`` says, is less than this.
        most: the largest eps tried, as typed; ``None``: 32/255.
        judge: ``dice``, or ``recall``, the share of the foreground's voxels that are still right.

    Raises:
        ValueError: unknown attack, setting or value, or an attack that takes no eps.
    """
    name, attack = parse_attack(text)
    check_name(judge, JUDGES, "judge after --broken-by")
    search = MinimumEps(attack=attack, below=below, criterion=JUDGES[judge](head=attack.setting("objective").head))
    return name, search if most is None else dataclasses.replace(search, most=float(parse_value(most)))


def parse_region(text: str, class_names: Sequence[str]) -> Region:
    """A region such as ``body``, ``label`` or ``liver,spleen``.

    Raises:
        ValueError: an unknown structure, with the nearest that exists.
    """
    if text in (BODY, LABEL):
        return Region(word=text)
    classes = tuple(_structure(word, class_names) for word in text.split(","))
    return Region(word=", ".join(class_names[index] for index in classes), classes=classes)


def _structure(text: str, class_names: Sequence[str]) -> int:
    """The class of this name or number."""
    wanted = text.strip().lower().replace("_", " ")
    known = [name.lower().replace("_", " ") for name in class_names]
    if wanted.isdigit() and int(wanted) < len(known):
        return int(wanted)
    check_name(wanted, known, "structure")
    return known.index(wanted)


def sweep(named: Mapping[str, Attack], sizes: Sequence[str]) -> dict[str, Attack]:
    """Each attack with an ``eps`` once for every size, called ``PGD 4/255``; the others as they are.

    Raises:
        ValueError: no attack has an eps, or two sizes are one.
    """
    found: dict[str, Attack] = {}
    for name, attack in named.items():
        if not hasattr(attack, "eps"):
            found[name] = attack
            continue
        for size in sizes:
            setting: dict[str, Any] = {"eps": parse_value(size.strip())}
            found[f"{name} {size.strip()}"] = dataclasses.replace(attack, **setting)
    if len({parse_value(size.strip()) for size in sizes}) < len(sizes) or found.keys() == named.keys():
        raise ValueError(
            f"expected sizes that differ and an attack with an eps, got {', '.join(sizes)} for {', '.join(named)}"
        )
    return found


def parse_value(text: str) -> Any:
    """A YAML scalar, a fraction such as ``8/255``, or a tuple such as ``8,8,8``."""
    fraction = _FRACTION.match(text)
    if fraction:
        denominator = float(fraction[2])
        if denominator == 0:
            raise ValueError(f"expected a number, got {text!r}: division by zero")
        return float(fraction[1]) / denominator
    if "," in text:
        return tuple(parse_value(part) for part in text.split(","))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"expected a number, a word or a list with its brackets closed, got {text!r}") from None
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as a word
    return value


def check_name(name: str, known: Iterable[str], kind: str) -> None:
    """Refuse a name that is not among ``known``, and say which is near.

    Raises:
        ValueError: with the closest known names, or all of them.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:40])}"
    raise ValueError(f"expected a {kind}, got {name!r}: {hint}")


def parse_ensemble(text: str) -> dict[str, Attack] | None:
    """The members of an ensemble such as ``"sea eps=8/255 budget=fast"``; ``None`` where the first word is no preset.

    Raises:
        ValueError: unknown setting or value.
    """
    from medrobust import sea

    preset, *words = shlex.split(text) or [""]
    if preset.lower() not in sea.PRESETS:
        return None
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected setting=value after {preset}, got {word!r}")
        check_name(name, ("eps", "budget", "head", "weights"), f"setting of {preset}")
        settings[name] = parse_value(value)
    return sea.members(preset.lower(), **settings)


def _objective(name: str) -> Any:
    """An objective or a score by its name, with its head: ``MaskedCE``, ``SoftDice-sigmoid``."""
    known = {
        found.__name__.lower(): found
        for module in (objectives, voxel_losses, scores)
        for found in vars(module).values()
        if isinstance(found, type)
        and found.__module__ == module.__name__
        and "head" in getattr(found, "__dataclass_fields__", {})
    }
    known["ce"] = known["crossentropy"]
    key, _, head = name.lower().partition("-")
    if key not in known or getattr(known[key], "__abstractmethods__", None) or head not in ("", "sigmoid", "softmax"):
        names = sorted(found.__name__ for found in known.values())
        raise ValueError(f"expected an objective among {', '.join(names)} (with -sigmoid), got {name!r}")
    return known[key](head=head or "softmax")
