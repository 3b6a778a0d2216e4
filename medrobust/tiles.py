"""The protocol of the literature: attack disjoint tiles of a volume one by one, then put them together.

Tiles are as large as the network's window and lie side by side; the last one of an axis is pulled back into the volume,
and where it overlaps its neighbour the later one wins (VAFA's published procedure, 2307.07269). The model that is
evaluated afterwards sees overlapping windows that were never attacked as such, so robustness looks better than it is:
attack the whole volume through :func:`medrobust.inferers.bind` to measure what is deployed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import dense_patch_slices
from torch import Tensor

from medrobust.attacks.base import Attack, Model


def attack_tiles(
    attack: Attack,
    network: Model,
    image: Tensor,
    label: Tensor,
    roi_size: Sequence[int] | int,
    *,
    tile_batch_size: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack every tile of ``image`` (B, C, *S) by itself; return the assembled adversarial image (B, C, *S).

    Args:
        attack: any attack; its threat model holds tile by tile.
        network: tile (B, C, *roi_size) -> logits.
        label: (B, 1, *S) or (B, K, *S).
        roi_size: tile size, one for all spatial axes or one each; below 1 is the whole axis. A volume smaller than a
            tile is padded with zeros and cropped back.
        tile_batch_size: tiles attacked in one batch.
        generator: source of all chance.
    """
    image, label = image.as_subclass(Tensor).float(), label.as_subclass(Tensor)
    size = image.shape[2:]
    wanted = [roi_size] * len(size) if isinstance(roi_size, int) else list(roi_size)
    roi_size = [r if r and r > 0 else s for r, s in zip(wanted, size, strict=True)]
    generator = generator or torch.Generator().manual_seed(0)
    missing = [max(r - s, 0) for r, s in zip(roi_size, size, strict=True)]
    padding = [width for m in reversed(missing) for width in (0, m)]
    clean, reference = F.pad(image, padding), F.pad(label, padding)
    adversarial = clean.clone()
    places = dense_patch_slices(clean.shape[2:], roi_size, roi_size)
    for start in range(0, len(places), tile_batch_size):
        batch = places[start : start + tile_batch_size]
        tiles = torch.cat([clean[(..., *place)] for place in batch])
        tiles_adv = attack(
            network, tiles, torch.cat([reference[(..., *place)] for place in batch]), generator=generator
        )
        for place, tile_adv in zip(batch, tiles_adv.chunk(len(batch)), strict=True):
            adversarial[(..., *place)] = tile_adv
    inner: tuple[Any, ...] = (..., *(slice(s) for s in size))
    return adversarial[inner]
