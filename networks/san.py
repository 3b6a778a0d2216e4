"""SAN, the side adapter network (Xu et al., CVPR 2023, https://arxiv.org/abs/2302.12242), for one prompt and one mask.

CLIP stays frozen. A small ViT beside it reads CLIP's states and the image at twice CLIP's resolution. Its queries
propose masks, and tell copies of CLIP's class token where to look in CLIP's last layers. How well each copy then agrees
with the prompt decides how much its mask counts.

VLSM-Adapter (Dhakal et al., MICCAI 2024, https://arxiv.org/abs/2405.06196) used this as a baseline. The network here is
the one it meant; its published code has faults that are mended here:

- CLIP's layers are mapped to the side network's blocks the wrong way round: CLIP's states 0, 1, 2 and 3 go to blocks
  0, 3, 6 and 9 of 8. Here, as in SAN, the states after 0, 3, 6 and 9 layers enter blocks 0, 1, 2 and 3.
- CLIP's image side runs under ``no_grad``. So the attention biases and the fusion that is never reached (1,103,090 of
  8,219,058 parameters) and CLIP's positions (151,296) never train, and pixels get gradients through the side network
  only. Here all of them train, and pixels get all of their gradient.
- CLIP's layers are given (tokens, batch, channels), where the library's version that is asked for takes (batch, tokens,
  channels). Here the batch is first everywhere.
- The mask is a sum over queries, weighted by products of their copies, of unit length, with the text, of any length.
  The copies hardly differ in these, so no query can win. Here the weights are the softmax over queries of cosines
  times CLIP's temperature. Where each of two prompts names one of two squares in an image, small networks on random
  weights trained for 500 steps so reach a mean Dice of 0.89 to 0.90 on new images, and 0.47 to 0.49 with weighted
  sums (three seeds each).

What was run: parameter counts and shapes at full size, CLIP's part against ``transformers``' own, gradients, and small
networks on random weights. VLSM-Adapter released no weights of it, and SAN's are for 171 classes at once: none were
loaded here, and no result of either paper was reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.hub import of_settings
from medrobust.networks.tokens import check_tokens

try:
    from transformers import CLIPConfig, CLIPModel
except ImportError as error:
    raise ImportError("SAN needs transformers: pip install 'medrobust[vlm]'") from error

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP was trained with."""

HALVED = 2
"""CLIP sees the image at this fraction of its sides, 1 / 2, as released."""


def vit_b16() -> CLIPConfig:
    """Settings of ``openai/clip-vit-base-patch16``, 149,620,737 parameters."""
    return CLIPConfig(vision_config={"patch_size": 16})


