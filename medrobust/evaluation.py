"""One network, one list of cases, many conditions: clean, each attack, and the controls that attack is shown beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from nibabel.affines import voxel_sizes
from torch import Tensor, nn

from medrobust.attacks.base import Attack, check_image, check_label_grid, frozen
from medrobust.attacks.objectives import predict
from medrobust.attacks.random_noise import RandomNoise
from medrobust.attacks.vafa import VAFA
from medrobust.data.images import as_stored
from medrobust.inferers import bind
from medrobust.metrics import load, status
from medrobust.metrics._class_maps import counts
from medrobust.metrics.dice import dice
from medrobust.metrics.flip_rate import flip_rate
from medrobust.metrics.hd95 import hd95
from medrobust.metrics.iou import iou
from medrobust.metrics.l2 import l2
from medrobust.metrics.linf import linf
from medrobust.metrics.psnr import psnr
from medrobust.metrics.ssim import ssim
from medrobust.prompting import Arguments, Inputs, attack_all_prompts
from medrobust.records import CLEAN, Record, versions
from medrobust.sea import ensemble_of
from medrobust.statistics import is_foreground
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
    """

    name: str
    attack: Attack | Recorded | None = None
    protocol: str = ""
    match: tuple[str, str] | None = None
    prompt: str = ""
    stored: tuple[str, str] | None = None
    ensemble: str = ""

    @property
    def text(self) -> str:
        """What records call the attack."""
        return repr(self.attack or "") + (f" stored as {self.stored[1]}" if self.stored else "")


CLEAN_CONDITION = Condition(name=CLEAN)


def conditions(
    attacks: Mapping[str, Attack], protocols: Sequence[str] = (WHOLE,), stored: Sequence[str] = ()
) -> list[Condition]:
    """The clean condition, then every attack under every protocol, each beside its controls.

    The control of an attack in a norm ball is the largest noise of the same ball. Those of a frequency attack are the
    coarsest tables without any optimisation, and noise of the same L2 norm: what the attack does beyond them is what
    it learned. Attacks that look at neither model nor label are the same under every protocol and run once; so do
    attacks in an L2 ball, of which every tile would get a whole one. Each attacked picture is also evaluated as it is
    read back after storing it in each of the forms ``stored``, such as ``png`` and ``jpeg75``.

    Raises:
        ValueError: a targeted attack (there is no target here), or a name that stands for two things.
    """
    found = [CLEAN_CONDITION]
    given = list(attacks.values())
    for name, attack in attacks.items():
        if attack.targeted:
            raise ValueError(f"expected an untargeted attack, got {name}: the true label as a target would be help")
        norm: Any = getattr(attack, "norm", "")
        eps = getattr(attack, "eps", 0.0)
        noise = RandomNoise(norm=norm, eps=eps) if norm else None
        if noise is not None and noise not in given:
            given.append(noise)
            budget = f"{eps * 255:g}/255" if norm == "linf" else f"L2 {eps:g}"
            found.append(Condition(name=f"noise {budget}", attack=noise, protocol=WHOLE))
        once = attack.blind or norm == "l2"
        for protocol in [WHOLE] if once else protocols:
            team = ensemble_of(name, attack)
            found.append(Condition(name=name, attack=attack, protocol=protocol, ensemble=team and f"{team} {protocol}"))
            found += [
                Condition(name=f"{name} as {form}", attack=attack, protocol=protocol, stored=(name, form))
                for form in stored
            ]
        if isinstance(attack, VAFA):
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


def prompt_conditions(keys: Sequence[str]) -> list[Condition]:
    """The text side: each case under another of its prompts, on the clean image."""
    return [Condition(name=f"prompt {key}", attack=Recorded(text=f"Prompt({key!r})"), prompt=key) for key in keys]


def is_broken(records: Iterable[Record]) -> bool:
    """Whether nothing is left of any structure: no attack can do worse."""
    return all(record.value == 0 for record in records if record.metric == "dice" and is_foreground(record))


