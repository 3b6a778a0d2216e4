"""Segmenter (Strudel et al., ICCV 2021, https://arxiv.org/abs/2105.05633): a ViT whose patches are scored by classes.

Patches pass a ViT. They then pass two more blocks together with one learned embedding for each class. How alike a patch
and a class are in the end is that class's logit there. PIR-AT (Croce et al., ECCV 2024,
https://arxiv.org/abs/2306.12941) trains it adversarially from a ViT-S that is robust on ImageNet.

What was run: the authors' unmodified modules beside these on the same random weights, with 151 classes at 512 pixels
and at others. Names and shapes of their checkpoints map one to one. In double precision logits up to 3 agree to 1e-13,
and the image's gradient to 2e-14 of its norm. The tests repeat this with a second implementation. What was not run:
the released weights, which were not to be had. So no result of either paper was reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from monai.networks.blocks import MLPBlock
from monai.networks.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.published import copy_published, renamed, unwrapped

PUBLISHED = (
    (r"\bpatch_embed\.", "patch_embed.proj."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear", ".mlp.fc"),
)
"""From our names to published ones, which are timm's in the encoder."""


class Segmenter(nn.Module):
    """Segmenter for 2-D: image ``(B, in_channels, H, W)`` in [0, 1] -> logits ``(B, K, H, W)`` for any H and W.

    The image is padded by zeros on the right and below to multiples of ``patch_size``, and the logits are cropped.
    Positions are learned for ``image_size`` and interpolated for others. The defaults are ViT-S/16 as published with
    PIR-AT for ADE20K:

    =======  ==========  =========  ==========
    classes  encoder     decoder    parameters
    =======  ==========  =========  ==========
    151      21,983,616  4,050,734  26,034,350
    21       21,983,616  4,000,554  25,984,170
    =======  ==========  =========  ==========

    The published encoder also carries a classifier of ImageNet (385,000) that nothing depends on.

    As published, logits are normalised over the classes of each place, so their range is bounded. Of two classes that
    leaves little more than the sign of a difference: four small networks of two classes gave pixels gradients 45 to
    1,400 times smaller than those of three, behind which attacks fail for no good reason, and only one of them learned
    its task. So two are refused.

    Args:
        num_classes: K, 3 or more.
        image_size: S, a multiple of ``patch_size``: positions are made for S x S.
        patch_size: of the image.
        hidden_size: channels of encoder and decoder; the layers between have four times as many.
        num_layers: blocks of the encoder.
        num_heads: attention heads; divides ``hidden_size``. Published: 64 channels each.
        decoder_layers: blocks of the decoder.
        drop_path_rate: how often the encoder's last block is skipped in training; it rises linearly from the first's 0.
        dropout: in the decoder; the encoder has none.
        in_channels: channels of the image. One-channel images stand for that many equal channels.
        mean: of the channels, in [0, 1]: one for each, or one for all. PIR-AT's networks take the image as it is;
            Strudel et al. have 0.5 and 0.5.
        std: likewise.

    Raises:
        ValueError: at construction or call, if settings or image do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int = 151,
        image_size: int = 512,
        patch_size: int = 16,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        *,
        decoder_layers: int = 2,
        drop_path_rate: float = 0.1,
        dropout: float = 0.1,
        in_channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, image_size, patch_size, hidden_size, num_heads, in_channels, mean, std)
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.encoder = Encoder(
            in_channels, image_size // patch_size, patch_size, hidden_size, num_layers, num_heads, drop_path_rate
        )
        self.decoder = MaskTransformer(num_classes, hidden_size, decoder_layers, num_heads, dropout)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``image (B, in_channels or 1, H, W) -> logits (B, K, H, W)``."""
        self._check_image(image)
        height, width = image.shape[2:]
        x = (image.expand(-1, self.in_channels, -1, -1) - self.mean) / self.std
        # Padded after normalisation, as published: the border is 0 to the network, whatever that is in pixels.
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        masks = self.decoder(self.encoder(x))
        return F.interpolate(masks, x.shape[2:], mode="bilinear", align_corners=False)[..., :height, :width]

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a published segmentation checkpoint: all of it or nothing.

        Strudel et al. keep theirs under ``"model"`` in the file. The encoder's classifier is left out. Positions of
        another image size are interpolated.

        Raises:
            ValueError: names or shapes do not fit; the network is left as it was.
        """
        _copy(self, weights, r"encoder\.head\.", "encoder.pos_embed")

    def load_backbone(self, weights: Mapping[str, Tensor]) -> None:
        """Copy timm's ``vit_small_patch16_224``, robust or not, into the encoder: PIR-AT's start.

        Its classifier is left out, and, as published, so are mean and standard deviation: the network takes the image
        as ``mean`` and ``std`` say. Positions are interpolated.

        Raises:
            ValueError: names or shapes do not fit; the network is left as it was.
        """
        _copy(self.encoder, weights, r"head\.|normalize\.", "pos_embed")

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, self.in_channels) or not min(image.shape[2:]):
            raise ValueError(
                f"expected images (B, 1 or {self.in_channels}, H, W), got {tuple(image.shape)}: Segmenter is for 2-D, "
                "so slice volumes, or build it with another in_channels"
            )


class Encoder(nn.Module):
    """A ViT: ``(B, in_channels, H, W) -> (B, channels, H / patch_size, W / patch_size)``.

    Args:
        in_channels: of the image.
        grid: positions are made for so many patches a side.
        patch_size: of the image; divides H and W.
        channels: of the tokens.
        depth: blocks.
        num_heads: attention heads.
        drop_path_rate: of the last block.
    """

    def __init__(
        self,
        in_channels: int,
        grid: int,
        patch_size: int,
        channels: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, channels))
        rates = (drop_path_rate * block / max(depth - 1, 1) for block in range(depth))
        self.blocks = nn.ModuleList(Block(channels, num_heads, 0.0, rate) for rate in rates)
        self.norm = nn.LayerNorm(channels)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        size = (patches.shape[2], patches.shape[3])
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), rearrange(patches, "b c h w -> b (h w) c")], dim=1)
        tokens = tokens + resize_positions(self.pos_embed, size)
        for block in self.blocks:
            tokens = block(tokens)
        return rearrange(self.norm(tokens)[:, 1:], "b (h w) c -> b c h w", h=size[0])


class MaskTransformer(nn.Module):
    """Patches ``(B, C, h, w)`` -> cosines of patches and classes, normalised over classes: ``(B, K, h, w)``."""

    def __init__(self, num_classes: int, channels: int, depth: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, channels))
        self.proj_dec = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(Block(channels, num_heads, dropout, 0.0) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(channels)
        self.proj_patch = nn.Parameter(torch.empty(channels, channels))
        self.proj_classes = nn.Parameter(torch.empty(channels, channels))
        self.mask_norm = nn.LayerNorm(num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        for projection in (self.proj_patch, self.proj_classes):
            nn.init.normal_(projection, std=channels**-0.5)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.proj_dec(rearrange(patches, "b c h w -> b (h w) c"))
        tokens = torch.cat([tokens, self.cls_emb.expand(len(patches), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        places, classes = self.decoder_norm(tokens).tensor_split([patches.shape[2] * patches.shape[3]], dim=1)
        places = F.normalize(places @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return rearrange(self.mask_norm(places @ classes.mT), "b (h w) k -> b k h w", h=patches.shape[2])


class Block(nn.Module):
    """Attention and two linear layers, each normalised before, dropped now and then, and added: ``(B, N, C)``."""

    def __init__(self, channels: int, num_heads: int, dropout: float, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLPBlock(channels, 4 * channels, dropout)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.norm1(tokens)
        tokens = tokens + self.drop_path(self.drop(self.attn(y, y, y, need_weights=False)[0]))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


def resize_positions(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """``(1, 1 + n * n, C) -> (1, 1 + h * w, C)``, bilinear; the first, of the class token, has no place and stays.

    The authors resize where the number of patches differs; here it is where the sides do, so that an image of half the
    height and twice the width does not get the square's rows.
    """
    token, grid = positions.tensor_split([1], dim=1)
    side = math.isqrt(grid.shape[1])
    if size == (side, side):
        return positions
    grid = rearrange(grid, "b (h w) c -> b c h w", h=side)
    grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)
    return torch.cat([token, rearrange(grid, "b c h w -> b (h w) c")], dim=1)


def _initialise(module: nn.Module) -> None:
    # As published: all matrices alike, and no biases. The patches' convolution starts as any does.
    if isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _copy(module: nn.Module, weights: Mapping[str, Tensor], unused: str, positions: str) -> None:
    """Copy ``weights`` under their published names, positions interpolated; only what ``unused`` matches may remain."""
    found = unwrapped(weights)
    own = module.state_dict()
    if positions in found:
        found[positions] = _fitted(found[positions], own[positions])
    copy_published(module, found, {name: renamed(name, PUBLISHED) for name in own}, unused)


def _fitted(positions: Tensor, own: Tensor) -> Tensor:
    """Positions for the network's grid, if they are those of a square one; else as they are."""
    if (
        positions.ndim != 3
        or positions.shape[1] < 2
        or math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1
    ):
        return positions
    side = math.isqrt(own.shape[1] - 1)
    return resize_positions(positions, (side, side))


def _check_settings(
    num_classes: int,
    image_size: int,
    patch_size: int,
    hidden_size: int,
    num_heads: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if num_classes < 3:
        raise ValueError(
            f"expected 3 classes or more, got {num_classes}: logits are normalised over the classes, and of two only "
            "the sign of their difference is left, which has no gradient; for background and foreground, ask for 3 and "
            "label nothing with the last"
        )
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"expected image_size in multiples of patch_size {patch_size}, got {image_size}: change one of them"
        )
    if hidden_size % num_heads:
        raise ValueError(
            f"expected a hidden_size that {num_heads} heads divide, got {hidden_size}: change hidden_size or num_heads"
        )
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, in_channels):
            raise ValueError(f"expected 1 or {in_channels} numbers for {name}, got {tuple(numbers)}: see in_channels")
