"""CLIP (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020): which of these texts does an image go with?

The parts are ``transformers``' own, so its checkpoints fit; ``clip_layout`` reads OpenAI's. Images are normalised
inside, and text features are kept until a weight changes: an attack of a hundred steps encodes the texts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.adapters import Adapter
from medrobust.networks.clip_layout import from_openai
from medrobust.networks.hub import from_hub, of_settings
from medrobust.networks.weights import WeightsReport, load_weights

try:
    from transformers import CLIPConfig, CLIPModel
except ImportError as error:
    raise ImportError("CLIP needs transformers: pip install 'medrobust[vlm]'") from error

Network = TypeVar("Network", bound="ZeroShotCLIP")
Trainable = Literal["all", "image", "last", "projection", "adapters", "none"]

TRAINABLE = ("all", "image", "last", "projection", "adapters", "none")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP was trained with."""

KEPT = 2
"""Sets of texts whose features are kept: classes, and the captions at hand."""

TEXTS_AT_ONCE = 256


class ZeroShotCLIP(nn.Module):
    """An image's logits for texts: ``image (B, 3, S, S) -> logits (B, K, 1, 1)``.

    One answer an image is a grid of one voxel, so that attacks, objectives and handlers take it as they take a
    segmentation: labels are (B, 1, 1, 1). :meth:`class_logits` drops the grid. A logit is the cosine of the image's and
    a text's embedding times the temperature. What the channels stand for depends on the call:

    * ``network(image)``: the K classes of ``prompts``. Where a class has several texts, the mean of their unit
      embeddings stands for it (prompt ensembling).
    * ``network(image, input_ids)``: N captions, integers (N, L); the same for all images.
    * ``network(image, reference=r)``: the shift ``embedding - r`` (B, D, 1, 1) of the embedding before it is scaled to
      unit length; r is (B, D, 1, 1). This is what FARE trains and attacks on.

    Images lie in [0, 1] and are normalised inside, so that an attack's eps is in pixels; S is the size that the network
    was made for (224 for OpenAI's).

    Args:
        base: settings (``CLIPConfig``, or a mapping of what it takes) for random weights, or a model, which is not
            copied: give every network its own.
        prompts: tokens of the classes' texts, integers (K, T, L), T texts a class; ``None``: captions only. They are
            no weights: a checkpoint does not hold them.
        trainable: what gets gradients: ``"all"``; ``"image"``, the vision tower with its projection; ``"last"``, its
            last ``blocks`` layers, last norm and projection; ``"projection"`` alone; ``"adapters"`` alone; ``"none"``.
        blocks: of ``"last"``.
        adapters: width of residual adapters, two in every vision layer, that start as the identity; 0: none.
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
    prompts: Tensor | None

    def __init__(
        self,
        base: CLIPModel | CLIPConfig | Mapping[str, Any],
        prompts: Tensor | None = None,
        *,
        trainable: Trainable = "all",
        blocks: int = 1,
        adapters: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        attention: Literal["eager", "sdpa"] = "sdpa",
    ) -> None:
        super().__init__()
        self.clip = of_settings(CLIPModel, base, attention)
        self.config = self.clip.config
        self.image_size = int(self.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("prompts", prompts, persistent=False)
        if prompts is not None and prompts.ndim != 3:
            raise ValueError(
                f"expected prompts as tokens (classes, texts a class, length), got {tuple(prompts.shape)}: tokenise "
                "every class with the same number of templates"
            )
        self.blocks = blocks
        if adapters:
            self._adapt(adapters)
        self._kept: list[tuple[Tensor, Any, Tensor]] = []
        self.set_trainable(trainable)

    @classmethod
    def from_pretrained(
        cls: type[Network], name: str, prompts: Tensor | None = None, *, attention: str = "sdpa", **settings: Any
    ) -> Network:
        """This network on the weights in a local folder, or on the hub under ``name``; ``settings`` as above.

        Only tensors are read, from safetensors or from a file without code; half precision becomes single.

        Raises:
            FileNotFoundError: neither a folder nor a name on the hub that can be reached.
            ValueError: the weights are of another architecture, or incomplete.
        """
        base = from_hub(
            CLIPModel,
            name,
            called="CLIP",
            example="openai/clip-vit-base-patch32",
            attn_implementation=attention,
            dtype=torch.float32,
        )
        return cls(base, prompts, **settings)

    @classmethod
    def from_openai(
        cls: type[Network], weights: Mapping[str, Tensor], prompts: Tensor | None = None, **settings: Any
    ) -> Network:
        """This network on a state dict with OpenAI's own names; see ``clip_layout.from_openai``."""
        config, state = from_openai(weights)
        base = of_settings(CLIPModel, config, settings.pop("attention", "sdpa"))
        base.load_state_dict(state)
        return cls(base, prompts, **settings)

    def forward(self, image: Tensor, input_ids: Tensor | None = None, *, reference: Tensor | None = None) -> Tensor:
        """Logits (B, K, 1, 1), or the shift (B, D, 1, 1); see the class."""
        embedding = self.embed(image)
        if reference is not None:
            return embedding[..., None, None] - reference
        texts = self.class_features() if input_ids is None else self.text_features(input_ids)
        logits: Tensor = self.clip.logit_scale.exp() * F.normalize(embedding, dim=-1) @ texts.t()
        return logits[..., None, None]

    def class_logits(self, image: Tensor) -> Tensor:
        """Logits (B, K) of the classes."""
        return self(image).flatten(1)

    def embed(self, image: Tensor) -> Tensor:
        """The image's embedding (B, D), not scaled to unit length; one channel stands for three equal ones."""
        if image.ndim != 4 or image.shape[1] not in (1, len(self.mean)):
            raise ValueError(f"expected images (B, 1 or 3, S, S), got {tuple(image.shape)}: CLIP is for 2-D")
        if tuple(image.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"expected images of {self.image_size} x {self.image_size} pixels, got {tuple(image.shape[2:])}: "
                "resize or crop them when they are read"
            )
        pixels = (image.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)

    def class_features(self) -> Tensor:
        """The classes' unit embeddings (K, D).

        Raises:
            ValueError: the network was made without prompts.
        """
        if self.prompts is None:
            raise ValueError("expected prompts for class logits, got none: give them when the network is made")
        classes, texts, length = self.prompts.shape
        each = self.text_features(self.prompts.view(classes * texts, length)).view(classes, texts, -1)
        return F.normalize(each.mean(1), dim=-1)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Unit embeddings (N, D) of texts, integers (N, L): fresh while the text tower trains, else kept.

        A change of the weights is seen, but not one through ``.data``, which leaves no trace.
        """
        if self.text_trains and torch.is_grad_enabled():
            return self._encode(input_ids)
        state = self._text_state()
        for kept_ids, kept_state, features in self._kept:
            if kept_state == state and kept_ids.shape == input_ids.shape and torch.equal(kept_ids, input_ids):
                return features
        # Kept features meet autograd later, where tensors of inference mode are refused, and calls of other precision.
        whole = torch.autocast(input_ids.device.type, enabled=False)
        with whole, torch.inference_mode(False), torch.no_grad():
            parts = [self._encode(part.clone()) for part in input_ids.split(TEXTS_AT_ONCE)]
            features = torch.cat(parts)
            fresh = [one for one in self._kept if one[1] == state][-(KEPT - 1) :]
            self._kept = [*fresh, (input_ids.clone(), state, features)]
        return features

    @property
    def text_trains(self) -> bool:
        """Whether anything that text features depend on gets gradients."""
        return any(parameter.requires_grad for parameter in self._text_parameters())

    def set_trainable(self, trainable: Trainable) -> None:
        """Give gradients to what ``trainable`` names; take them from all else."""
        if trainable not in TRAINABLE:
            raise ValueError(f"expected trainable to be one of {', '.join(TRAINABLE)}, got {trainable!r}: choose one")
        has_adapters = hasattr(self, "attn_adapters")
        if trainable == "adapters" and not has_adapters:
            raise ValueError('expected adapters to train, got none: set adapters=64, say, or another "trainable"')
        self.trainable = trainable
        vision = self.clip.vision_model
        layers = vision.encoder.layers
        if trainable == "last" and not 1 <= self.blocks <= len(layers):
            raise ValueError(f"expected blocks from 1 to the {len(layers)} vision layers, got {self.blocks}")
        self.requires_grad_(trainable == "all")
        chosen: dict[str, list[nn.Module]] = {
            "image": [vision, self.clip.visual_projection],
            "last": [layers[-self.blocks :], vision.post_layernorm, self.clip.visual_projection],
            "projection": [self.clip.visual_projection],
        }
        for module in chosen.get(trainable, []):
            module.requires_grad_(True)
        if has_adapters and trainable != "none":
            self.attn_adapters.requires_grad_(True)
            self.mlp_adapters.requires_grad_(True)

    def load_base(self, path: str | Path) -> WeightsReport:
        """Put the weights of such a network without adapters under this one's adapters, which stay as they are.

        Raises:
            FileNotFoundError, ValueError: no such file, or weights of another network.
        """
        plain = nn.Module()
        plain.clip = self.clip
        return load_weights(plain, path)

    def _adapt(self, width: int) -> None:
        layers, channels = self.clip.vision_model.encoder.layers, self.config.vision_config.hidden_size
        self.attn_adapters, self.mlp_adapters = (
            nn.ModuleList(Adapter(channels, width, identity=True) for _ in layers) for _ in range(2)
        )
        for layer, attention, mlp in zip(layers, self.attn_adapters, self.mlp_adapters, strict=True):
            layer.self_attn.register_forward_hook(attention.after_attention)
            layer.mlp.register_forward_hook(mlp.after_mlp)

    def _encode(self, input_ids: Tensor) -> Tensor:
        ends = input_ids == self.config.text_config.eos_token_id
        if self.config.text_config.eos_token_id != 2:
            if not ends.any(-1).all():
                raise ValueError(
                    f"expected the end token {self.config.text_config.eos_token_id} in every text, got one without "
                    "it: truncate long texts before their end token, not after"
                )
            # No token sees what follows it, and only the first end token is read.
            input_ids = input_ids[:, : int(ends.int().argmax(-1).max()) + 1]
        return F.normalize(self.clip.text_projection(self.clip.text_model(input_ids).pooler_output), dim=-1)

    def _text_parameters(self) -> list[nn.Parameter]:
        return [*self.clip.text_model.parameters(), *self.clip.text_projection.parameters()]

    def _text_state(self) -> Any:
        """Differs after any change of a weight that text features depend on."""
        return [(id(one), one._version, one.data_ptr(), one.dtype, one.device) for one in self._text_parameters()]
