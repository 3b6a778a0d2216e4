"""CLIPSeg (Lüddecke and Ecker, CVPR 2022, https://arxiv.org/abs/2112.10003): segment what a sentence names.

The parts are ``transformers``' own, so its checkpoints fit. The forward pass is ours: theirs runs both encoders under
``torch.no_grad()``, so neither pixels nor encoders would ever get a gradient, and an attack would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from medrobust.networks.hub import from_hub, of_settings
from medrobust.networks.tokens import FIRST_EOS, check_tokens

try:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
except ImportError as error:
    raise ImportError("CLIPSeg needs transformers: pip install 'medrobust[vlm]'") from error

Network = TypeVar("Network", bound="CLIPSeg")
Trainable = Literal["adapters", "decoder", "all"]

TRAINABLE = ("adapters", "decoder", "all")

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""What the released weights were trained with."""


def rd64() -> CLIPSegConfig:
    """Settings of ``CIDAS/clipseg-rd64-refined``: CLIP ViT-B/16, 64 channels in the decoder, 150,747,746 parameters."""
    return CLIPSegConfig(vision_config={"patch_size": 16}, reduce_dim=64, use_complex_transposed_convolution=True)


class CLIPSeg(nn.Module):
    """Image and text in, mask out: ``image (B, 3, S, S), input_ids (B or 1, L) -> logits (B, 1, S, S)``.

    Images lie in [0, 1] and are normalised inside, so that an attack's eps is in pixels. Positions are interpolated:
    S is any multiple of the patch (16); the released weights are used at 352. Parameters that no logit depends on
    (vision layers after the last one that the decoder reads, CLIP's image projection and temperature) never train
    and are never computed; they stay for the sake of checkpoints.

    Args:
        base: settings (``rd64()``, or a mapping of what ``CLIPSegConfig`` takes) for random weights, or a model,
            which is not copied: give every network its own.
        trainable: what gets gradients: ``"decoder"``, or ``"all"`` for both encoders too. Adapters, where a subclass
            has them, always train, and ``"adapters"`` means nothing but them.
        mean: of the three channels, in [0, 1].
        std: of the three channels.
        attention: ``"eager"`` for bitwise comparisons, ``"sdpa"`` for speed. A model as ``base`` keeps its own.

    Raises:
        ValueError: at construction or call, if settings, image or tokens do not fit.
    """

    # Its parts may be dictionaries to the type checker; after construction they never are.
    config: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        base: CLIPSegForImageSegmentation | CLIPSegConfig | Mapping[str, Any],
        *,
        trainable: Trainable = "decoder",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        attention: Literal["eager", "sdpa"] = "sdpa",
    ) -> None:
        super().__init__()
        self.clipseg = of_settings(CLIPSegForImageSegmentation, base, attention)
        if self.clipseg is not base:
            _draw_decoder(self.clipseg.decoder)
        self.config = self.clipseg.config
        self.extract_layers = tuple(self.config.extract_layers)
        self.patch_size = int(self.config.vision_config.patch_size)
        _check_config(self.config)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)
        self.set_trainable(trainable)

    @classmethod
    def from_pretrained(
        cls: type[Network], name: str, *, attention: Literal["eager", "sdpa"] = "sdpa", **settings: Any
    ) -> Network:
        """This network on the weights in a local folder, or on the hub under ``name``; ``settings`` as above.

        Only tensors are read, from safetensors or from a file without code.

        Raises:
            FileNotFoundError: neither a folder nor a name on the hub that can be reached.
            ValueError: the weights are of another architecture, or incomplete.
        """
        base = from_hub(
            CLIPSegForImageSegmentation,
            name,
            called="CLIPSeg",
            example="CIDAS/clipseg-rd64-refined",
            attn_implementation=attention,
        )
        return cls(base, **settings)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1, S, S)``.

        Args:
            image: ``(B, 3, S, S)`` in [0, 1]; ``(B, 1, S, S)`` stands for three equal channels.
            input_ids: tokens, integers ``(B, L)``, or ``(1, L)`` for one prompt on all images; L at most 77.
            attention_mask: as ``input_ids``, 0 where there is padding. Padding follows the end of the text, which no
                token sees beyond, so it changes nothing.
        """
        self._check_image(image)
        text = self.config.text_config
        check_tokens(input_ids, attention_mask, len(image), most=text.max_position_embeddings, end=text.eos_token_id)
        condition = self.condition(input_ids, attention_mask)
        # The decoder takes its batch size from the condition.
        logits = self.clipseg.decoder(self.activations(image), condition.expand(len(image), -1)).logits
        return logits[:, None]

    def activations(self, image: Tensor) -> list[Tensor]:
        """What the decoder reads of the image: ``(B, 1 + patches, channels)`` after each of ``extract_layers``."""
        vision = self.clipseg.clip.vision_model
        pixels = (image.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std
        x = vision.pre_layrnorm(vision.embeddings(pixels))
        after = []
        for layer in vision.encoder.layers[: max(self.extract_layers) + 1]:
            x = layer(x, None)
            after.append(x)
        return [after[layer] for layer in self.extract_layers]

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the decoder reads of the text: ``(B or 1, projection_dim)``."""
        clip = self.clipseg.clip
        return clip.text_projection(clip.text_model(input_ids, attention_mask).pooler_output)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Everything outside the base."""
        return (parameter for name, parameter in self.named_parameters() if not name.startswith("clipseg."))

    def set_trainable(self, trainable: Trainable) -> None:
        """Give gradients to the adapters and to what ``trainable`` names; take them from all else."""
        if trainable not in TRAINABLE:
            raise ValueError(f"expected trainable to be one of {', '.join(TRAINABLE)}, got {trainable!r}: choose one")
        if trainable == "adapters" and type(self) is CLIPSeg:
            raise ValueError(
                'expected trainable "decoder" or "all" for CLIPSeg without adapters, got "adapters": choose one of '
                "them, or a network of medrobust.networks.adapters"
            )
        self.trainable = trainable
        self.clipseg.requires_grad_(trainable == "all")
        if trainable == "decoder":
            self.clipseg.decoder.requires_grad_(True)
        clip = self.clipseg.clip
        for unused in (
            clip.vision_model.encoder.layers[max(self.extract_layers) + 1 :],
            clip.vision_model.post_layernorm,
            clip.visual_projection,
        ):
            unused.requires_grad_(False)
        clip.logit_scale.requires_grad_(False)

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, len(self.mean)):
            raise ValueError(
                f"expected images (B, 1 or 3, S, S), got {tuple(image.shape)}: CLIPSeg is for 2-D, so slice volumes"
            )
        height, width = image.shape[2:]
        if height != width or height % self.patch_size or not height:
            raise ValueError(
                f"expected square images with sides in multiples of {self.patch_size}, got {height} x {width}: resize "
                "or pad them, or use a sliding window"
            )

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """Position of the first end token in each row, ``(B,)``: the only token that has read the whole prompt."""
        first = self.config.text_config.eos_token_id == FIRST_EOS
        return (input_ids if first else self._ends(input_ids).int()).argmax(-1)

    def _ends(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.text_config.eos_token_id


def _draw_decoder(decoder: nn.Module) -> None:
    """Draw the decoder's first and last weights as torch does.

    ``transformers`` draws those with a standard deviation of 1: what comes out is so large that its transformer layers
    add next to nothing to it, and a decoder trained from there does not learn to read.
    """
    for name, module in decoder.named_modules():
        if not name.startswith("layers.") and isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()


def _check_config(config: Any) -> None:
    patch, layers = config.vision_config.patch_size, config.vision_config.num_hidden_layers
    if config.use_complex_transposed_convolution and (patch // 4) ** 2 != patch:
        raise ValueError(
            f"expected patch_size 16 with use_complex_transposed_convolution, got {patch}: its logits would have "
            "another size than the image; set one or the other"
        )
    if max(config.extract_layers) >= layers:
        raise ValueError(
            f"expected extract_layers below the {layers} vision layers, got {tuple(config.extract_layers)}: they count "
            "from 0"
        )
