"""One network, one list of cases, many conditions: clean, each attack, and the controls that attack is shown beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from nibabel.affines import voxel_sizes
from torch import Tensor, nn

from medrobust.attacks.base import Attack, check_image, check_label_grid, frozen
from medrobust.attacks.objectives import predict
from medrobust.attacks.random_noise import RandomNoise
from medrobust.attacks.threat import Eps
from medrobust.attacks.vafa import VAFA
from medrobust.data.images import as_stored
from medrobust.ensembles import Key, ensemble_of
from medrobust.goals import Goal
from medrobust.inferers import bind
from medrobust.metrics import load, status
from medrobust.metrics._class_maps import counts
from medrobust.metrics.dice import dice
from medrobust.metrics.flip_rate import flip_rate
from medrobust.metrics.hd95 import hd95
from medrobust.metrics.iou import iou
from medrobust.metrics.l2 import l2
from medrobust.metrics.linf import linf
from medrobust.metrics.missed_rate import missed_rate
from medrobust.metrics.nsd import nsd
from medrobust.metrics.psnr import psnr
from medrobust.metrics.ssim import ssim
from medrobust.metrics.volume_error import volume_error
from medrobust.minimum_eps import MinimumEps
from medrobust.prompting import Arguments, Inputs, attack_all_prompts
from medrobust.records import ABSENT, CLEAN, Record, versions
from medrobust.regions import Region
from medrobust.statistics import is_foreground
from medrobust.targeted import impossible, success
from medrobust.targeted import wanted as wanted_map
from medrobust.tiles import attack_tiles

WHOLE, TILES, PROMPTS = "whole volume", "tiles", "all prompts"


@dataclass(frozen=True, kw_only=True, repr=False)
class Recorded:
    """An attack that was run earlier and whose volumes are read back: only what it called itself is left."""

    text: str
    seed: int | None = None

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is done to an image before the network sees it.

    Attributes:
        name: short, unique together with ``protocol``.
        attack: ``None`` for the clean image.
        protocol: ``"whole volume"`` through the inferer, ``"tiles"`` one by one, ``"all prompts"`` of a case at once.
        match: draw noise with the L2 norm that the condition of this name and protocol had on the same case.
        prompt: key of another prompt than the case's own, on the clean image.
        stored: the condition whose image is stored first, and how: ``("PGD", "jpeg75")``.
        ensemble: what the members of one ensemble share; a case that one of them broke is not given to the others.
        goal: what a targeted attack wants to see.
        wish: the same in words.
        asked: the same as it was typed, for whoever reads the adversarial volumes later.
        minimum: search for the smallest eps of the attack that breaks the case, instead of attacking with its own.
        surrogate: name of the other network that the attack is made on.
        made_on: that name with the network's weights, for the records.
        region: where the image may change, for the records; ``Evaluation.region`` sees to it.
    """

    name: str
    attack: Attack | Recorded | None = None
    protocol: str = ""
    match: tuple[str, str] | None = None
    prompt: str = ""
    stored: tuple[str, str] | None = None
    ensemble: Key | None = None
    goal: Goal | None = None
    wish: str = ""
    asked: str = ""
    minimum: MinimumEps | None = None
    surrogate: str = ""
    made_on: str = ""
    region: str = ""

    @property
    def text(self) -> str:
        """What records call the attack."""
        told = isinstance(self.attack, Recorded)
        toward = f" toward {self.wish!r}: {self.goal!r}" if self.goal and not told else ""
        on = f" made on {self.made_on}" if self.made_on else ""
        stored = f" stored as {self.stored[1]}" if self.stored else ""
        within = f" in {self.region}" if self.region else ""
        return f"{self.minimum or self.attack or ''!r}{on}{toward}{within}{stored}"


CLEAN_CONDITION = Condition(name=CLEAN)


