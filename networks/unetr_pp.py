"""UNETR++ (Shaker et al., IEEE TMI 2024, https://arxiv.org/abs/2212.04497): a hierarchical transformer for volumes.

Attention over all pairs of voxels is too dear in 3-D. UNETR++ pairs two cheap kinds, which share queries and keys:
every voxel looks at ``p`` learned summaries of the volume (spatial), and every channel looks at the other channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = 4
HALF = (2, 2, 2)


class UNETRPP(nn.Module):
    """UNETR++ for 3-D segmentation: image ``(B, in_channels, H, W, D)`` -> logits ``(B, out_channels, H, W, D)``.

    The axes are in MONAI's order, so the thin axis of ACDC and Synapse is the **last** one here; the authors have it
    first. What they released differs between data sets in more than its size:

    ========  =============  ===========  =================  ===============  ==========  ============
    data set  img_size       stem_stride  shared_projection  convs_per_block  parameters  in the paper
    ========  =============  ===========  =================  ===============  ==========  ============
    Synapse   128, 128, 64   4, 4, 2      True               1                42,952,850  42.96 M
    ACDC      160, 160, 16   4, 4, 1      False              2                66,796,404  66.8 M
    ========  =============  ===========  =================  ===============  ==========  ============

    Parameters are counted with deep supervision and 14 and 4 classes, as released.

    As in the released code and not in the paper's formula, queries have unit length and a temperature per head is
    learned, where the paper divides by the root of the channels. As in the paper and not in the released code, every
    voxel keeps its own spatial attention: the code reshapes that branch in an order which mixes voxels with channels,
    so the released weights would not give their results here.

    Args:
        in_channels: channels of the image.
        out_channels: classes K; 1 means one sigmoid channel.
        img_size: (H, W, D) of every image, a multiple of 8 times ``stem_stride``. Positions and summaries are learned
            for this size: use a sliding window for other volumes.
        feature_size: channels at full resolution; the first three stages have 2, 4 and 8 times as many.
        hidden_size: channels of the deepest stage.
        num_heads: attention heads; divides the channels of every stage.
        norm_name: normalisation of the two blocks at full resolution. Blocks with attention always use batch norm.
        dropout_rate: of attention weights and of channels. Released: 0.1, but 0.15 for Synapse's attention weights.
        stem_stride: size and stride of the first patches.
        depths: blocks in each encoder stage. The decoder's stages have as many as the encoder's of their size.
        proj_size: summaries p at each stage, the same in encoder and decoder.
        shared_projection: summarise keys and values with one matrix rather than two.
        convs_per_block: residual blocks after each attention.
        deep_supervision: in training mode, return ``[logits, at 1 / stem_stride, at half of that]`` rather than one
            tensor. In evaluation mode it is one tensor always.

    Raises:
        ValueError: at construction or call, if sizes do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int],
        feature_size: int = 16,
        hidden_size: int = 256,
        num_heads: int = 4,
        norm_name: tuple | str = "instance",
        dropout_rate: float = 0.1,
        *,
        stem_stride: Sequence[int] = (4, 4, 2),
        depths: Sequence[int] = (3, 3, 3, 3),
        proj_size: Sequence[int] = (64, 64, 64, 32),
        shared_projection: bool = True,
        convs_per_block: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        channels = (2 * feature_size, 4 * feature_size, 8 * feature_size, hidden_size)
        self.shape = (in_channels, *img_size)
        self.deep_supervision = deep_supervision
        _check(img_size, stem_stride, channels, num_heads, depths, proj_size)
        first = [size // step for size, step in zip(img_size, stem_stride, strict=True)]
        tokens = [math.prod(size // 2**stage for size in first) for stage in range(STAGES)]

        def blocks(stage: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    Block(
                        tokens[stage],
                        channels[stage],
                        num_heads,
                        proj_size[stage],
                        shared_projection=shared_projection,
                        convs=convs_per_block,
                        dropout_rate=dropout_rate,
                    )
                    for _ in range(depths[stage])
                )
            )

        stem = (stem_stride[0], stem_stride[1], stem_stride[2])
        widths = pairwise((in_channels, *channels))
        self.down = nn.ModuleList(
            _downsample(*pair, step) for pair, step in zip(widths, (stem, HALF, HALF, HALF), strict=True)
        )
        self.encoder = nn.ModuleList(blocks(stage) for stage in range(STAGES))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(channels[stage + 1], channels[stage], HALF, stride=HALF, bias=False)
            for stage in range(STAGES - 1)
        )
        self.decoder = nn.ModuleList(blocks(stage) for stage in range(STAGES - 1))
        self.full_skip = UnetResBlock(3, in_channels, feature_size, kernel_size=3, stride=1, norm_name=norm_name)
        self.full_up = nn.ConvTranspose3d(channels[0], feature_size, stem, stride=stem, bias=False)
        self.full = UnetResBlock(3, feature_size, feature_size, kernel_size=3, stride=1, norm_name=norm_name)
        heads = (feature_size, *channels[:2]) if deep_supervision else (feature_size,)
        self.heads = nn.ModuleList(UnetOutBlock(3, width, out_channels) for width in heads)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """``image (B, C, H, W, D) -> logits (B, K, H, W, D)``; a list of logits in training with deep supervision."""
        if tuple(image.shape[1:]) != self.shape:
            raise ValueError(
                f"expected an image (B, {', '.join(map(str, self.shape))}), got {tuple(image.shape)}: crop or pad it, "
                "use a sliding window of that size, or build the network with another img_size"
            )
        skips = []
        x = image
        for down, encode in zip(self.down, self.encoder, strict=True):
            x = encode(down(x))
            skips.append(x)
        levels = []
        for stage in reversed(range(STAGES - 1)):
            x = self.decoder[stage](self.up[stage](x) + skips[stage])
            levels.append(x)
        full = self.full(self.full_up(x) + self.full_skip(image))
        if self.training and self.deep_supervision:
            return [head(level) for head, level in zip(self.heads, (full, levels[-1], levels[-2]), strict=True)]
        return self.heads[0](full)


class Block(nn.Module):
    """Attention over the stage's grid, then convolutions, each added to what came in: ``(B, C, *S) -> (B, C, *S)``.

    Positions are added before every block. The attention enters with a learned weight per channel that starts near
    zero, so a fresh network is nearly convolutional.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        num_heads: int,
        proj_size: int,
        *,
        shared_projection: bool,
        convs: int,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.attention = EfficientPairedAttention(
            tokens, channels, num_heads, proj_size, shared_projection=shared_projection, dropout_rate=dropout_rate
        )
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.convs = nn.Sequential(
            *(UnetResBlock(3, channels, channels, kernel_size=3, stride=1, norm_name="batch") for _ in range(convs)),
            nn.Dropout3d(dropout_rate),
            nn.Conv3d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width, depth = x.shape[2:]
        tokens = rearrange(x, "b c h w d -> b (h w d) c") + self.position
        tokens = tokens + self.scale * self.attention(self.norm(tokens))
        x = rearrange(tokens, "b (h w d) c -> b c h w d", h=height, w=width, d=depth)
        return x + self.convs(x)


class EfficientPairedAttention(nn.Module):
    """Spatial and channel attention with shared queries and keys: ``(B, N, C) -> (B, N, C)`` at a cost linear in N.

    Per head, with queries Q, keys K and values V, W of shape (c, N), a learned P of shape (N, p), and Q', K' whose
    rows have length one::

        spatial = (V P) softmax(t Q'^T (K P))^T         channel = softmax(u Q' K'^T) W

    Each is mapped to half of the channels, and the halves stand side by side.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        num_heads: int,
        proj_size: int,
        *,
        shared_projection: bool = True,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkvw = nn.Linear(channels, 4 * channels, bias=False)
        self.projections = nn.ModuleList(nn.Linear(tokens, proj_size) for _ in range(1 if shared_projection else 2))
        self.temperature = nn.Parameter(torch.ones(2, num_heads, 1, 1))
        self.dropout = nn.Dropout(dropout_rate)
        self.spatial_out = nn.Linear(channels, channels // 2)
        self.channel_out = nn.Linear(channels, channels // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v, w = rearrange(self.qkvw(tokens), "b n (four h c) -> four b h c n", four=4, h=self.num_heads)
        few_keys, few_values = self.projections[0](k), self.projections[-1](v)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        t, u = self.temperature
        spatial = self.dropout((t * (q.mT @ few_keys)).softmax(-1))
        channel = self.dropout((u * (q @ k.mT)).softmax(-1))
        seen = (few_values @ spatial.mT, channel @ w)
        by_space, by_channel = (rearrange(branch, "b h c n -> b n (h c)") for branch in seen)
        return torch.cat([self.spatial_out(by_space), self.channel_out(by_channel)], dim=-1)


def _downsample(in_channels: int, out_channels: int, step: tuple[int, int, int]) -> nn.Sequential:
    # As many groups as channels come in, as released; where those do not divide the channels, as many as do.
    groups = math.gcd(in_channels, out_channels)
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, step, stride=step, bias=False), nn.GroupNorm(groups, out_channels)
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(
    img_size: Sequence[int],
    stem_stride: Sequence[int],
    channels: Sequence[int],
    num_heads: int,
    depths: Sequence[int],
    proj_size: Sequence[int],
) -> None:
    for name, value, length in (
        ("img_size", img_size, 3),
        ("stem_stride", stem_stride, 3),
        ("depths", depths, STAGES),
        ("proj_size", proj_size, STAGES),
    ):
        if len(value) != length:
            raise ValueError(f"expected {length} numbers for {name}, got {tuple(value)}: UNETR++ is for 3-D volumes")
    units = tuple(step * 2 ** (STAGES - 1) for step in stem_stride)
    if any(size < unit or size % unit for size, unit in zip(img_size, units, strict=True)):
        raise ValueError(
            f"expected img_size in multiples of {units} for stem_stride {tuple(stem_stride)}, got {tuple(img_size)}: "
            "choose a multiple, and pad smaller volumes to it"
        )
    if any(width % num_heads or width % 2 for width in channels):
        raise ValueError(
            f"expected even numbers of channels that {num_heads} heads divide, got {tuple(channels)} at the four "
            "stages: change feature_size, hidden_size or num_heads"
        )