def slug(condition: Condition) -> str:
    """The condition as part of a file name: ``PGD__whole-volume``."""
    parts = (part for part in (condition.name, condition.protocol) if part)
    return "__".join(part.replace(" ", "-").replace("/", "-") for part in parts)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case under one condition; all maps are (C, *S) without a batch dimension."""

    condition: Condition
    attack: Attack | Recorded | None
    records: list[Record]
    image: Tensor
    image_adv: Tensor
    label: Tensor
    pred: Tensor
    pred_adv: Tensor


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
        device: where the network runs.
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
        broken: Iterable[str] = (),
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
        clean = image.as_subclass(Tensor).to(self.device)[None].float()
        check_image(clean, "the evaluation")
        if self.channels is not None and clean.shape[1] != self.channels:
            raise ValueError(f"expected an image of {self.channels} channel(s), got {clean.shape[1]}: is the file 4-D?")
        inputs = inputs or Inputs()
        model = self._bound(inputs.own)
        pred = self._predict(model, clean)
        if label is None and not self.label_free:
            raise ValueError(f"expected a label for case {name}, got none: evaluate label-free or add the label")
        reference = pred
        if label is not None and not self.label_free:
            reference = label.as_subclass(Tensor).to(self.device)[None]
            check_label_grid(clean, reference, f"case {name}")
            reference = reference.long()
        measured = dict(norms or {})
        crafted: dict[tuple[str, str], Tensor] = {}
        done = set(broken)
        for condition in wanted:
            if condition.ensemble in done:
                continue
            attack = condition.attack
            image_adv = clean
            if condition.prompt:
                pred_adv = self._predict(self._bound(inputs.under(condition.prompt)), clean)
            elif attack is not None:
                kept = saved(condition)
                if kept is not None:
                    image_adv, attack = kept[0][None].to(self.device), kept[1]
                    check_image(image_adv, f"the saved volume of {condition.name}")
                elif isinstance(attack, Attack):
                    if condition.match:
                        attack = RandomNoise(norm="l2", eps=measured[condition.match])
                    key = condition.stored[0] if condition.stored else condition.name, condition.protocol
                    if key not in crafted:
                        crafted = {key: self._craft(attack, condition, model, clean, reference, inputs)}
                    image_adv = crafted[key]
                    if condition.stored:
                        image_adv = as_stored(image_adv[0], condition.stored[1])[None]
                        attack = Recorded(text=condition.text, seed=self.seed)
                else:
                    raise ValueError(f"expected the saved volume of {condition.name} for case {name}, got none")
            if not condition.prompt:
                pred_adv = pred if attack is None else self._predict(model, image_adv)
            measured[condition.name, condition.protocol] = l2(image_adv, clean).item()
            records = self._records(name, condition, attack, spacing, clean, image_adv, reference, pred, pred_adv)
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
            )

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
    ) -> Tensor:
        if attack.setting("objective").head == "sigmoid" and len(self.class_names) != 2:
            raise ValueError("expected an objective for a softmax head, got one for sigmoid channels: use the handlers")
        generator = torch.Generator().manual_seed(self.seed)
        if condition.protocol == PROMPTS:
            models = [self._bound(arguments) for arguments in inputs.each()]
            return attack_all_prompts(attack, models, image, label, generator=generator)
        if condition.protocol != TILES:
            return attack(model, image, label, generator=generator)
        if not isinstance(self.inferer, SlidingWindowInferer):
            raise ValueError(f"expected a sliding-window inferer to take tiles from, got {type(self.inferer).__name__}")
        network = bind(self.network, **self._batched(inputs.own))
        return attack_tiles(attack, network, image, label, self.inferer.roi_size, generator=generator)

    def _records(
        self,
        case: str,
        condition: Condition,
        attack: Attack | Recorded | None,
        spacing: Sequence[float],
        image: Tensor,
        image_adv: Tensor,
        label: Tensor,
        pred: Tensor,
        pred_adv: Tensor,
    ) -> list[Record]:
        shared: dict[str, Any] = {
            "case": case,
            "condition": condition.name,
            "protocol": condition.protocol,
            "attack": "" if attack is None else repr(attack),
            "seed": attack.seed if isinstance(attack, Recorded) else self.seed,
            "model": self.model,
            "versions": versions(),
        }
        classes = len(self.class_names)
        words = status(pred_adv, label, classes)[0]
        columns = {function.__name__: function(pred_adv, label, classes)[0] for function in (dice, iou)}
        columns["hd95"] = hd95(pred_adv, label, classes, spacing)[0]
        if condition.ensemble or attack is None:
            # What worst cases over a whole data set are computed from.
            overlap, predicted, referenced = counts(pred_adv, label, classes)
            columns |= {"tp": overlap[0], "size": (predicted + referenced)[0]}
        found = [
            Record(**shared, metric=metric, class_name=name, value=float(value), status=word)
            for metric, values in columns.items()
            for name, value, word in zip(self.class_names, values, words, strict=True)
        ]
        if attack is not None:
            functions = [ssim, psnr, linf, l2, *([load("lpips")] if self.lpips else [])]
            measured = {function.__name__: function(image_adv, image) for function in functions}
            measured["flip_rate"] = flip_rate(pred_adv, pred)
            found += [Record(**shared, metric=metric, value=float(value.mean())) for metric, value in measured.items()]
        return found
