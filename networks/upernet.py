"""UPerNet on ConvNeXt with a convolutional stem, as in PIR-AT (Croce et al., ECCV 2024, https://arxiv.org/abs/2306.12941).

Its adversarial training starts from a backbone that is robust on ImageNet (Singh et al., NeurIPS 2023,
https://arxiv.org/abs/2303.01870). That backbone's stem is two strided 3 x 3 convolutions in place of ConvNeXt's one
4 x 4 patch. Everything else is ``transformers``' own, and has its names.

What was run: the authors' unmodified modules, tiny and small with 21 and 151 classes, beside these on the same random
weights. Names and shapes of their checkpoints map one to one. In double precision logits up to 2.5 agree to 5e-15, and
the image's gradient to 2e-15 of its norm. The tests repeat this with a second implementation. What was not run: the
released weights, which were not to be had. So no result of the paper was reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.published import copy_published, renamed, unwrapped

try:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation
except ImportError as error:
    raise ImportError("UPerNet needs transformers: pip install 'medrobust[vlm]'") from error

STAGES = 4
STRIDE = 32

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (3, 3, 9, 3), "drop_path_rate": 0.4},
    "small": {"depths": (3, 3, 27, 3), "drop_path_rate": 0.3},
}
"""What differs between the published sizes: ``UPerNet(**SIZES["small"])``."""

CHECKPOINT = (
    (r"^backbone\.embeddings\.(\d)", r"backbone.downsample_layers.0.stem.\1"),
    (r"^backbone\.embeddings\.patch_embeddings", "backbone.downsample_layers.0.0"),
    (r"^backbone\.embeddings\.layernorm", "backbone.downsample_layers.0.1"),
    (r"^backbone\.encoder\.stages\.(\d)\.downsampling_layer", r"backbone.downsample_layers.\1"),
    (r"^backbone\.encoder\.stages\.(\d)\.layers", r"backbone.stages.\1"),
    *((rf"hidden_states_norms\.stage{stage + 1}", f"norm{stage}") for stage in range(STAGES)),
    (r"\.layernorm\.", ".norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
)
"""From our names to those of the published segmentation checkpoints; heads have the same."""

BACKBONE = (
    (r"^embeddings\.(\d)", r"stem.stem.\1"),
    (r"^embeddings\.patch_embeddings", "stem.0"),
    (r"^embeddings\.layernorm", "stem.1"),
    (r"^encoder\.stages\.(\d)\.downsampling_layer", r"stages.\1.downsample"),
    (r"^encoder\.stages\.(\d)\.layers", r"stages.\1.blocks"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv", ".mlp.fc"),
    (r"\.layer_scale_parameter$", ".gamma"),
)
"""From our names inside the backbone to those of the published ImageNet classifiers, which are timm's."""


