"""CLIP with a ResNet (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020), read out densely.

The ResNet differs from the usual one in three ways: three small convolutions begin it, every stride is an average pool,
and attention ends it. CLIP keeps one token of that attention. Here, as in CRIS, every place keeps its own, beside a
1 x 1 convolution (``connect``) that CLIP does not have. Of the text every token is kept too.

Names are OpenAI's, so ``load_state_dict(clip, strict=False)`` starts from CLIP's weights and leaves ``connect`` alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

END = 49407
"""The token that ends a text; it is the largest."""

CONTEXT = 77
"""Tokens in the longest text."""

GRID = 7
"""Positions are learned for 7 x 7 places: images of 224, each place 32 wide."""

EXPANSION = 4


class CLIPResNet(nn.Module):
    """Both encoders of CLIP; the defaults are RN50, with 104,106,337 parameters of which ``connect`` has 2,099,200.

    Two things are there for the sake of checkpoints only: the temperature ``logit_scale``, which never trains, and the
    first row of ``visual.attnpool.positional_embedding``, CLIP's one token, whose gradient is always zero.

    Args:
        width: channels after the first three convolutions; the four stages have 4, 8, 16 and 32 times as many.
        depths: blocks of the stages.
        embed_dim: channels that image and text have in common.
        text_width: channels of the text's tokens.
        text_heads: attention heads of the text transformer.
        text_layers: layers of the text transformer.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dim: int = 1024,
        text_width: int = 512,
        text_heads: int = 8,
        text_layers: int = 12,
    ) -> None:
        super().__init__()
        self.visual = ResNet(width, depths, embed_dim)
        blocks = [TextBlock(text_width, text_heads, text_layers) for _ in range(text_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.token_embedding = nn.Embedding(END + 1, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(CONTEXT, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log(), requires_grad=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised ``(B, 3, S, S)`` -> maps of 8, 16 and embed_dim / width times ``width`` at S/8, S/16 and S/32."""
        return self.visual(pixels)

    def encode_text(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, L)`` -> every token ``(B, L, text_width)``, and the sentence ``(B, embed_dim)`` from the first end."""
        tokens = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        words = self.ln_final(self.transformer["resblocks"](tokens))
        end = (input_ids == END).int().argmax(-1)
        return words, words[torch.arange(len(words), device=words.device), end] @ self.text_projection


class ResNet(nn.Module):
    """``(B, 3, S, S)`` -> the outputs of its last three stages, the last one after attention; S a multiple of 32."""

    def __init__(self, width: int, depths: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, depths[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, depths[3], stride=2)
        # 64 channels to a head.
        self.attnpool = SpatialAttention(32 * width, width // 2, embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        eighth = self.layer2(self.layer1(F.avg_pool2d(x, 2)))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.attnpool(self.layer4(sixteenth))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions added to what came in; the stride is an average pool, so nothing aliases."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )
        # As in CLIP: a fresh block lets through what comes in.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        change = F.relu(self.bn1(self.conv1(x)))
        change = self.pool(F.relu(self.bn2(self.conv2(change))))
        return F.relu(self.bn3(self.conv3(change)) + self.downsample(self.pool(x)))


class SpatialAttention(nn.Module):
    """Attention between all places, beside a 1 x 1 convolution: ``(B, C, H, W) -> (B, out_channels, H, W)``, >= 0."""

    def __init__(self, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(channels**-0.5 * torch.randn(GRID**2 + 1, channels))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, out_channels)
        self.connect = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        learned = rearrange(self.positional_embedding[1:], "(h w) c -> 1 c h w", h=GRID)
        placed = x + F.interpolate(learned, (height, width), mode="bicubic")
        tokens = rearrange(placed, "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(projection(tokens), "b n (heads c) -> b heads n c", heads=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        return F.relu(rearrange(self.c_proj(seen), "b (h w) c -> b c h w", h=height) + self.connect(x))


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, which CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """A transformer layer in which no token sees what follows it: ``(B, L, C) -> (B, L, C)``."""

    def __init__(self, channels: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(channels)
        expand, contract = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.mlp = nn.Sequential(OrderedDict(c_fc=expand, gelu=QuickGELU(), c_proj=contract))
        self.ln_2 = nn.LayerNorm(channels)
        # As in CLIP: what the layers add is smaller, the more of them there are.
        nn.init.normal_(self.attn.in_proj_weight, std=channels**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=(2 * depth * channels) ** -0.5)
        nn.init.normal_(expand.weight, std=(2 * channels) ** -0.5)
        nn.init.normal_(contract.weight, std=(2 * depth * channels) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=future, is_causal=True)[0]
        return x + self.mlp(self.ln_2(x))


def _stage(in_channels: int, channels: int, depth: int, *, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * channels, channels, 1) for _ in range(depth - 1)))
