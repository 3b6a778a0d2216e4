"""Is any other package's attack stronger than ours at equal gradients, each with its own defaults?

Two questions: what Dice is left at a fixed eps, and what the smallest eps is that breaks a case. Attacks on classifiers
get the network behind a head of two logits (:class:`Judge`), and as few of them know volumes, images as (B, C, H, W D).
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import subjects
import torch
import torch.nn.functional as F
from cells import Cells
from torch import Tensor, nn

from medrobust.attacks import APGD, BIM, MIFGSM, PGD, CosPGD, CrossEntropy, DiceCE, HardDice, SegPGD, SoftDice
from medrobust.attacks.base import Attack
from medrobust.attacks.norms import Norm, ball
from medrobust.attacks.objectives import Head, Objective, is_softmax, predict
from medrobust.attacks.scores import MissedForeground
from medrobust.attacks.voxel_losses import CosPGDLoss, SegPGDLoss
from medrobust.minimum_eps import MinimumEps

warnings.filterwarnings("ignore")

NORMS: tuple[Norm, ...] = ("linf", "l2")
BUDGETS = (20, 100)
SMALLEST_BUDGET = 200
"""Gradients a case in the search for the smallest eps."""

TOLERANCE = 0.01
"""In Dice; relative for the smallest eps."""

LONG = "toy 2-D, 4 structures"
SEARCHED = ("UNETR", "UPerNet", "UPerNet, PIR-AT", "toy 3-D, bones", LONG, "toy 2-D, sigmoids")
SEED = 0
LOST = 0.1
"""Of the foreground voxels that were right, at most this share is left where the foreground counts as lost."""

GOALS = {"dice": "Dice of the case halved", "lost": "90 % of the right foreground voxels lost"}


def tables(cells: Cells, names: list[str], *, everything: bool = False) -> None:
    """Both tables as Markdown, on standard output.

    Args:
        everything: the whole grid, which takes hours; else 100 gradients on ``LONG`` in Linf balls alone, and the
            smallest eps of ``SEARCHED``.
    """
    _without_plots()
    _without_compiling()
    for steps in BUDGETS:
        for norm in NORMS:
            long = [name for name in names if everything or (name == LONG and norm == "linf")]
            asked = names if steps == BUDGETS[0] else long
            if asked:
                _fixed_table(cells, asked, norm, steps)
    searched = [name for name in names if everything or name in SEARCHED]
    for norm in NORMS:
        for goal in GOALS:
            _smallest_table(cells, searched, norm, goal)


# ---------------------------------------------------------------------------------------------------- what they attack


class Counted(nn.Module):
    """The network, and how many gradients and bare forwards were asked of it, all cases together."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.gradients = self.forwards = 0

    def forward(self, image: Tensor) -> Tensor:
        if torch.is_grad_enabled() and image.requires_grad:
            self.gradients += len(image)
        else:
            self.forwards += len(image)
        return self.model(image)  # type: ignore[no-any-return]


class Judge(nn.Module):
    """(B, C, H, W D) -> (B, 2): the loss on the clean image and on this one, so that a larger loss is a wrong class."""

    def __init__(self, model: nn.Module, objective: Objective, image: Tensor, label: Tensor) -> None:
        super().__init__()
        self.model, self.objective, self.label, self.shape = model, objective, label, image.shape
        with torch.no_grad():
            self.clean = objective(model(image), label) + 1e-4  # more than rounding, less than any attack
        self.eval()  # some attacks bring back the mode that they found

    def forward(self, image: Tensor) -> Tensor:
        cases = len(image)  # ART tries one blank image first
        if cases < self.shape[0] and image.requires_grad:
            raise ValueError(f"expected all {self.shape[0]} cases, got {cases}: whose labels are theirs?")
        logits = self.model(image.reshape(cases, *self.shape[1:]).float())
        return torch.stack([self.clean[:cases], self.objective(logits, self.label[:cases])], 1)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack on one subject's cases: what all attacks are told.

    Attributes:
        model: counts what is asked of it.
        objective: what an attack that can climb anything shall climb.
    """

    subject: subjects.Subject
    model: Counted
    objective: Objective
    norm: Norm
    eps: float
    steps: int

    @property
    def flat(self) -> Tensor:
        """The images as attacks on pictures want them, (B, C, H, W D)."""
        return self.subject.image.reshape(*self.subject.image.shape[:3], -1)

    @property
    def first(self) -> Tensor:
        """The class of every clean image, as the judge sees it."""
        return torch.zeros(len(self.subject.image), dtype=torch.long)

    @property
    def p(self) -> float:
        return math.inf if self.norm == "linf" else 2

    def judge(self) -> Judge:
        return Judge(self.model, self.objective, self.subject.image, self.subject.label)


def pixels(logits: Tensor, label: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(B, K, 1, V) and (B, 1, V), as for a picture of one row; a sigmoid is a choice between two classes."""
    if is_softmax(logits, head):
        return logits.flatten(2)[:, :, None], label.flatten(1)[:, None].long()
    margin = logits.flatten(1)[:, None]
    return torch.stack([torch.zeros_like(margin), margin], 1), label.flatten(1)[:, None].long()