def conditions(
    attacks: Mapping[str, Attack],
    protocols: Sequence[str] = (WHOLE,),
    stored: Sequence[str] = (),
    *,
    goals: Mapping[str, Goal] | None = None,
    asked: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
) -> list[Condition]:
    """The clean condition, then every attack under every protocol, each beside its controls.

    The control of an attack in a norm ball is the largest noise of the same ball. Those of a frequency attack are the
    coarsest tables without any optimisation, and noise of the same L2 norm: what the attack does beyond them is what
    it learned. Attacks that look at neither model nor label are the same under every protocol and run once; so do
    attacks in an L2 ball, of which every tile would get a whole one. Each attacked picture is also evaluated as it is
    read back after storing it in each of the forms ``stored``, such as ``png`` and ``jpeg75``.

    Args:
        goals: what targeted attacks want to see, by the attack's name.
        asked: the same as typed.
        class_names: background first, to say goals in words.

    Raises:
        ValueError: a targeted attack without a goal or the other way round, or a name that stands for two things.
    """
    found = [CLEAN_CONDITION]
    given = list(attacks.values())
    aims = goals or {}
    for name, attack in attacks.items():
        goal = aims.get(name)
        if attack.targeted and goal is None:
            raise ValueError(
                f"expected a goal for the targeted attack {name}: the true label as a target would be help"
            )
        if goal is not None and not attack.targeted:
            raise ValueError(f"expected a targeted attack for the goal {goal!r}, got {attack!r}")
        aim: dict[str, Any] = {}
        if goal is not None:
            aim = {"goal": goal, "wish": goal.describe(class_names), "asked": (asked or {}).get(name, "")}
        norm: Any = getattr(attack, "norm", "")
        eps = getattr(attack, "eps", 0.0)
        noise = RandomNoise(norm=norm, eps=eps) if norm else None
        if noise is not None and noise not in given:
            given.append(noise)
            found.append(Condition(name=f"noise {_size(norm, eps)}", attack=noise, protocol=WHOLE))
        once = attack.blind or norm == "l2"
        for protocol in [WHOLE] if once else protocols:
            team = ensemble_of(name, repr(attack), protocol)
            found.append(Condition(name=name, attack=attack, protocol=protocol, ensemble=team, **aim))
            found += [
                Condition(name=f"{name} as {form}", attack=attack, protocol=protocol, stored=(name, form), **aim)
                for form in stored
            ]
        if isinstance(attack, VAFA) and not attack.targeted:
            coarse = replace(attack, steps=0, q_init=attack.q_max, ssim_weight=0.0, final="hard")
            found.append(Condition(name=f"{name} tables only", attack=coarse, protocol=WHOLE))
            equal = RandomNoise(norm="l2", eps=0.0)
            match = (name, protocols[0])
            found.append(Condition(name=f"{name} equal noise", attack=equal, protocol=WHOLE, match=match))
    slugs = [slug(condition) for condition in found]
    for name, attack in attacks.items():
        if slug(Condition(name=name)) == CLEAN or slugs.count(slug(Condition(name=name, protocol=WHOLE))) > 1:
            raise ValueError(f"expected a name of its own for {attack!r}, got {name!r}: another condition has it")
    return found


def minimum_conditions(searches: Mapping[str, MinimumEps]) -> list[Condition]:
    """One condition for each search of a smallest eps, called ``minimum eps, PGD``."""
    return [
        Condition(name=f"minimum eps, {name}", attack=search.attack, protocol=WHOLE, minimum=search)
        for name, search in searches.items()
    ]


def transfer_conditions(attacks: Mapping[str, Attack], surrogates: Mapping[str, str]) -> list[Condition]:
    """Each untargeted attack that needs a model, made on each surrogate: ``PGD from NAME``.

    Args:
        surrogates: their names, and which weights they stand for.

    Raises:
        ValueError: there is no such attack.
    """
    made = {name: attack for name, attack in attacks.items() if not (attack.blind or attack.targeted)}
    if surrogates and not made:
        raise ValueError(f"expected an untargeted attack that needs a model, got {', '.join(attacks) or 'none'}")
    return [
        Condition(
            name=f"{name} from {surrogate}",
            attack=attack,
            protocol=WHOLE,
            surrogate=surrogate,
            made_on=f"{surrogate} ({weights})",
        )
        for name, attack in made.items()
        for surrogate, weights in surrogates.items()
    ]


def prompt_conditions(keys: Sequence[str]) -> list[Condition]:
    """The text side: each case under another of its prompts, on the clean image."""
    return [Condition(name=f"prompt {key}", attack=Recorded(text=f"Prompt({key!r})"), prompt=key) for key in keys]


