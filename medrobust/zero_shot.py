"""How often zero-shot classification and retrieval are right, clean and under attack; one record a number.

What is recorded is the rank of the right answer (``medrobust.ranking``), from which every top-k accuracy and recall at
k follows. Attacks work on the image that the network sees, in units of its pixels.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from medrobust.atomic import replacing, write_text
from medrobust.attacks.apgd import APGD
from medrobust.attacks.base import Attack, frozen
from medrobust.attacks.class_losses import DLR, Margin, Similarity
from medrobust.attacks.fgsm import FGSM
from medrobust.attacks.objectives import CrossEntropy
from medrobust.attacks.pgd import PGD
from medrobust.attacks.random_noise import RandomNoise
from medrobust.evaluation import CLEAN_CONDITION, Condition
from medrobust.inferers import bind
from medrobust.metrics.l2 import l2
from medrobust.metrics.linf import linf
from medrobust.networks.clip_zero_shot import ZeroShotCLIP
from medrobust.networks.weights import load_weights
from medrobust.ranking import caption_ranks, rank
from medrobust.records import Record, append, read_csv, versions

Case = Mapping[str, Any]


def for_classes(attack: Attack) -> Attack:
    """The attack for one answer an image: without an objective of its own it gets cross-entropy.

    A search for the best image (``criterion`` of APGD) goes by the margin unless it says otherwise: above 0, the answer
    is wrong.
    """
    chosen: dict[str, Any] = {} if attack.objective else {"objective": CrossEntropy()}
    if getattr(attack, "criterion", 0) is None:
        chosen["criterion"] = Margin()
    return replace(attack, **chosen)


def conditions(budgets: Sequence[float], *, steps: int = 20, apgd_steps: int = 100) -> list[Condition]:
    """Clean; then for each eps the noise of that norm, FGSM, PGD and APGD in the Linf ball.

    FGSM and PGD raise the cross-entropy, APGD the difference of logits ratio: models that hide from one often show the
    other.
    """
    found = [CLEAN_CONDITION]
    for eps in budgets:
        attacks: dict[str, Attack] = {
            "noise": RandomNoise(eps=eps),
            "FGSM": FGSM(eps=eps),
            "PGD": PGD(eps=eps, steps=steps),
            "APGD": APGD(eps=eps, steps=apgd_steps, objective=DLR()),
        }
        found += [
            Condition(name=f"{name} {eps * 255:g}/255", attack=attack if attack.blind else for_classes(attack))
            for name, attack in attacks.items()
        ]
    return found


def classify(
    network: ZeroShotCLIP,
    batches: Iterable[Mapping[str, Any]],
    condition: Condition,
    class_names: Sequence[str],
    *,
    model: str = "",
    seed: int = 0,
) -> list[Record]:
    """One condition on all images: the rank of each true class, and how large the perturbation was.

    Args:
        network: it is frozen and in evaluation mode meanwhile.
        batches: with ``image`` (B, C, S, S), ``label`` (B, 1, 1, 1) and ``case``, B names.
        class_names: of the network's prompts, in their order.

    Raises:
        ValueError: as the attack and the ranking say.
    """
    found: list[Record] = []
    attack = condition.attack if isinstance(condition.attack, Attack) else None
    shared: dict[str, Any] = {"condition": condition.name, "attack": condition.text if attack else ""}
    shared |= {"seed": seed, "model": model, "versions": versions()}
    with frozen(network):
        for number, batch in enumerate(batches):
            image, label = batch["image"].as_subclass(Tensor), batch["label"].as_subclass(Tensor)
            image_adv = image
            if attack is not None:
                image_adv = attack(network, image, label, generator=torch.Generator().manual_seed(seed + number))
            with torch.no_grad():
                ranks = rank(network(image_adv), label)
            sizes = [] if attack is None else [("linf", linf(image_adv, image)), ("l2", l2(image_adv, image))]
            for row, case in enumerate(batch["case"]):
                name = class_names[int(label.flatten()[row])]
                found.append(Record(**shared, case=case, metric="rank", class_name=name, value=float(ranks[row, 0])))
                found += [
                    Record(**shared, case=case, metric=metric, value=float(values[row].mean()))
                    for metric, values in sizes
                ]
    return found


def compare(
    network: ZeroShotCLIP,
    weights: Mapping[str, str | Path],
    batches: Iterable[Mapping[str, Any]],
    wanted: Sequence[Condition],
    class_names: Sequence[str],
    folder: str | Path,
    *,
    seed: int = 0,
) -> list[Record]:
    """Several weights of one network under all conditions, into ``folder``.

    It gets ``records.csv``, and ``table.md`` and ``curves.png``, which are made from that file alone. What the file
    holds already is not done again: a run that was stopped goes on.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or do not fit.
    """
    from medrobust.zero_shot_report import curves, table

    folder = Path(folder)
    path = folder / "records.csv"
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(batches)
    for name, file in weights.items():
        model = f"{name} sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]}"
        done = {record.condition for record in _read(path) if record.model == model}
        missing = [condition for condition in wanted if condition.name not in done]
        if missing:
            load_weights(network, file)
        for condition in missing:
            append(classify(network, batches, condition, class_names, model=model, seed=seed), path)
    records = _read(path)
    write_text(folder / "table.md", table(records))
    with replacing(folder / "curves.png") as partial:
        partial.write_bytes(curves(records))
    return records


def retrieve(
    network: ZeroShotCLIP,
    image: Tensor,
    input_ids: Tensor,
    owner: Sequence[int],
    attack: Attack | None = None,
    *,
    target: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack each image against its captions, then rank: ranks (I,) of images, (N,) of captions, and the images.

    Without a target every image is pushed away from all of its own captions; with one it is pulled toward that caption.
    An attack without an objective gets ``Similarity``; with ``target`` it must be ``targeted``.

    Args:
        image: (I, C, S, S) in [0, 1].
        input_ids: (N, L) tokens of all captions.
        owner: which image each caption belongs to.
        target: for each image the number of the caption to come close to.

    Raises:
        ValueError: a target without a targeted attack, or the other way round.
    """
    image_adv = image
    if attack is not None:
        if attack.targeted != (target is not None):
            raise ValueError(f"expected a target caption with a targeted attack and only then, got {target}")
        model = bind(network, None, input_ids)
        attack = replace(
            attack, objective=attack.objective or Similarity(head="sigmoid" if target is None else "softmax")
        )
        if target is None:
            own = torch.as_tensor(owner)[None] == torch.arange(len(image))[:, None]
            label = own.long()[..., None, None]
        else:
            label = torch.as_tensor(target).view(-1, 1, 1, 1)
        image_adv = attack(model, image, label, generator=torch.Generator().manual_seed(seed))
    with frozen(network), torch.no_grad():
        to_text, to_image = caption_ranks(network(image_adv, input_ids), owner)
    return to_text, to_image, image_adv


class SaveAnswers:
    """Write an evaluator's best classes, one row an image: ``case, 1st, its probability, 2nd, ...``.

    Args:
        path: CSV file.
        class_names: of the network's prompts.
        k: how many.
    """

    def __init__(self, path: str | Path, class_names: Sequence[str], *, k: int = 5) -> None:
        self.path = Path(path)
        self.class_names = list(class_names)
        self.k = min(k, len(self.class_names))
        self._rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self._rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def __call__(self, engine: Any) -> None:
        for item in engine.state.output:
            chances, best = item["pred"].as_subclass(Tensor).flatten().softmax(0).topk(self.k)
            row: list[Any] = [item["image"].meta["filename_or_obj"]]
            for chance, number in zip(chances.tolist(), best.tolist(), strict=True):
                row += [self.class_names[number], f"{chance:.4f}"]
            self._rows.append(row)

    def write(self) -> None:
        """Replace the file."""
        header = ["case", *(text for place in range(1, self.k + 1) for text in (f"class_{place}", f"share_{place}"))]
        with replacing(self.path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *self._rows])


def _read(path: Path) -> list[Record]:
    return read_csv(path) if path.is_file() else []
