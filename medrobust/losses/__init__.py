"""Training losses: between predictions of clean and adversarial images, and published ones. One file a loss."""

from medrobust.losses.class_cross_entropy import ClassCrossEntropy
from medrobust.losses.contrastive import ContrastiveLoss
from medrobust.losses.double_sigmoid import DoubleSigmoidDiceCE
from medrobust.losses.frequency_consistency import FrequencyConsistencyLoss
from medrobust.losses.kl_consistency import KLConsistencyLoss
from medrobust.losses.objective import LossObjective
from medrobust.losses.shift import ShiftLoss

__all__ = [
    "ClassCrossEntropy",
    "ContrastiveLoss",
    "DoubleSigmoidDiceCE",
    "FrequencyConsistencyLoss",
    "KLConsistencyLoss",
    "LossObjective",
    "ShiftLoss",
]