class SAN(nn.Module):
    """Image and text in, mask out: ``image (B, 3, S, S), input_ids (B or 1, L) -> logits (B, 1, S, S)``.

    Images lie in [0, 1] and are normalised inside, so that an attack's eps is in pixels. Positions are interpolated:
    with the defaults S is any multiple of 32, and 640 in both papers. What trains is the side network (8,219,058
    parameters) and CLIP's positions in the image (151,296): 8,370,354 together, the paper's "8.4M". The rest of CLIP,
    text included, has ``requires_grad`` False.

    Args:
        base: CLIP: settings (``vit_b16()``, or a mapping of what ``CLIPConfig`` takes) for random weights, or a model
            such as ``CLIPModel.from_pretrained("openai/clip-vit-base-patch16")``. It is not copied, and what gets
            gradients is set on it: give every network its own.
        queries: masks proposed.
        channels: width of the side network.
        num_heads: attention heads of the side network.
        blocks: depth of the side network.
        patch_size: of the side network.
        image_size: S for which the side network's positions are made.
        clip_layers: CLIP's states after so many layers enter the side network's blocks 0, 1, 2, ...; the layers after
            the last of them are those in which the copies of the class token look.
        decoder_channels: width of what makes masks and attention biases.
        mean: of the three channels, in [0, 1].
        std: of the three channels.
        attention: CLIP's: ``"eager"`` for bitwise comparisons, ``"sdpa"`` for speed. A model as ``base`` keeps its own.

    Raises:
        ValueError: at construction or call, if settings, image or tokens do not fit.
    """

    mean: Tensor
    std: Tensor
    # Its parts may be dictionaries to the type checker; after construction they never are.
    clip: Any

    def __init__(
        self,
        base: CLIPModel | CLIPConfig | Mapping[str, Any],
        *,
        queries: int = 100,
        channels: int = 240,
        num_heads: int = 6,
        blocks: int = 8,
        patch_size: int = 16,
        image_size: int = 640,
        clip_layers: Sequence[int] = (0, 3, 6, 9),
        decoder_channels: int = 256,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        attention: Literal["eager", "sdpa"] = "sdpa",
    ) -> None:
        super().__init__()
        self.clip = of_settings(CLIPModel, base, attention)
        vision: Any = self.clip.config.vision_config
        self.clip_layers = tuple(clip_layers)
        _check_layers(self.clip_layers, vision.num_hidden_layers, blocks)
        _check_sizes(channels, num_heads, image_size, patch_size)
        self.unit = math.lcm(patch_size, HALVED * vision.patch_size)
        self.side = SideNetwork(
            queries=queries,
            channels=channels,
            num_heads=num_heads,
            blocks=blocks,
            patch_size=patch_size,
            grid=image_size // patch_size,
            clip_channels=vision.hidden_size,
            fusions=len(self.clip_layers),
        )
        self.decoder = MaskDecoder(channels, decoder_channels, vision.num_attention_heads)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)
        self.clip.requires_grad_(False)
        self.clip.vision_model.embeddings.position_embedding.requires_grad_(True)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1, S, S)``.

        Args:
            image: ``(B, 3, S, S)`` in [0, 1]; ``(B, 1, S, S)`` stands for three equal channels.
            input_ids: tokens, integers ``(B, L)``, or ``(1, L)`` for one prompt on all images; L at most 77.
            attention_mask: as ``input_ids``, 0 where there is padding. Padding follows the end of the text, which no
                token sees beyond, so it changes nothing.
        """
        self._check_image(image)
        text = self.clip.config.text_config
        check_tokens(input_ids, attention_mask, len(image), most=text.max_position_embeddings, end=text.eos_token_id)
        pixels = (image.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std
        states = self.clip_states(pixels)
        queries, patches = self.side(pixels, [states[layer][:, 1:] for layer in self.clip_layers])
        proposals, biases = self.decoder(queries, patches)
        regions = self.recognise(states[-1], biases)
        scores = self.class_logits(regions, self.condition(input_ids, attention_mask)).softmax(-1)
        # Enlarging is linear, so it need not be done for every query.
        mask = torch.einsum("bq,bqhw->bhw", scores, proposals)[:, None]
        return F.interpolate(mask, size=image.shape[2:], mode="bilinear", align_corners=False)

    def clip_states(self, pixels: Tensor) -> list[Tensor]:
        """CLIP's tokens ``(B, 1 + patches, channels)`` of the halved image, after 0, 1, ... and ``clip_layers[-1]``."""
        vision = self.clip.vision_model
        # At exactly half the size, bilinear interpolation is the mean of two by two pixels.
        halved = F.avg_pool2d(pixels, HALVED)
        states = [vision.pre_layrnorm(vision.embeddings(halved, interpolate_pos_encoding=True))]
        for layer in vision.encoder.layers[: self.clip_layers[-1]]:
            states.append(layer(states[-1], None))
        return states

    def recognise(self, state: Tensor, biases: Tensor) -> Tensor:
        """What CLIP sees where each query looks: ``(B, Q, projection_dim)``.

        The paper's [SLS] tokens: copies of the class token that follow it through CLIP's last layers. Each attends to
        itself and to the patches, no one attends to it, and ``biases`` shift what it attends to. With biases of zero
        it stays equal to the class token.

        Args:
            state: the last of ``clip_states``.
            biases: ``(B, heads, Q, h, w)``, added to the logits of attention in every layer. What is larger than CLIP's
                grid of patches is pooled to it by its maximum, as released.
        """
        vision = self.clip.vision_model
        size = math.isqrt(state.shape[1] - 1)
        pooled = F.adaptive_max_pool2d(biases.flatten(1, 2), size).flatten(2)
        bias = pooled.unflatten(1, biases.shape[1:3])
        regions = state[:, :1].expand(-1, biases.shape[2], -1)
        *layers, last = vision.encoder.layers[self.clip_layers[-1] :]
        for layer in layers:
            regions = _look(layer, regions, state[:, 1:], bias)
            state = layer(state, None)
        regions = _look(last, regions, state[:, 1:], bias)
        return self.clip.visual_projection(vision.post_layernorm(regions))

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """CLIP's embedding of the text: ``(B or 1, projection_dim)``."""
        return self.clip.text_projection(self.clip.text_model(input_ids, attention_mask).pooler_output)

    def class_logits(self, regions: Tensor, condition: Tensor) -> Tensor:
        """CLIP's agreement of regions ``(B, Q, C)`` and text ``(B or 1, C)``: cosines times its temperature, (B, Q)."""
        cosines = (F.normalize(regions, dim=-1) * F.normalize(condition, dim=-1)[:, None]).sum(-1)
        return self.clip.logit_scale.exp() * cosines

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, len(self.mean)):
            raise ValueError(
                f"expected images (B, 1 or 3, S, S), got {tuple(image.shape)}: SAN is for 2-D, so slice volumes"
            )
        height, width = image.shape[2:]
        if height != width or height % self.unit or not height:
            raise ValueError(
                f"expected square images with sides in multiples of {self.unit}, got {height} x {width}: resize or pad "
                "them, or use a sliding window"
            )


