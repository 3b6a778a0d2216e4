"""Shift the intensity of whole anatomical structures at random, as a contrast agent or another patient would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_tensor


class RandStructureContrastd(Randomizable, MapTransform):
    """Add one random offset per structure to the image; every voxel of a structure gets the same offset.

    One scan shows one contrast phase; this lets a network see others. Works on channel-first data before intensity
    scaling, so that the offsets are in the image's own unit (HU for CT).

    Args:
        keys: images to change.
        structures_key: label map on the same grid, integer ids of structures; it is left as it is.
        enhancement: structure id -> (low, high) of the offset, e.g. ``{52: (0, 200)}`` for the aorta. Where in between
            is the mean of two uniform draws, one that all of them share and one of its own: triangular, so values in
            the middle are the likeliest (standard deviation (high - low) / sqrt(24)). ``jitter`` comes on top.
        jitter: half-width of a uniform offset for every structure, id 0 (everything unlabelled) included.
        prob: chance that a case is changed at all.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        structures_key: str,
        enhancement: Mapping[int | str, Sequence[float]],
        jitter: float = 0.0,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys)
        self.structures_key = structures_key
        self.enhancement = {int(structure): (float(low), float(high)) for structure, (low, high) in enhancement.items()}
        self.jitter = jitter
        self.prob = prob

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        case = dict(data)
        if self.R.random_sample() >= self.prob:
            return case
        structures = convert_to_tensor(case[self.structures_key], track_meta=False).long()
        offsets = torch.as_tensor(self._draw(int(structures.max())))
        for key in self.key_iterator(case):
            image = case[key]
            case[key] = image + offsets.to(image.dtype)[structures]
        return case

    def _draw(self, largest: int) -> Any:
        """One offset per structure id 0..largest. All enhancements share one phase, as one injection does."""
        offsets = self.R.uniform(-self.jitter, self.jitter, size=max(largest, *self.enhancement, 0) + 1)
        phase = self.R.random_sample()
        for structure, (low, high) in self.enhancement.items():
            own = 0.5 * (phase + self.R.random_sample())
            offsets[structure] += low + own * (high - low)
        return offsets