# -------------------------------------------------------------------------------------------- peers at a fixed eps


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An attack of another package or paper.

    Attributes:
        kind: our attack that it is compared with.
        run: gives the adversarial images.
        norms: those that it knows.
        own_loss: the loss belongs to the attack; otherwise it climbs cross-entropy and soft Dice in turn.
    """

    name: str
    kind: str
    run: Callable[[Trial], Tensor]
    norms: tuple[Norm, ...] = NORMS
    own_loss: bool = False


def _torchattacks_pgd(trial: Trial) -> Tensor:
    import torchattacks

    cls = torchattacks.PGD if trial.norm == "linf" else torchattacks.PGDL2
    return cls(trial.judge(), eps=trial.eps, steps=trial.steps)(trial.flat, trial.first)


def _torchattacks_mifgsm(trial: Trial) -> Tensor:
    import torchattacks

    return torchattacks.MIFGSM(trial.judge(), eps=trial.eps, steps=trial.steps)(trial.flat, trial.first)


def _torchattacks_apgd(trial: Trial) -> Tensor:
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[trial.norm]
    attack = torchattacks.APGD(trial.judge(), norm=norm, eps=trial.eps, steps=trial.steps)
    # Its plain call returns the last wrong image; this, the one of the highest loss.
    return attack.perturb(trial.flat, trial.first, best_loss=True)[1]


def _foolbox(linf: str, l2: str) -> Callable[[Trial], Tensor]:
    def run(trial: Trial) -> Tensor:
        import foolbox

        attack = getattr(foolbox.attacks, linf if trial.norm == "linf" else l2)(steps=trial.steps)
        model = foolbox.PyTorchModel(trial.judge(), bounds=(0, 1), device="cpu")
        return attack.run(model, trial.flat, trial.first, epsilon=trial.eps)

    return run


def _art(name: str) -> Callable[[Trial], Tensor]:
    """Its step is a third of its eps, 0.1 of 0.3; kept as a ratio."""

    def run(trial: Trial) -> Tensor:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        logging.getLogger("art").setLevel(logging.ERROR)
        shape = trial.flat.shape[1:]
        bounds = (0.0, 1.0)
        ce = nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(trial.judge(), ce, shape, 2, clip_values=bounds, device_type="cpu")
        settings = {"eps": trial.eps, "eps_step": trial.eps / 3, "max_iter": trial.steps, "norm": trial.p}
        attack = getattr(evasion, name)(classifier, batch_size=len(trial.flat), verbose=False, **settings)
        one_hot = np.eye(2, dtype=np.float32)[trial.first.numpy()]
        return torch.from_numpy(attack.generate(trial.flat.numpy(), y=one_hot))

    return run


def _adv_lib_pgd(trial: Trial) -> Tensor:
    from adv_lib.attacks import pgd_linf

    return pgd_linf(trial.judge(), trial.flat, trial.first, trial.eps, steps=trial.steps)


def _adv_lib_apgd(trial: Trial) -> Tensor:
    """The run inside its ``apgd``, whose ``best_loss=True`` forgets ``n_iter``; its default loss needs three logits."""
    from adv_lib.attacks.auto_pgd import _apgd

    eps = torch.full((len(trial.flat),), trial.eps)
    judge, flat, first = trial.judge(), trial.flat, trial.first
    return _apgd(judge, flat, first, eps, trial.p, n_iter=trial.steps, loss_function="ce")[0]


def _published(loss: Callable[[Trial, Tensor, int], Tensor], ratio: float) -> Callable[[Trial], Tensor]:
    """Steps of ``ratio`` eps along the gradient's sign from a random start; the last image, as published."""

    def run(trial: Trial) -> Tensor:
        image, threat, unit = trial.subject.image, ball(trial.norm, trial.eps), trial.eps
        noise = torch.rand_like(image) * 2 - 1 if trial.norm == "linf" else _direction(torch.randn_like(image), "l2")
        image_adv = threat.project(image + unit * noise, image)
        for step in range(trial.steps):
            image_adv = image_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(trial, trial.model(image_adv), step).sum(), image_adv)
            move = ratio * unit * _direction(gradient, trial.norm)
            image_adv = threat.project(image_adv.detach() + move, image)
        return image_adv

    return run


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    return gradient.sign() if norm == "linf" else F.normalize(gradient.flatten(1), dim=1).view_as(gradient)


