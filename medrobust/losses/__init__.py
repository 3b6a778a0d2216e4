"""Training losses: between predictions of clean and adversarial images, and published ones. One file a loss."""

from medrobust.losses.double_sigmoid import DoubleSigmoidDiceCE
from medrobust.losses.frequency_consistency import FrequencyConsistencyLoss
from medrobust.losses.kl_consistency import KLConsistencyLoss
from medrobust.losses.objective import LossObjective

__all__ = ["DoubleSigmoidDiceCE", "FrequencyConsistencyLoss", "KLConsistencyLoss", "LossObjective"]