class UPerNet(nn.Module):
    """UPerNet for 2-D segmentation: image ``(B, in_channels, H, W)`` in [0, 1] -> logits ``(B, K, H, W)``.

    H and W are any numbers from 32 on. The defaults are the published ConvNeXt-T with its stem for PASCAL VOC:

    =======  =======  ==========  ===========  =========  ==========
    size     classes  backbone    decode head  auxiliary  parameters
    =======  =======  ==========  ===========  =========  ==========
    tiny     21       27,859,776  31,431,189   890,645    60,181,610
    tiny     151      27,859,776  31,497,879   924,055    60,281,710
    small    21       49,494,336  31,431,189   890,645    81,816,170
    =======  =======  ==========  ===========  =========  ==========

    With ``stem="patch"``, state dicts of ``transformers``' ``UperNetForSemanticSegmentation`` on a ConvNeXt fit as
    they are.

    Args:
        num_classes: K; 1 means one sigmoid channel.
        depths: blocks of the four stages; ``SIZES`` has the published ones.
        hidden_sizes: channels of the four stages.
        pool_scales: sides of the grids that the last stage is pooled to.
        hidden_size: channels of the decode head; the auxiliary head has half as many.
        drop_path_rate: how often the last block is skipped in training; it rises linearly from the first's 0.
        auxiliary: whether there is a second head, on the third stage, for training; see ``with_auxiliary``.
        stem: two convolutions as published (``"conv"``), or ConvNeXt's own 4 x 4 patches (``"patch"``).
        in_channels: channels of the image. One-channel images stand for that many equal channels.
        mean: of the channels, in [0, 1]: one for each, or one for all. Published networks take the image as it is.
        std: likewise.

    Raises:
        ValueError: at construction or call, if settings or image do not fit.
    """

    mean: Tensor
    std: Tensor
    # Their parts may be tensors to the type checker; after construction they never are.
    backbone: Any
    decode_head: Any
    auxiliary_head: Any

    def __init__(
        self,
        num_classes: int = 21,
        depths: Sequence[int] = (3, 3, 9, 3),
        hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        hidden_size: int = 512,
        drop_path_rate: float = 0.4,
        *,
        auxiliary: bool = True,
        stem: Literal["conv", "patch"] = "conv",
        in_channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        _check_settings(depths, hidden_sizes, stem, in_channels, mean, std)
        self.in_channels = in_channels
        # As mappings, since the type checker does not know all that these configurations take.
        backbone: dict[str, Any] = {
            "num_channels": in_channels,
            "depths": list(depths),
            "hidden_sizes": list(hidden_sizes),
            "layer_scale_init_value": 1.0,
            "drop_path_rate": drop_path_rate,
            "out_features": [f"stage{stage + 1}" for stage in range(STAGES)],
        }
        heads: dict[str, Any] = {
            "num_labels": num_classes,
            "hidden_size": hidden_size,
            "pool_scales": list(pool_scales),
            "use_auxiliary_head": auxiliary,
            "auxiliary_channels": hidden_size // 2,
        }
        network = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=ConvNextConfig(**backbone), **heads))
        self.backbone = network.backbone
        self.decode_head = network.decode_head
        self.auxiliary_head = network.auxiliary_head
        if stem == "conv":
            self.backbone.embeddings = ConvStem(in_channels, hidden_sizes[0])
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``image (B, in_channels or 1, H, W) -> logits (B, K, H, W)``, in training as in evaluation."""
        self._check_batch(image)
        return _enlarge(self.decode_head(self.features(image)), image)

    def with_auxiliary(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads, each ``(B, K, H, W)``. Published: the loss of the second counts 0.4."""
        if self.auxiliary_head is None:
            raise ValueError("expected a network with an auxiliary head, got one without: build it with auxiliary=True")
        self._check_batch(image)
        features = self.features(image)
        return _enlarge(self.decode_head(features), image), _enlarge(self.auxiliary_head(features), image)

    def features(self, image: Tensor) -> list[Tensor]:
        """Normalised maps of the four stages, at about 1/4, 1/8, 1/16 and 1/32 of the image's sides."""
        self._check_image(image)
        x = self.backbone.embeddings((image.expand(-1, self.in_channels, -1, -1) - self.mean) / self.std)
        maps = []
        for stage, norm in zip(self.backbone.encoder.stages, self.backbone.hidden_states_norms.values(), strict=True):
            x = stage(x)
            maps.append(norm(x))
        return maps

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a published segmentation checkpoint, such as ``best_model_ckpt.pth``: all of it or nothing.

        A network without an auxiliary head leaves that one out.

        Raises:
            ValueError: names or shapes do not fit; the network is left as it was.
        """
        unused = r"auxiliary_head\." if self.auxiliary_head is None else None
        copy_published(
            self, unwrapped(weights), {name: renamed(name, CHECKPOINT) for name in self.state_dict()}, unused
        )

    def load_backbone(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a published ImageNet classifier, robust or not, into the backbone: PIR-AT's start.

        It lacks the norms of the four maps, which stay as they are. Its own ``head`` is left out, and, as published,
        so are mean and standard deviation: the network takes the image as ``mean`` and ``std`` say. The weights of a
        :class:`UPerNetClassifier`, or of another ``UPerNet``, do as well: of those the whole backbone is copied.

        Raises:
            ValueError: names or shapes do not fit; the network is left as it was.
        """
        found = unwrapped(weights)
        if any(name.startswith("backbone.embeddings.") for name in found):
            theirs = {name: f"backbone.{name}" for name in self.backbone.state_dict()}
            copy_published(self.backbone, found, theirs, r"(decode_head|auxiliary_head)\.")
            return
        names = (name for name in self.backbone.state_dict() if not name.startswith("hidden_states_norms."))
        copy_published(self.backbone, found, {name: renamed(name, BACKBONE) for name in names}, r"head\.|normalize\.")

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, self.in_channels):
            raise ValueError(
                f"expected images (B, 1 or {self.in_channels}, H, W), got {tuple(image.shape)}: UPerNet is for 2-D, so "
                "slice volumes, or build it with another in_channels"
            )
        if min(image.shape[2:]) < STRIDE:
            raise ValueError(
                f"expected images of {STRIDE} x {STRIDE} pixels or more, got {image.shape[2]} x {image.shape[3]}: "
                "resize or pad them"
            )

    def _check_batch(self, image: Tensor) -> None:
        if self.decode_head.bottleneck.batch_norm.training and len(image) == 1 and 1 in self.decode_head.pool_scales:
            raise ValueError(
                "expected 2 images or more in training mode, got 1: what is pooled to one place is normalised over the "
                "batch; use larger batches, or eval()"
            )