def _segpgd(trial: Trial, logits: Tensor, step: int) -> Tensor:
    """2207.12391, Eq. 4 and 5, lambda = (t - 1) / 2 T for t = 1 .. T."""
    u, y = pixels(logits, trial.subject.label, trial.subject.head)
    lambda_ = step / (2 * trial.steps)
    weight = torch.where(u.argmax(1) == y, 1 - lambda_, lambda_)
    return (weight * F.cross_entropy(u, y, reduction="none")).flatten(1).mean(1)


def _cospgd(trial: Trial, logits: Tensor, step: int) -> Tensor:
    """2302.02213, Eq. 5: cross-entropy times the cosine of softmax and one-hot label, which is held fixed."""
    u, y = pixels(logits, trial.subject.label, trial.subject.head)
    hot = F.one_hot(y, u.shape[1]).movedim(-1, 1).to(u)
    alike = F.cosine_similarity(u.softmax(1), hot, dim=1).detach()
    return (alike * F.cross_entropy(u, y, reduction="none")).flatten(1).mean(1)


def _dice_ce(trial: Trial, logits: Tensor, step: int) -> Tensor:
    """What VAFA's repository climbs with PGD: MONAI's DiceCE, background included, squared denominators."""
    return DiceCE(head=trial.subject.head)(logits, trial.subject.label)


# The step of SegPGD and CosPGD is 0.01 for eps = 8/255; of VAFA's PGD the same for 4/255. Kept as ratios, L2 too.
PEERS = (
    Peer(name="torchattacks PGD", kind="PGD", run=_torchattacks_pgd),
    Peer(name="torchattacks MIFGSM", kind="MIFGSM", run=_torchattacks_mifgsm, norms=("linf",)),
    Peer(name="torchattacks APGD", kind="APGD", run=_torchattacks_apgd),
    Peer(name="Foolbox PGD", kind="PGD", run=_foolbox("LinfPGD", "L2PGD")),
    Peer(name="Foolbox AdamPGD", kind="PGD", run=_foolbox("LinfAdamPGD", "L2AdamPGD")),
    Peer(
        name="Foolbox BIM",
        kind="BIM",
        run=_foolbox("LinfBasicIterativeAttack", "L2BasicIterativeAttack"),
    ),
    Peer(
        name="Foolbox MIFGSM",
        kind="MIFGSM",
        run=_foolbox("LinfMomentumIterativeFastGradientMethod", "L2MomentumIterativeFastGradientMethod"),
    ),
    Peer(name="ART PGD", kind="PGD", run=_art("ProjectedGradientDescentPyTorch")),
    Peer(name="ART APGD", kind="APGD", run=_art("AutoProjectedGradientDescent")),
    Peer(name="adv_lib PGD", kind="PGD", run=_adv_lib_pgd, norms=("linf",)),
    Peer(name="adv_lib APGD", kind="APGD", run=_adv_lib_apgd),
    Peer(name="SegPGD as published", kind="SegPGD", run=_published(_segpgd, 0.01 * 255 / 8), own_loss=True),
    Peer(name="CosPGD as published", kind="CosPGD", run=_published(_cospgd, 0.01 * 255 / 8), own_loss=True),
    Peer(name="PGD of VAFA", kind="PGD", run=_published(_dice_ce, 0.01 * 255 / 4), own_loss=True),
)


def losses(head: Head) -> dict[str, Objective]:
    return {"CE": CrossEntropy(head=head), "soft Dice": SoftDice(head=head)}