def _size(norm: str, eps: Eps) -> str:
    """A radius in words: ``8/255``, ``4/255,8/255`` for two channels, ``L2 2``; rows of several cases after ``;``."""
    if isinstance(eps, tuple):
        return (";" if isinstance(eps[0], tuple) else ",").join(_size(norm, part) for part in eps)
    return f"{eps * 255:g}/255" if norm == "linf" else f"L2 {eps:g}"


def is_broken(records: Iterable[Record]) -> bool:
    """Whether nothing is left of any structure: no attack can do worse."""
    return all(record.value == 0 for record in records if record.metric == "dice" and is_foreground(record))


def slug(condition: Condition) -> str:
    """The condition as part of a file name: ``PGD__whole-volume``."""
    parts = (part for part in (condition.name, condition.protocol) if part)
    return "__".join(part.replace(" ", "-").replace("/", "-") for part in parts)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case under one condition; all maps are (C, *S) without a batch dimension.

    ``why_not`` says why the attack was not made, where its goal is impossible; the adversarial maps are the clean ones.
    """

    condition: Condition
    attack: Attack | Recorded | None
    records: list[Record]
    image: Tensor
    image_adv: Tensor
    label: Tensor
    pred: Tensor
    pred_adv: Tensor
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """Another network of the same task, to make attacks on."""

    network: nn.Module
    inferer: Inferer | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How cases are evaluated.

    Args:
        network: in its checkpoint's state; it is frozen and in evaluation mode meanwhile.
        inferer: what makes logits of a whole volume; it is attacked, and it is what the predictions come from.
        class_names: background first, one per channel of the logits, or two for a single sigmoid channel.
        channels: how many the network takes; ``None`` leaves that to the network to find out.
        seed: of every attack's generator, the same for each case and condition.
        label_free: attack the model's own clean prediction; Dice then is against that prediction too.
        lpips: also measure LPIPS, which needs the extra ``medrobust[lpips]``.
        model: name and hash of the weights, for the records.
        surrogates: other networks, by what conditions call them.
        device: where the network runs.
        region: where attacks and their controls may change a case; ``None``: everywhere.
    """

    network: nn.Module
    inferer: Inferer | None
    class_names: Sequence[str]
    channels: int | None = None
    seed: int = 0
    label_free: bool = False
    lpips: bool = False
    model: str = ""
    device: torch.device | str = "cpu"
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    region: Region | None = None

    def case(
        self,
        name: str,
        image: Tensor,
        label: Tensor | None,
        wanted: Iterable[Condition],
        *,
        saved: Callable[[Condition], tuple[Tensor, Recorded] | None] = lambda condition: None,
        norms: Mapping[tuple[str, str], float] | None = None,
        inputs: Inputs | None = None,
        broken: Iterable[Key] = (),
    ) -> Iterator[Result]:
        """Evaluate one case under each condition in turn.

        Args:
            name: what the records call the case; no patient data.
            image: (C, *S) in [0, 1]; the voxel size is read from its affine when it has one.
            label: (1, *S); ``None`` needs ``label_free``.
            wanted: which conditions; the clean prediction is made once in any case.
            saved: gives the adversarial image (C, *S) of a condition, and what made it, instead of crafting it.
            norms: L2 norms measured earlier, by name and protocol, for conditions that match them.
            inputs: what else the network takes for this case, such as the tokens of its prompt; the same in the attack
                and in every prediction.

        Raises:
            ValueError: image, label and network do not fit together.
        """
        spacing = [float(s) for s in voxel_sizes(image.affine.numpy())] if isinstance(image, MetaTensor) else []
        spacing = spacing[: image.ndim - 1] or [1.0] * (image.ndim - 1)
        clean = self._checked(image)
        inputs = inputs or Inputs()
        model, pred, reference = self._opened(name, clean, label, inputs)
        measured = dict(norms or {})
        crafted: dict[tuple[str, str], Tensor] = {}
        region = self.region(clean, reference) if self.region else None
        done = set(broken)
        for condition in wanted:
            if condition.ensemble in done:
                continue
            attack = condition.attack
            image_adv, target, toward, why_not = clean, reference, reference, ""
            extra: dict[str, float] = {}
            if condition.goal is not None:
                try:
                    target = condition.goal(reference, spacing)
                    toward = wanted_map(target, reference, pred, condition.goal.classes)
                except ValueError as error:
                    attack, why_not = Recorded(text=condition.text, seed=self.seed), str(error).partition(" (case ")[0]
            if why_not:
                pred_adv = pred
            elif condition.prompt:
                pred_adv = self._predict(self._bound(inputs.under(condition.prompt)), clean)
            elif attack is not None:
                kept = saved(condition)
                if kept is not None:
                    image_adv, attack = kept[0][None].to(self.device), kept[1]
                    check_image(image_adv, f"the saved volume of {condition.name}")
                elif condition.minimum is not None:
                    image_adv, extra = self._search(condition.minimum, model, clean, reference)
                    attack = Recorded(text=condition.text, seed=self.seed)
                elif isinstance(attack, Attack):
                    if condition.match:
                        attack = RandomNoise(norm="l2", eps=measured[condition.match])
                    key = condition.stored[0] if condition.stored else condition.name, condition.protocol
                    if key not in crafted:
                        crafted = {key: self._craft(attack, condition, model, clean, toward, inputs, region)}
                    image_adv = crafted[key]
                    if condition.stored:
                        image_adv = as_stored(image_adv[0], condition.stored[1])[None]
                    if condition.stored or condition.goal or condition.surrogate or condition.region:
                        attack = Recorded(text=replace(condition, attack=attack).text, seed=self.seed)
                else:
                    raise ValueError(f"expected the saved volume of {condition.name} for case {name}, got none")
            if not (condition.prompt or why_not):
                pred_adv = pred if attack is None else self._predict(model, image_adv)
            measured[condition.name, condition.protocol] = l2(image_adv, clean).item()
            shared = self._shared(name, condition, attack)
            if why_not:
                records = impossible(shared, self._concerned(condition), why_not)
            elif condition.minimum is not None:
                word = "ok" if len(extra) > 1 else ABSENT
                records = [Record(**shared, metric=name, value=value, status=word) for name, value in extra.items()]
            else:
                records = self._records(shared, condition, spacing, clean, image_adv, reference, pred, pred_adv)
            if condition.goal and not why_not:
                records += success(shared, self._concerned(condition), reference, target, pred, pred_adv)
            if condition.ensemble and is_broken(records):
                done.add(condition.ensemble)
            yield Result(
                condition=condition,
                attack=attack,
                records=records,
                image=clean[0],
                image_adv=image_adv[0],
                label=reference[0],
                pred=pred[0],
                pred_adv=pred_adv[0],
                why_not=why_not,
            )

    def ready(
        self, name: str, image: Tensor, label: Tensor | None, inputs: Inputs | None = None
    ) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
        """The model that attacks see, a case's image (1, C, *S), what it is judged against (1, 1, *S), the region."""
        clean = self._checked(image)
        model, _, reference = self._opened(name, clean, label, inputs or Inputs())
        return model, clean, reference, self.region(clean, reference) if self.region else None

    def _checked(self, image: Tensor) -> Tensor:
        clean = image.as_subclass(Tensor).to(self.device)[None].float()
        check_image(clean, "the evaluation")
        if self.channels is not None and clean.shape[1] != self.channels:
            raise ValueError(f"expected an image of {self.channels} channel(s), got {clean.shape[1]}: is the file 4-D?")
        return clean

    def _opened(
        self, name: str, clean: Tensor, label: Tensor | None, inputs: Inputs
    ) -> tuple[nn.Module, Tensor, Tensor]:
        """The model, its prediction, and the reference: the label, or where there is none that prediction."""
        model = self._bound(inputs.own)
        pred = self._predict(model, clean)
        if label is None and not self.label_free:
            raise ValueError(f"expected a label for case {name}, got none: evaluate label-free or add the label")
        if label is None or self.label_free:
            return model, pred, pred
        reference = label.as_subclass(Tensor).to(self.device)[None]
        check_label_grid(clean, reference, f"case {name}")
        return model, pred, reference.long()

    def _batched(self, arguments: Arguments) -> dict[str, Tensor]:
        return {key: value.to(self.device)[None] for key, value in arguments.items()}

    def _bound(self, arguments: Arguments) -> nn.Module:
        return bind(self.network, self.inferer, **self._batched(arguments)).to(self.device)

    def _predict(self, model: nn.Module, image: Tensor) -> Tensor:
        with frozen(model), torch.no_grad():
            logits = model(image)
        channels = logits.shape[1]
        if channels != len(self.class_names) and (channels, len(self.class_names)) != (1, 2):
            raise ValueError(f"expected logits for the classes {', '.join(self.class_names)}, got {channels} channels")
        return predict(logits, "softmax")

    def _craft(
        self,
        attack: Attack,
        condition: Condition,
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        inputs: Inputs,
        region: Tensor | None,
    ) -> Tensor:
        if attack.setting("objective").head == "sigmoid" and len(self.class_names) != 2:
            raise ValueError("expected an objective for a softmax head, got one for sigmoid channels: use the handlers")
        generator = torch.Generator().manual_seed(self.seed)
        if condition.surrogate:
            other = self.surrogates[condition.surrogate]
            model = bind(other.network, other.inferer, **self._batched(inputs.own)).to(self.device)
            self._predict(model, image)  # says what is wrong where the classes are not the same
            return attack(model, image, label, region=region, generator=generator)
        if condition.protocol == PROMPTS:
            models = [self._bound(arguments) for arguments in inputs.each()]
            return attack_all_prompts(attack, models, image, label, region=region, generator=generator)
        if condition.protocol != TILES:
            return attack(model, image, label, region=region, generator=generator)
        if not isinstance(self.inferer, SlidingWindowInferer):
            raise ValueError(f"expected a sliding-window inferer to take tiles from, got {type(self.inferer).__name__}")
        network = bind(self.network, **self._batched(inputs.own))
        return attack_tiles(attack, network, image, label, self.inferer.roi_size, generator=generator)

    def _search(
        self, search: MinimumEps, model: nn.Module, image: Tensor, label: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The image at the smallest eps that breaks the case, and what is recorded of it.

        Of a structure that the label lacks there is nothing to break, and no score.
        """
        classes = getattr(search.criterion, "classes", None)
        if classes and not any((label == index).any() for index in classes):
            return image, {"minimum_eps": math.inf}
        found = search(model, image, label, generator=lambda: torch.Generator().manual_seed(self.seed))
        return found.image_adv, {"minimum_eps": found.eps.item(), f"{search.judge}_at_minimum_eps": found.score.item()}

    def _concerned(self, condition: Condition) -> dict[str, int]:
        """The structures that a condition's goal is about, by their names."""
        return {self.class_names[k]: k for k in condition.goal.classes} if condition.goal else {}

    def _shared(self, case: str, condition: Condition, attack: Attack | Recorded | None) -> dict[str, Any]:
        """What all records of a case under a condition share."""
        return {
            "case": case,
            "condition": condition.name,
            "protocol": condition.protocol,
            "attack": "" if attack is None else repr(attack),
            "seed": attack.seed if isinstance(attack, Recorded) else self.seed,
            "model": self.model,
            "versions": versions(),
        }

    def _records(
        self,
        shared: Mapping[str, Any],
        condition: Condition,
        spacing: Sequence[float],
        image: Tensor,
        image_adv: Tensor,
        label: Tensor,
        pred: Tensor,
        pred_adv: Tensor,
    ) -> list[Record]:
        classes = len(self.class_names)
        words = status(pred_adv, label, classes)[0]
        overlaps = (dice, iou, missed_rate, volume_error)
        columns = {function.__name__: function(pred_adv, label, classes)[0] for function in overlaps}
        columns |= {function.__name__: function(pred_adv, label, classes, spacing)[0] for function in (hd95, nsd)}
        clean = condition.attack is None
        if condition.ensemble or clean:
            # What worst cases over a whole data set are computed from.
            overlap, predicted, referenced = counts(pred_adv, label, classes)
            columns |= {"tp": overlap[0], "size": (predicted + referenced)[0]}
        found = [
            Record(**shared, metric=metric, class_name=name, value=float(value), status=word)
            for metric, values in columns.items()
            for name, value, word in zip(self.class_names, values, words, strict=True)
        ]
        if not clean:
            functions = [ssim, psnr, linf, l2, *([load("lpips")] if self.lpips else [])]
            measured = {function.__name__: function(image_adv, image) for function in functions}
            measured["flip_rate"] = flip_rate(pred_adv, pred)
            found += [Record(**shared, metric=metric, value=float(value.mean())) for metric, value in measured.items()]
        return found
