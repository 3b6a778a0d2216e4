"""CRIS (Wang et al., CVPR 2022, https://arxiv.org/abs/2111.15174): segment what a sentence names, with all of CLIP.

Three maps of CLIP's ResNet are gated by the sentence and fused at 1/16 of the image; every place then attends to the
other places and to every word; the sentence makes the one convolution that turns the result into a mask.

MedVLSM (Poudel et al., MIDL 2024, https://arxiv.org/abs/2308.07706) and VLSM-Adapter (Dhakal et al., MICCAI 2024,
https://arxiv.org/abs/2405.06196) train it end to end on medical images, and the network here is theirs in all but its
padding (see ``CRIS``).

What was run: the authors' own modules beside these on the same random weights, at full size and 416 pixels. All names
and shapes are the same; logits up to 44 differ by less than 3e-4, and the image's gradient by 1e-4 of its norm. The
text part was compared with ``transformers``' too. What was not run: the released weights, which were not to be had. So
no result of the papers was reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.clip_resnet import CONTEXT, END, CLIPResNet
from medrobust.networks.tokens import check_tokens

Padding = Literal["after_end", "published"]

PADDINGS = ("after_end", "published")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP was trained with."""

STRIDE = 32


class CRIS(nn.Module):
    """Image and text in, mask out: ``image (B, 3, S, S), input_ids (B or 1, L) -> logits (B, 1, S, S)``.

    Images lie in [0, 1] and are normalised inside, so that an attack's eps is in pixels. Positions are interpolated:
    S is any multiple of 32, and 416 in the papers. The logits of 1/4 that size are brought to S by bicubic
    interpolation. The defaults are the published network on RN50:

    ========  ============  ==========  ==========  =========  ===========
    part      ``backbone``  ``neck``    ``decoder`` ``proj``   all
    ========  ============  ==========  ==========  =========  ===========
    trained   104,106,336   24,142,336  12,631,552  5,968,897  146,849,121
    ========  ============  ==========  ==========  =========  ===========

    With CLIP's temperature, which no logit depends on and which does not train, that is the published 146,849,122.
    Parameters have the names of the authors' checkpoints (``cris_best.pth``), which ``load_weights`` of
    ``medrobust.networks.weights`` reads. To start from CLIP alone, see ``clip_resnet``.

    Train on batches of several prompts: in training mode the sentence is normalised over the batch, so that equal
    prompts say nothing, and running statistics that saw only them mislead in evaluation mode.

    Args:
        width: channels after the ResNet's first three convolutions.
        depths: blocks of the ResNet's four stages; RN101 has (3, 4, 23, 3), and an ``embed_dim`` of 512.
        embed_dim: channels of the ResNet's last map and of the sentence.
        channels: of words and of the fused map.
        num_heads: attention heads of text transformer and decoder.
        text_layers: layers of the text transformer.
        decoder_layers: layers of the decoder.
        decoder_hidden: channels inside the decoder's layers.
        dropout: in the decoder. MedVLSM has 0.2, the authors 0.1.
        padding: which tokens the decoder leaves out. ``"after_end"``: those after the first end token, and where the
            attention mask is 0. ``"published"``: those that are 0, whatever the attention mask says, as OpenAI's
            tokenizer pads. MedVLSM and VLSM-Adapter pad with end tokens, so that nothing was ever left out, and
            attention went to the padding too: choose it for weights trained like that, and only with texts padded to
            77 by end tokens. For the authors' own weights, which were trained with zeros, the default is right.
        mean: of the three channels, in [0, 1].
        std: of the three channels.

    Raises:
        ValueError: at construction or call, if settings, image or tokens do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dim: int = 1024,
        channels: int = 512,
        num_heads: int = 8,
        text_layers: int = 12,
        decoder_layers: int = 3,
        decoder_hidden: int = 2048,
        dropout: float = 0.2,
        padding: Padding = "after_end",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        _check_settings(width, depths, channels, num_heads, padding)
        self.padding = padding
        self.backbone = CLIPResNet(
            width=width,
            depths=depths,
            embed_dim=embed_dim,
            text_width=channels,
            text_heads=num_heads,
            text_layers=text_layers,
        )
        self.neck = Neck((8 * width, 16 * width, embed_dim), channels)
        self.decoder = Decoder(channels, num_heads, decoder_hidden, decoder_layers, dropout)
        self.proj = Projector(channels, embed_dim)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1, S, S)``.

        Args:
            image: ``(B, 3, S, S)`` in [0, 1]; ``(B, 1, S, S)`` stands for three equal channels.
            input_ids: tokens, integers ``(B, L)``, or ``(1, L)`` for one prompt on all images; L at most 77.
            attention_mask: as ``input_ids``, 0 where there is padding. It is not needed, since padding follows the end.
        """
        self._check_image(image)
        _check_tokens(input_ids, attention_mask, len(image))
        words, sentence = self.backbone.encode_text(input_ids)
        unread = self._unread(input_ids, attention_mask)
        words, sentence, unread = (part.expand(len(image), *part.shape[1:]) for part in (words, sentence, unread))
        maps = self.backbone.encode_image((image.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std)
        fused = self.decoder(self.neck(maps, sentence), words, unread)
        logits = self.proj(fused, sentence)
        return F.interpolate(logits, image.shape[2:], mode="bicubic", align_corners=True)

    def _unread(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens that the decoder leaves out, ``(B or 1, L)``, true or false."""
        if self.padding == "published":
            return input_ids == 0
        ends = (input_ids == END).int()
        after_end = ends.cumsum(-1) > ends
        return after_end if attention_mask is None else after_end | (attention_mask == 0)

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, len(self.mean)):
            raise ValueError(
                f"expected images (B, 1 or 3, S, S), got {tuple(image.shape)}: CRIS is for 2-D, so slice volumes"
            )
        height, width = image.shape[2:]
        if height != width or height % STRIDE or not height:
            raise ValueError(
                f"expected square images with sides in multiples of {STRIDE}, got {height} x {width}: resize or pad "
                "them, or use a sliding window"
            )
        if self.neck.txt_proj[1].training and len(image) == 1:
            raise ValueError(
                "expected 2 images or more in training mode, got 1: the sentence is normalised over the batch; use "
                "larger batches, or eval()"
            )


class Neck(nn.Module):
    """Maps at S/8, S/16, S/32 and the sentence -> one map ``(B, channels, S/16, S/16)``.

    The sentence multiplies the coarsest map. Each finer map is joined to the one before, all three meet at S/16, and
    two channels that say where a place is are added.
    """

    def __init__(self, in_channels: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        eighth, sixteenth, last = in_channels
        half, double = channels // 2, 2 * channels
        self.txt_proj = nn.Sequential(nn.Linear(last, double, bias=False), nn.BatchNorm1d(double), nn.ReLU())
        self.f1_v_proj = _conv(last, double, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(double), nn.ReLU())
        self.f2_v_proj = _conv(sixteenth, channels, 3)
        self.f2_cat = _conv(double + channels, channels, 1)
        self.f3_v_proj = _conv(eighth, half, 3)
        self.f3_cat = _conv(half + channels, channels, 1)
        self.f4_proj5 = _conv(double, channels, 3)
        self.f4_proj4 = _conv(channels, channels, 3)
        self.f4_proj3 = _conv(channels, channels, 3)
        self.aggr = _conv(3 * channels, channels, 1)
        self.coordconv = nn.Sequential(CoordConv(channels), _conv(channels, channels, 3))

    def forward(self, maps: tuple[Tensor, Tensor, Tensor], sentence: Tensor) -> Tensor:
        eighth, sixteenth, last = maps
        gate = rearrange(self.txt_proj(sentence), "b c -> b c 1 1")
        coarse = self.norm_layer(self.f1_v_proj(last) * gate)
        middle = self.f2_cat(torch.cat([self.f2_v_proj(sixteenth), _twice(coarse)], 1))
        fine = self.f3_cat(torch.cat([F.avg_pool2d(self.f3_v_proj(eighth), 2), middle], 1))
        levels = (self.f4_proj3(fine), self.f4_proj4(middle), _twice(self.f4_proj5(coarse)))
        return self.coordconv(self.aggr(torch.cat(levels, 1)))


class CoordConv(nn.Module):
    """A convolution that also sees where it is: column and row, each from -1 to 1, as two more channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels + 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        row = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device).view(1, 1, -1, 1)
        column = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device).view(1, 1, 1, -1)
        place = [axis.expand(batch, 1, height, width) for axis in (column, row)]
        return self.conv1(torch.cat([x, *place], 1))