class SideNetwork(nn.Module):
    """A ViT on queries and patches that reads CLIP's states: queries ``(B, Q, C)`` and patches ``(B, C, h, w)``.

    Positions are added before every block, and there is no norm after the last one, both as released.

    Args:
        queries: learned tokens Q, beside those of the patches.
        channels: width C.
        num_heads: attention heads; divides C.
        blocks: depth.
        patch_size: of the image.
        grid: positions are made for so many patches a side, and interpolated for others.
        clip_channels: width of CLIP's states.
        fusions: how many of them there are; they enter the first blocks, one each.
    """

    def __init__(
        self,
        *,
        queries: int,
        channels: int,
        num_heads: int,
        blocks: int,
        patch_size: int,
        grid: int,
        clip_channels: int,
        fusions: int,
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty(1, channels, grid, grid))
        self.query = nn.Parameter(torch.empty(1, queries, channels))
        self.query_position = nn.Parameter(torch.empty(1, queries, channels))
        self.fusions = nn.ModuleList(Fusion(clip_channels, channels) for _ in range(fusions))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels,
                num_heads,
                4 * channels,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(blocks)
        )
        for parameter in (self.position, self.query, self.query_position, *self.blocks.parameters()):
            # As released: all matrices alike. Biases and norms start as they do anywhere.
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor, clip_patches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pixels ``(B, 3, S, S)``, normalised, and CLIP's states of its patches alone, ``(B, N, clip_channels)``."""
        patches = self.patch_embedding(pixels)
        size = patches.shape[-2:]
        position: Tensor = self.position
        if position.shape[-2:] != size:
            position = F.interpolate(position, size, mode="bicubic", align_corners=False)
        queries = self.query.expand(len(pixels), -1, -1)
        for number, block in enumerate(self.blocks):
            if number < len(self.fusions):
                patches = patches + self.fusions[number](clip_patches[number], size)
            tokens = rearrange(patches + position, "b c h w -> b (h w) c")
            tokens = block(torch.cat([queries + self.query_position, tokens], dim=1))
            queries, tokens = tokens.tensor_split([queries.shape[1]], dim=1)
            patches = rearrange(tokens, "b (h w) c -> b c h w", h=size[0])
        return queries, patches