def ours(head: Head, norm: Norm, eps: float, steps: int) -> dict[str, Attack]:
    """Our attacks at their defaults; of some also the form that climbs cross-entropy."""
    settings: dict[str, Any] = {"norm": norm, "eps": eps, "steps": steps}
    soft: dict[str, Any] = {**settings, "objective": SoftDice(head=head)}
    ce: dict[str, Any] = {**settings, "objective": CrossEntropy(head=head)}
    return {
        "PGD": PGD(**soft),
        "BIM": BIM(**soft),
        "MIFGSM": MIFGSM(**soft),
        "APGD": APGD(**soft),
        "CosPGD": CosPGD(**settings, objective=CosPGDLoss(head=head)),
        "SegPGD": SegPGD(**settings, objective=SegPGDLoss(head=head)),
        "PGD, CE": PGD(**ce),
        "BIM, CE": BIM(**ce),
        "MIFGSM, CE": MIFGSM(**ce),
        "APGD, CE": APGD(**ce),
    }


def _fixed_table(cells: Cells, names: list[str], norm: Norm, steps: int) -> None:
    found: dict[str, list[Any]] = {}
    kinds = {}
    for column, name in enumerate(names):
        for row, kind, value in _fixed_column(cells, name, norm, steps):
            found.setdefault(row, [None] * len(names))[column] = value
            kinds[row] = kind
    best = {}
    for column in range(len(names)):
        dices = [found[row][column] for row in found if kinds[row] is None]
        best[column] = min((value["dice"] for value in dices if value), default=math.inf)
    print(f"\n### Dice left, {norm}, {steps} gradients a case\n")
    print("| attack | gradients + forwards | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    stronger = []
    for row, values in found.items():
        asked = {value["asked"] for value in values if value and "asked" in value}
        print(f"| {row} | {', '.join(sorted(asked))} | " + " | ".join(_text(value) for value in values) + " |")
        for column, value in enumerate(values):
            if kinds[row] and value and "dice" in value:
                same = (found[f"our {kinds[row]}"][column] or {}).get("dice", math.inf)
                if math.isfinite(same) and value["dice"] < same - TOLERANCE:
                    stronger.append(
                        f"peer stronger: {names[column]}, {norm}, {steps}: {row} {value['dice']:.3f}, "
                        f"our {kinds[row]} {same:.3f}, best of ours {best[column]:.3f}"
                        + (" (ahead of all of ours)" if value["dice"] < best[column] - TOLERANCE else "")
                    )
    print(
        "| **best of ours** | | "
        + " | ".join(f"{value:.3f}" if value < math.inf else "" for value in best.values())
        + " |\n"
    )
    print("\n".join(stronger) or "no peer is stronger")
    _print_failures(found)


def _fixed_column(cells: Cells, name: str, norm: Norm, steps: int) -> Iterator[tuple[str, str | None, Any]]:
    """Row, our attack that it is compared with (``None`` for our own), and what was measured."""
    subject = subjects.load(name)
    eps = subject.eps if norm == "linf" else subject.eps_l2
    key = {"table": "fixed eps", "subject": name, "norm": norm, "steps": steps, "seed": SEED}

    def ask(run: Callable[[Trial], Tensor], objective: Objective, **more: str) -> Any:
        trial = {"subject": subject, "objective": objective, "norm": norm, "eps": eps, "steps": steps}
        return cells({**key, **more}, lambda: _dice(run, Trial(model=Counted(subject.model), **trial)))

    for label, attack in ours(subject.head, norm, eps, steps).items():
        value = ask(_run_ours(attack), attack.setting("objective"), attack=f"our {label}", settings=repr(attack))
        yield f"our {label}", None, value
    for peer in PEERS:
        if norm in peer.norms:
            for loss, objective in losses(subject.head).items():
                if not peer.own_loss:
                    value = ask(peer.run, objective, attack=peer.name, loss=loss)
                    yield f"{peer.name}, {loss}", peer.kind, value
            if peer.own_loss:
                yield peer.name, peer.kind, ask(peer.run, CrossEntropy(head=subject.head), attack=peer.name)


def _run_ours(attack: Attack) -> Callable[[Trial], Tensor]:
    def run(trial: Trial) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return attack(trial.model, trial.subject.image, trial.subject.label, generator=generator)

    return run


def _dice(run: Callable[[Trial], Tensor], trial: Trial) -> dict[str, Any]:
    """Mean Dice left and what was asked of the network for each case, or why there is no number."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # ART draws from it
    image = trial.subject.image
    try:
        image_adv = run(trial).detach().reshape(image.shape)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    size = torch.linalg.vector_norm((image_adv - image).flatten(1), ord=trial.p, dim=1).max().item()
    if not (size <= trial.eps * 1.001 and image_adv.min() >= -1e-6 and image_adv.max() <= 1 + 1e-6):
        return {"failed": f"outside the ball: {size / trial.eps:.3f} eps"}
    cases = len(image)
    asked = f"{trial.model.gradients / cases:g} + {trial.model.forwards / cases:g}"
    return {"dice": round(trial.subject.dice(image_adv).mean().item(), 4), "asked": asked}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value['dice']:.3f}" if "dice" in value else "-"


def _print_failures(found: dict[str, list[Any]]) -> None:
    """Why there is no number, each reason once."""
    reasons = {
        (row, value["failed"]): None for row, values in found.items() for value in values if value and "failed" in value
    }
    for row, reason in reasons:
        print(f"no number: {row}: {reason}")


# ------------------------------------------------------------------------------------------------- the smallest eps


class Watch(nn.Module):
    """A network on one case that keeps the size of the smallest image that reached each goal, of all it ever saw.

    Attributes:
        half: half of the clean image's Dice.
        mask: foreground voxels that are right on the clean image, in the shape of the label.
        smallest: by goal and norm.
    """

    def __init__(self, subject: subjects.Subject, image: Tensor, label: Tensor) -> None:
        super().__init__()
        self.model, self.head, self.image, self.label = subject.model, subject.head, image, label
        self.gradients = self.forwards = 0
        with torch.no_grad():
            logits = self.model(image)
        self.dice = HardDice(head=self.head)
        self.half = (1 - self.dice(logits, label)).item() / 2
        self.mask = (label > 0) & (predict(logits, self.head) == label)
        self.smallest = {(goal, norm): math.inf for goal in GOALS for norm in NORMS}

    @property
    def kept(self) -> Tensor:
        """The label with a say for the voxels of ``mask`` only."""
        return torch.where(self.mask, self.label, -1)

    def forward(self, image: Tensor) -> Tensor:
        if torch.is_grad_enabled() and image.requires_grad:
            self.gradients += 1
        else:
            self.forwards += 1
        logits = self.model(image)
        if self.gradients <= SMALLEST_BUDGET:
            with torch.no_grad():
                self._note(image.detach(), logits.detach())
        return logits  # type: ignore[no-any-return]

    def hit(self, goal: str, logits: Tensor) -> bool:
        if goal == "dice":
            return (1 - self.dice(logits, self.label)).item() < self.half
        right = (predict(logits, self.head) == self.label) & self.mask
        return right.sum().item() <= LOST * self.mask.sum().item()

    def _note(self, image: Tensor, logits: Tensor) -> None:
        if image.min() < -1e-6 or image.max() > 1 + 1e-6:
            return
        delta = (image - self.image).flatten()
        sizes = {"linf": delta.abs().max().item(), "l2": delta.norm().item()}
        for goal in GOALS:
            if self.hit(goal, logits):
                for norm, size in sizes.items():
                    self.smallest[goal, norm] = min(self.smallest[goal, norm], size)


class AsPixels(nn.Module):
    """Logits as for a picture of one row."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def forward(self, image: Tensor) -> Tensor:
        return pixels(self.watch(image), self.watch.label, self.watch.head)[0]


class Broken(nn.Module):
    """(1, 2) for attacks on classifiers: class 0 until the goal is reached, with the slope of its soft form."""

    def __init__(self, watch: Watch, goal: str) -> None:
        super().__init__()
        self.watch, self.goal = watch, goal

    def forward(self, image: Tensor) -> Tensor:
        watch, logits = self.watch, self.watch(image)
        if self.goal == "dice":
            soft = 1 - SoftDice(head=watch.head)(logits, watch.label) - watch.half
            hard = 1 - watch.dice(logits, watch.label) - watch.half
        else:
            u, y = pixels(logits, watch.label, watch.head)
            mask = watch.mask.flatten(1)[:, None]
            soft = u.softmax(1).gather(1, y[:, None])[:, 0][mask].mean()[None] - LOST
            hard = (u.argmax(1) == y)[mask].float().mean()[None] - LOST
        above = soft + (hard - soft).detach() - 1e-6
        return torch.stack([above, torch.zeros_like(above)], 1)


Search = Callable[[Watch, str], Any]
"""Search for the smallest image that reaches a goal; the watch looks on."""


def _segmentation(name: str, threshold: float, steps: str = "num_steps", **settings: Any) -> Search:
    """An attack of adv_lib on the foreground voxels that are right, until this share of them has flipped.

    ALMA-prox cannot attack fewer than three classes: its loss divides by the distance to the third.
    """

    def search(watch: Watch, goal: str) -> None:
        from adv_lib.attacks import segmentation

        y = watch.label.flatten(1)[:, None].long()
        masks = watch.mask.flatten(1)[:, None]
        budget = {steps: SMALLEST_BUDGET}
        attack = getattr(segmentation, name)
        attack(AsPixels(watch), watch.image, y, masks=masks, adv_threshold=threshold, **budget, **settings)

    return search


def _classifier(name: str, **settings: Any) -> Search:
    def search(watch: Watch, goal: str) -> None:
        from adv_lib import attacks

        first = torch.zeros(1, dtype=torch.long)
        getattr(attacks, name)(Broken(watch, goal), watch.image, first, steps=SMALLEST_BUDGET, **settings)

    return search


def _without_compiling() -> None:
    """adv_lib compiles a function of ALMA-prox, which takes minutes on a CPU."""
    import torch._dynamo

    torch._dynamo.config.disable = True


def _without_plots() -> None:
    """adv_lib imports torchvision, for a distance, and visdom, for plots; neither is used here."""
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "visdom"):
        try:
            import_module(name)
        except Exception:
            sys.modules[name] = types.ModuleType(name)
    for name in ("models", "transforms"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    if not hasattr(sys.modules["visdom"], "Visdom"):
        sys.modules["visdom"].Visdom = object  # type: ignore[attr-defined]


def searches(norm: Norm) -> dict[str, tuple[Search, bool]]:
    """Peers by name, and whether one run serves all goals. Of the share to flip only ALMA-prox makes use on its way."""
    p = math.inf if norm == "linf" else 2
    found: dict[str, tuple[Search, bool]] = {"adv_lib PDPGD": (_segmentation("pdpgd", 1 - LOST, norm=p), True)}
    if norm == "linf":
        for share in (0.5, 0.7, 1 - LOST):
            found[f"adv_lib ALMA-prox, {share:.0%}"] = (_segmentation("alma_prox", share), True)
    else:
        found["adv_lib PDGD"] = (_segmentation("pdgd", 1 - LOST), True)
        found["adv_lib ASMA"] = (_segmentation("asma", 1 - LOST), True)
        found["adv_lib DDN"] = (_classifier("ddn"), False)
    # 0.5 is its default, 0.003 what the authors of ALMA-prox gave it (2206.07179).
    for gamma in (0.5, 0.003):
        found[f"adv_lib DAG, {gamma:g}"] = (_segmentation("dag", 1 - LOST, "max_iter", γ=gamma, p=p), True)
    found["adv_lib FMN"] = (_classifier("fmn", norm=p), False)
    return found


def _most(subject: subjects.Subject, norm: Norm) -> float:
    """The largest eps that is asked about: a case that needs more is unsolved."""
    return 32 / 255 if norm == "linf" else 4 * subject.eps_l2


def minimum(subject: subjects.Subject, norm: Norm, goal: str) -> MinimumEps:
    """Ours: at most 200 gradients, 40 in attacks and 160 in the walk; each case gets its own threshold."""
    most, head = _most(subject, norm), subject.head
    if goal == "dice":
        climb = APGD(norm=norm, steps=10, objective=SoftDice(head=head))
        return MinimumEps(attack=climb, most=most, rounds=3, walk=160, criterion=HardDice(head=head))
    attack = CosPGD(norm=norm, steps=10, random_start=False, objective=CosPGDLoss(head=head))
    return MinimumEps(attack=attack, most=most, rounds=3, walk=160, criterion=MissedForeground(head=head))


def _smallest_ours(search: MinimumEps, watch: Watch, goal: str) -> float:
    label = watch.label if goal == "dice" else watch.kept
    below = watch.half if goal == "dice" else LOST + 1e-6
    return replace(search, below=below)(watch, watch.image, label).eps.item()


def _smallest_table(cells: Cells, names: list[str], norm: Norm, goal: str) -> None:
    unit = 255 if norm == "linf" else 1
    found: dict[str, list[Any]] = {}
    for column, name in enumerate(names):
        for row, value in _smallest_column(cells, name, norm, goal):
            found.setdefault(row, [None] * len(names))[column] = value
    print(f"\n### Smallest eps ({norm}{', /255' if unit == 255 else ''}), median of cases: {GOALS[goal]}\n")
    print("| attack | gradients + forwards | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    smaller = []
    for row, values in found.items():
        cells_ = [_median(value) for value in values]
        asked = {value["asked"] for value in values if value and "asked" in value}
        shown = [cell if isinstance(cell, str) else f"{unit * cell:.3f}" for cell in cells_]
        print(f"| {row} | {', '.join(sorted(asked))} | " + " | ".join(shown) + " |")
        for column, cell in enumerate(cells_):
            mine = _median(found["ours"][column])
            if not row.startswith("ours") and isinstance(cell, float) and mine not in ("", "-"):
                best = mine if isinstance(mine, float) else math.inf
                if cell < best * (1 - TOLERANCE):
                    where = f"{names[column]}, {norm}, {goal}"
                    smaller.append(f"peer smaller: {where}: {row} {unit * cell:.3f}, ours {unit * best:.3f}")
    print("\n" + ("\n".join(smaller) or "no peer is smaller"))
    _print_failures(found)


def _median(value: Any) -> float | str:
    """Over the cases, or what stands for it."""
    if value is None:
        return ""
    if "failed" in value:
        return "-"
    middle = statistics.median(math.inf if eps is None else eps for eps in value["eps"])
    return middle if math.isfinite(middle) else "unsolved"


def _smallest_column(cells: Cells, name: str, norm: Norm, goal: str) -> Iterator[tuple[str, Any]]:
    subject = subjects.load(name)
    key = {"table": "smallest eps", "subject": name, "norm": norm, "gradients": SMALLEST_BUDGET, "seed": SEED}
    search, most = minimum(subject, norm, goal), _most(subject, norm)
    settings = {"goal": goal, "attack": "ours", "settings": repr(search)}
    value = cells({**key, **settings}, lambda: _all_cases(subject, norm, goal, search))
    yield "ours", _only(value, goal, most)
    yield "ours, every image seen", _only(value and value.get("seen", value), goal, most)
    for row, (peer, serves_all) in searches(norm).items():
        more = {} if serves_all else {"goal": goal}
        value = cells({**key, **more, "attack": row}, lambda p=peer: _all_cases(subject, norm, goal, p))
        yield row, _only(value, goal, most)


def _only(value: Any, goal: str, most: float) -> Any:
    """What was measured, for one of the goals; ``None`` for a case that took more than ``most``, up to rounding."""
    if value is None or "failed" in value:
        return value
    eps = [None if size is None or size > most * 1.001 else size for size in value[goal]]
    return {"eps": eps, "asked": value["asked"]}


def _all_cases(subject: subjects.Subject, norm: Norm, goal: str, search: Search | MinimumEps) -> dict[str, Any]:
    """Smallest eps of each case, by goal; ``None`` is infinite (JSON has no such number)."""
    found: dict[str, list[float]] = {name: [] for name in GOALS}
    own: list[float] = []
    gradients, forwards = [], []
    for image, label in zip(subject.image.split(1), subject.label.split(1), strict=True):
        torch.manual_seed(SEED)
        watch = Watch(subject, image, label)
        if not watch.mask.any():
            continue  # nothing to lose
        try:
            if isinstance(search, MinimumEps):
                own.append(_smallest_ours(search, watch, goal))
            else:
                search(watch, goal)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"[:200]}
        for name in GOALS:
            found[name].append(watch.smallest[name, norm])
        gradients.append(watch.gradients)
        forwards.append(watch.forwards)
    asked = f"{statistics.mean(gradients):.0f} + {statistics.mean(forwards):.0f}"
    seen = {**{name: [_number(eps) for eps in values] for name, values in found.items()}, "asked": asked}
    return seen if not own else {goal: [_number(eps) for eps in own], "asked": asked, "seen": seen}


def _number(eps: float) -> float | None:
    return round(eps, 7) if math.isfinite(eps) else None
