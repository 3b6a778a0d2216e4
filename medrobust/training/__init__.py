"""Adversarial training as handlers on MONAI's own ``SupervisedTrainer``; regimes are lists of handlers.

=========================== ===================================================================================
regime                      handlers
=========================== ===================================================================================
adversarial only            ``CraftAdversarial(attack)``
clean and adversarial       ``CraftAdversarial(attack, to="image_adv")``, ``AdversarialForward()``,
                            ``LossTerm(loss, of=("pred_adv", "label"), name="loss_adv")``
VAFT                        the same with ``VAFA`` and
                            ``LossTerm(FrequencyConsistencyLoss(), of=("pred", "pred_adv"), name="loss_fr")``
TRADES                      ``CraftAdversarial(attack, to="image_adv", label_free=True)``, ``AdversarialForward()``,
                            ``LossTerm(KLConsistencyLoss(), of=("pred", "pred_adv"), weight=6, name="loss_kl")``
noise                       ``CraftAdversarial(GaussianNoise(std=8 / 255))``
fast                        ``CraftAdversarial(PGD(eps=eps, steps=1, step_size=1.25 * eps))``
PIR-AT                      ``CraftAdversarial(BIM(..., keep_best=False))`` from a robust backbone; the sum of gradients
                            that its public code makes instead: ``LeakingAdversarial(BIM(..., keep_best=False))``
free                        ``FreeAdversarial(eps=eps)`` and a loader that gives every batch several times
=========================== ===================================================================================
"""

from medrobust.handlers import CraftAdversarial
from medrobust.schedules import Mix, WarmUp
from medrobust.training.auxiliary import AuxiliaryLoss
from medrobust.training.checkpoints import KeepBest, Resumable
from medrobust.training.checks import StopOnNaN, check, check_attack
from medrobust.training.clip import ClipGradient
from medrobust.training.free import FreeAdversarial
from medrobust.training.leaking import LeakingAdversarial
from medrobust.training.logs import CSVLog, Progress
from medrobust.training.seeds import EpochSeed
from medrobust.training.terms import AdversarialForward, LossTerm

__all__ = [
    "AdversarialForward",
    "AuxiliaryLoss",
    "CSVLog",
    "ClipGradient",
    "CraftAdversarial",
    "EpochSeed",
    "FreeAdversarial",
    "KeepBest",
    "LeakingAdversarial",
    "LossTerm",
    "Mix",
    "Progress",
    "Resumable",
    "StopOnNaN",
    "WarmUp",
    "check",
    "check_attack",
]