class Fusion(nn.Module):
    """CLIP's patches ``(B, N, clip_channels)`` as the side network adds them to its own: ``(B, C, h, w)``."""

    def __init__(self, clip_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(clip_channels, eps=1e-6)
        self.linear = nn.Linear(clip_channels, channels)
        nn.init.kaiming_uniform_(self.linear.weight, a=1)
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        projected = self.linear(self.norm(patches)).mT.unflatten(-1, (math.isqrt(patches.shape[1]), -1))
        return F.interpolate(projected, tuple(size), mode="bilinear", align_corners=False)


class MaskDecoder(nn.Module):
    """Products of queries and patches: proposals ``(B, Q, h, w)``, attention biases ``(B, heads, Q, h, w)``.

    Both share what is made of the queries; patches have a vector for the mask and one for each of CLIP's heads. The
    biases, common to all of CLIP's layers that read them, have a learned scale and shift.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.of_query = _mlp(channels, width, width)
        self.of_patch = _mlp(channels, width, width)
        self.of_patch_for_bias = _mlp(channels, width, heads * width)
        self.rescale = nn.Linear(1, 1)

    def forward(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``(B, Q, C)``, patches ``(B, C, h, w)``."""
        query, last = self.of_query(queries), patches.movedim(1, -1)
        proposals = torch.einsum("bqc,bhwc->bqhw", query, self.of_patch(last))
        keys = self.of_patch_for_bias(last).unflatten(-1, (self.heads, -1))
        biases = torch.einsum("bqc,bhwnc->bnqhw", query, keys)
        return proposals, self.rescale(biases[..., None])[..., 0]


def _look(layer: Any, regions: Tensor, patches: Tensor, bias: Tensor) -> Tensor:
    """A layer of CLIP for ``regions (B, Q, C)``, each of which sees itself and the ``patches (B, N, C)``.

    ``bias (B, heads, Q, N)`` is added to the logits of its attention to patches.
    """
    attention = layer.self_attn

    def heads(tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (heads c) -> b heads n c", heads=attention.num_heads)

    own, others = layer.layer_norm1(regions), layer.layer_norm1(patches)
    query = heads(attention.q_proj(own)) * attention.scale
    to_itself = (query * heads(attention.k_proj(own))).sum(-1, keepdim=True)
    to_patches = query @ heads(attention.k_proj(others)).mT + bias
    weights = torch.cat([to_itself, to_patches], dim=-1).softmax(-1)
    seen = weights[..., :1] * heads(attention.v_proj(own)) + weights[..., 1:] @ heads(attention.v_proj(others))
    regions = regions + attention.out_proj(rearrange(seen, "b heads n c -> b n (heads c)"))
    return regions + layer.mlp(layer.layer_norm2(regions))


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def _check_layers(clip_layers: tuple[int, ...], layers: int, blocks: int) -> None:
    rising = (
        bool(clip_layers) and clip_layers[0] >= 0 and all(first < second for first, second in pairwise(clip_layers))
    )
    if not rising or clip_layers[-1] >= layers or len(clip_layers) > blocks:
        raise ValueError(
            f"expected clip_layers that rise from 0 or more to less than CLIP's {layers} layers, at most one for each "
            f"of {blocks} blocks, got {clip_layers}: they count the layers that CLIP has done"
        )


def _check_sizes(channels: int, num_heads: int, image_size: int, patch_size: int) -> None:
    if channels % num_heads:
        raise ValueError(
            f"expected a number of channels that {num_heads} heads divide, got {channels}: change channels or num_heads"
        )
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"expected image_size in multiples of patch_size {patch_size}, got {image_size}: change one of them"
        )
