"""Training losses between predictions of clean and adversarial images. One file a loss."""

from medrobust.losses.frequency_consistency import FrequencyConsistencyLoss
from medrobust.losses.kl_consistency import KLConsistencyLoss

__all__ = ["FrequencyConsistencyLoss", "KLConsistencyLoss"]