class Decoder(nn.Module):
    """Every place reads the other places and the words: ``(B, C, H, W), (B, L, C), (B, L) -> (B, C, H, W)``."""

    def __init__(self, channels: int, num_heads: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, num_heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, words: Tensor, unread: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        column = sines(width, channels // 2).expand(height, -1, -1)
        row = sines(height, channels // 2)[:, None].expand(-1, width, -1)
        place = torch.cat([column, row], -1).flatten(0, 1).to(words)
        order = sines(words.shape[1], channels).to(words)
        tokens = rearrange(x, "b c h w -> b (h w) c")
        for layer in self.layers:
            tokens = layer(tokens, words, place, order, unread)
        return rearrange(self.norm(tokens), "b (h w) c -> b c h w", h=height)


class DecoderLayer(nn.Module):
    """Attention to places, attention to words, two linear layers; all normalised before and, inside, once more.

    Positions enter queries and keys, never values.
    """

    def __init__(self, channels: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(channels)
        self.cross_attn_norm = nn.LayerNorm(channels)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, channels),
        )
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, words: Tensor, place: Tensor, order: Tensor, unread: Tensor) -> Tensor:
        y = self.norm1(x)
        seen = self.self_attn(y + place, y + place, y, need_weights=False)[0]
        x = x + self.dropout(self.self_attn_norm(seen))
        y = self.norm2(x)
        read = self.multihead_attn(y + place, words + order, words, key_padding_mask=unread, need_weights=False)[0]
        x = x + self.dropout(self.cross_attn_norm(read))
        return x + self.dropout(self.ffn(self.norm3(x)))


class Projector(nn.Module):
    """``(B, C, H, W)`` and a sentence -> ``(B, 1, 4H, 4W)``: the sentence becomes a 3 x 3 kernel and a bias."""

    def __init__(self, channels: int, sentence: int) -> None:
        super().__init__()
        half = channels // 2
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            _conv(channels, channels, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            _conv(channels, half, 3),
            nn.Conv2d(half, half, 1),
        )
        self.txt = nn.Linear(sentence, 9 * half + 1)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        made = self.txt(sentence)
        kernel = rearrange(made[:, :-1], "b (c h w) -> b c h w", h=3, w=3)
        # One group to a case, so that each meets its own kernel only.
        cases = rearrange(self.vis(x), "b c h w -> 1 (b c) h w")
        logits = F.conv2d(cases, kernel, made[:, -1], padding=1, groups=len(x))
        return rearrange(logits, "1 b h w -> b 1 h w")


def sines(length: int, channels: int) -> Tensor:
    """Positions as in "Attention is all you need", ``(length, channels)``: sine, cosine, and slower ones in turn."""
    rates = 10_000.0 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def _conv(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def _check_settings(width: int, depths: Sequence[int], channels: int, num_heads: int, padding: str) -> None:
    if width % 2 or width < 2:
        raise ValueError(f"expected an even width, got {width}: the first convolutions have half of it")
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"expected the depths of 4 stages, 1 or more each, got {tuple(depths)}: RN50 has (3, 4, 6, 3)")
    if channels % 4 or channels % num_heads:
        raise ValueError(
            f"expected channels in multiples of 4, for positions, and of {num_heads} heads, got {channels}: change "
            "channels or num_heads"
        )
    if padding not in PADDINGS:
        raise ValueError(f"expected padding to be one of {', '.join(PADDINGS)}, got {padding!r}: choose one")


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None, batch: int) -> None:
    check_tokens(input_ids, attention_mask, batch, most=CONTEXT, end=END)
    if attention_mask is not None and not attention_mask[:, 0].all():
        raise ValueError(
            "expected an attention mask that is 1 from the start of each prompt, got one that begins with 0: pad after "
            "the text, as CLIP does"
        )
