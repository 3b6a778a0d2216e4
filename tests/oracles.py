"""Small models whose worst case is known, and small data to attack them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class VoxelLinear(nn.Module):
    """Two classes whose logits are linear in each voxel: -gain (x - 1/2) and +gain (x - 1/2).

    The worst image of an Linf ball is known: brighter where the label is 0, darker where it is 1, as far as allowed.
    """

    def __init__(self, gain: float = 6.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, image: Tensor) -> Tensor:
        evidence = self.gain * (image.mean(1, keepdim=True) - 0.5)
        return torch.cat([-evidence, evidence], 1)

    @staticmethod
    def worst(image: Tensor, label: Tensor, eps: float) -> Tensor:
        return (image + eps * (1 - 2 * label.to(image.dtype))).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LinearObjective:
    """Logits against fixed weights, summed per case: linear, so that L2 worst cases are known too."""

    seed: int = 0
    head: str = "softmax"

    def weights(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn((1, *like.shape[1:]), generator=generator).to(like)

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        return (logits * self.weights(logits)).flatten(1).sum(1)


class SmallNet(nn.Module):
    """A fixed random network with everything an attack could disturb: batch norm, dropout, parameters."""

    def __init__(self, spatial_dims: int = 3, channels: int = 1, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if spatial_dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
        self.body = nn.Sequential(conv(channels, 6, 3, padding=1), norm(6), nn.GELU(), nn.Dropout(0.5))
        self.head = conv(6, classes, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image))


def data(spatial_dims: int = 3, batch: int = 2, channels: int = 1, classes: int = 3, side: int = 9, seed: int = 1):
    """A smooth random image in [0.1, 0.9] and a label (batch, 1, *S) that follows it, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    size = [side + axis for axis in range(spatial_dims)]
    image = torch.rand(batch, channels, *size, generator=generator)
    pool = nn.functional.avg_pool3d if spatial_dims == 3 else nn.functional.avg_pool2d
    image = pool(image, 3, stride=1, padding=1, count_include_pad=False)
    image = 0.1 + 0.8 * (image - image.min()) / (image.max() - image.min())
    label = (image[:, :1] * classes).long().clamp(0, classes - 1)
    return image, label


class PromptLinear(nn.Module):
    """Segments what is bright where the prompt holds the given token, and what is dark under any other prompt."""

    def __init__(self, token: int = 1) -> None:
        super().__init__()
        self.token = token
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        sign = torch.where((input_ids == self.token).any(1), 1.0, -1.0)
        return self.scale * sign[:, None, None, None] * (image.mean(1, keepdim=True) - 0.5)
