"""BIM: iterated FGSM from the clean image (Kurakin et al., ICLR 2017 workshop, 1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from medrobust.attacks.pgd import PGD


@dataclass(frozen=True, kw_only=True, repr=False)
class BIM(PGD):
    """PGD without a random start; the settings are PGD's."""

    random_start: bool = False