class UPerNetClassifier(UPerNet):
    """What is in the image, told by UPerNet's backbone: image ``(B, in_channels, H, W)`` -> logits ``(B, K, H, W)``.

    The mean of the last map passes one linear layer, and every pixel gets the same K logits, so whatever attacks
    segmentation with overlapping classes attacks this. Trained adversarially, its backbone is the start that PIR-AT
    asks for, where no robust ImageNet weights fit: ``UPerNet.load_backbone(classifier.state_dict())``.

    Args:
        num_classes: K, each with a sigmoid of its own.
        settings: of the :class:`UPerNet` whose backbone it is, by name.
    """

    def __init__(self, num_classes: int, hidden_sizes: Sequence[int] = (96, 192, 384, 768), **settings: Any) -> None:
        super().__init__(num_classes, hidden_sizes=hidden_sizes, **{**settings, "auxiliary": False})
        self.decode_head = nn.Linear(hidden_sizes[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image (B, in_channels or 1, H, W) -> logits (B, K, H, W)``, alike at all pixels."""
        logits: Tensor = self.decode_head(self.features(image)[-1].mean((2, 3)))
        return logits[:, :, None, None].expand(-1, -1, *image.shape[2:])


class ConvStem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2: ``(B, C, H, W) -> (B, width, H/4, W/4)``, rounded up."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width // 2, 3, stride=2, padding=1),
            ChannelNorm(width // 2, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            ChannelNorm(width, eps=1e-6),
            nn.GELU(),
        )
        for module in self:
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _enlarge(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def _check_settings(
    depths: Sequence[int],
    hidden_sizes: Sequence[int],
    stem: str,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    for name, value in (("depths", depths), ("hidden_sizes", hidden_sizes)):
        if len(value) != STAGES:
            raise ValueError(f"expected {STAGES} numbers for {name}, got {tuple(value)}: one for each stage")
    if stem not in ("conv", "patch"):
        raise ValueError(f"expected stem 'conv' or 'patch', got {stem!r}: choose one of them")
    if stem == "conv" and hidden_sizes[0] % 2:
        raise ValueError(f"expected an even first hidden size, got {hidden_sizes[0]}: the stem halves it")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, in_channels):
            raise ValueError(f"expected 1 or {in_channels} numbers for {name}, got {tuple(numbers)}: see in_channels")
