"""VLSM-Adapter (Dhakal et al., MICCAI 2024, https://arxiv.org/abs/2405.06196) and LoRA for CLIPSeg.

A few small layers learn the medical images and words while all of CLIPSeg stays as it was. They live outside the base,
under the authors' names, and reach into it by forward hooks; so the base keeps its own names and loads its own
checkpoints, and a file of adapters has 12 MB rather than 600.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.clipseg import CLIPSeg, Trainable
from medrobust.networks.weights import load_weights

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
except ImportError as error:
    raise ImportError("adapters for CLIPSeg need transformers: pip install 'medrobust[vlm]'") from error

Base = CLIPSegForImageSegmentation | CLIPSegConfig | Mapping[str, Any]

VARIANTS = ("v", "l", "c", "vl", "vlc")
COND_BOTTLENECK = 256
"""The authors' adapter of the prompt's embedding has this width whatever the others have."""


class Adapter(nn.Module):
    """A residual bottleneck on the last axis: ``x + ReLU(W2 ReLU(W1 x + b1) + b2)``, shape kept.

    The outer ReLU is the authors': an adapter can only add, and with W2 = 0 its gradients would be zero for ever. So
    ``identity`` starts with W2 = 0 **and** leaves the outer ReLU out: exactly the identity at first, and W2 learns.
    """

    def __init__(self, channels: int, bottleneck: int, *, identity: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, bottleneck)
        self.fc2 = nn.Linear(bottleneck, channels)
        self.identity = identity
        if identity:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor, *, residual: bool = True) -> Tensor:
        y = self.fc2(F.relu(self.fc1(x)))
        if not self.identity:
            y = F.relu(y)
        return x + y if residual else y

    # Hooks are bound methods: a deep copy of the network then hooks its own adapters, where a closure would keep these.
    def after_mlp(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self(output)

    def after_attention(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self(output[0]), output[1]


class LowRank(nn.Module):
    """LoRA's update of a linear layer: ``y + scale * B A x``; B starts at zero, so at first it is the identity."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def after_linear(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.scale * self.up(self.down(args[0]))


class AdaptedCLIPSeg(CLIPSeg):
    """CLIPSeg with adapters in files of their own. Use one of the subclasses."""

    def settings(self) -> dict[str, str]:
        """What two networks must share to exchange adapters, as written into the file."""
        raise NotImplementedError

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapters' tensors, without the base."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clipseg.")}

    def save_adapters(self, path: str | Path) -> None:
        """Write the adapters, and nothing of the base, to a safetensors file.

        Raises:
            ValueError: the base trains too, so adapters alone would not give this network back.
        """
        if self.trainable != "adapters":
            raise ValueError(
                f'expected trainable "adapters", got {self.trainable!r}, where the base changes too: save '
                "state_dict() instead"
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapter_state_dict().items()}
        save_file(tensors, str(path), metadata=self.settings())

    def load_adapters(self, path: str | Path) -> None:
        """Read what ``save_adapters`` wrote, all of it or nothing. The base must be the one they were trained on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no adapters, or those of other settings or sizes; the network is left as it was.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a file of adapters, got {path}, which does not exist. Check the path")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                settings = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"expected a safetensors file of adapters, got {path.name}: {error}") from error
        if settings != self.settings():
            raise ValueError(
                f"expected adapters with {_words(self.settings())}, got {_words(settings)} in {path.name}: build the "
                "network with the file's settings"
            )
        own = self.adapter_state_dict()
        misfits = sorted(
            name for name in own.keys() | tensors.keys() if _shape(own.get(name)) != _shape(tensors.get(name))
        )
        if misfits:
            name = misfits[0]
            raise ValueError(
                f"expected adapters for this base in {path.name}, got {len(misfits)} tensors that do not fit, such as "
                f"{name} {_shape(tensors.get(name))} for {_shape(own.get(name))}: use the base they were trained on"
            )
        self.load_state_dict(tensors, strict=False)


class DenseCLIPSeg(AdaptedCLIPSeg):
    """Adapters inside the encoders, two a layer: on attention and on MLP, before each is added to the residual.

    As released: the layers below the last one that the decoder reads have them (0 to 8 in both towers), while that one
    and the text tower's last three have none.

    Args:
        base: as for ``CLIPSeg``, and so are all further settings.
        variant: where: any of ``v`` (vision), ``l`` (language) and ``c`` (the prompt's embedding), in this order.
            Trainable parameters with the defaults: v 1,784,448, vl 2,974,464 (the paper's "3M"), vlc 3,237,376.
        bottleneck: width of the adapters.
        identity: start as plain CLIPSeg, see ``Adapter``.
        trainable: ``"adapters"``, or what else trains with them.
    """

    cond_adapter: Adapter

    def __init__(
        self,
        base: Base,
        variant: str = "vl",
        *,
        bottleneck: int = 64,
        identity: bool = False,
        trainable: Trainable = "adapters",
        **settings: Any,
    ) -> None:
        super().__init__(base, trainable=trainable, **settings)
        self.variant, self.bottleneck, self.identity = _checked(variant), bottleneck, identity
        depth = max(self.extract_layers)
        clip = self.clipseg.clip
        for letter, tower in (("v", clip.vision_model), ("l", clip.text_model)):
            if letter in variant:
                self._adapt(letter, tower, depth)
        if "c" in variant:
            self.cond_adapter = Adapter(self.config.projection_dim, COND_BOTTLENECK, identity=identity)

    def settings(self) -> dict[str, str]:
        return _settings(self, "variant", "bottleneck", "identity")

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        condition = super().condition(input_ids, attention_mask)
        return self.cond_adapter(condition) if "c" in self.variant else condition

    def _adapt(self, letter: str, tower: Any, depth: int) -> None:
        layers, channels = list(tower.encoder.layers), tower.config.hidden_size
        if len(layers) < depth:
            raise ValueError(f"expected at least {depth} text layers to adapt, got {len(layers)}: drop l from variant")
        on_attention, on_mlp = (
            nn.ModuleList(Adapter(channels, self.bottleneck, identity=self.identity) for _ in range(depth))
            for _ in range(2)
        )
        for layer, attention, mlp in zip(layers[:depth], on_attention, on_mlp, strict=True):
            layer.self_attn.register_forward_hook(attention.after_attention)
            layer.mlp.register_forward_hook(mlp.after_mlp)
        self.add_module(f"{letter}_attn_adapters", on_attention)
        self.add_module(f"{letter}_out_adapters", on_mlp)


class ShallowCLIPSeg(AdaptedCLIPSeg):
    """Adapters between the encoders and the decoder; the encoders compute what they always did.

    One on each activation that the decoder reads of the image, one on the prompt's embedding, and three on the text
    tower's states at the end token after the same layers, added to the prompt's embedding. As released, the states
    themselves are added too, so a fresh network differs much from plain CLIPSeg; with ``identity`` only what the
    adapters learn is added.

    Args:
        base: as for ``CLIPSeg``, and so are all further settings.
        variant: as for ``DenseCLIPSeg``. Trainable parameters: v 2,363,136, vl 3,939,072, vlc 4,201,984 ("4.2M").
        bottleneck: width of the adapters.
        identity: start as plain CLIPSeg, see ``Adapter``.
        trainable: ``"adapters"``, or what else trains with them.
    """

    vision_extract_adapters: nn.ModuleList
    text_extract_adapters: nn.ModuleList
    cond_adapter: Adapter

    def __init__(
        self,
        base: Base,
        variant: str = "vlc",
        *,
        bottleneck: int = 512,
        identity: bool = False,
        trainable: Trainable = "adapters",
        **settings: Any,
    ) -> None:
        super().__init__(base, trainable=trainable, **settings)
        self.variant, self.bottleneck, self.identity = _checked(variant), bottleneck, identity
        text, count = self.config.text_config, len(self.extract_layers)

        def adapters(channels: int) -> nn.ModuleList:
            return nn.ModuleList(Adapter(channels, bottleneck, identity=identity) for _ in range(count))

        if "v" in variant:
            self.vision_extract_adapters = adapters(self.config.vision_config.hidden_size)
        if "l" in variant:
            if text.hidden_size != self.config.projection_dim or text.num_hidden_layers <= max(self.extract_layers):
                raise ValueError(
                    f"expected a text tower of width {self.config.projection_dim} and more than "
                    f"{max(self.extract_layers)} layers, got {text.hidden_size} and {text.num_hidden_layers}: "
                    "drop l from variant"
                )
            self.text_extract_adapters = adapters(text.hidden_size)
        if "c" in variant:
            self.cond_adapter = Adapter(self.config.projection_dim, COND_BOTTLENECK, identity=identity)

    def settings(self) -> dict[str, str]:
        return _settings(self, "variant", "bottleneck", "identity")

    def activations(self, image: Tensor) -> list[Tensor]:
        activations = super().activations(image)
        if "v" not in self.variant:
            return activations
        return [adapter(x) for adapter, x in zip(self.vision_extract_adapters, activations, strict=True)]

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        clip = self.clipseg.clip
        text = clip.text_model(input_ids, attention_mask, output_hidden_states="l" in self.variant)
        condition = clip.text_projection(text.pooler_output)
        if "c" in self.variant:
            condition = self.cond_adapter(condition)
        if "l" in self.variant:
            rows, end = torch.arange(len(input_ids), device=input_ids.device), self._end_of_text(input_ids)
            for adapter, layer in zip(self.text_extract_adapters, self.extract_layers, strict=True):
                # The first of the hidden states is the embedding, before any layer.
                state = text.hidden_states[layer + 1][rows, end]
                condition = condition + adapter(state, residual=not self.identity)
        return condition


class LoRACLIPSeg(AdaptedCLIPSeg):
    """LoRA (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) on queries and values of both towers: a comparator.

    Only layers that a logit depends on are adapted: 442,368 parameters of rank 8, where all layers would have 491,520.
    A fresh network equals plain CLIPSeg.

    Args:
        base: as for ``CLIPSeg``, and so are all further settings.
        rank: of the updates.
        alpha: their size; they are multiplied by ``alpha / rank``.
        trainable: ``"adapters"``, or what else trains with them.
    """

    def __init__(
        self,
        base: Base,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        trainable: Trainable = "adapters",
        **settings: Any,
    ) -> None:
        super().__init__(base, trainable=trainable, **settings)
        self.rank, self.alpha = rank, alpha
        clip = self.clipseg.clip
        used = max(self.extract_layers) + 1
        for letter, layers in (("v", clip.vision_model.encoder.layers[:used]), ("l", clip.text_model.encoder.layers)):
            for name in ("q_proj", "v_proj"):
                self._adapt(f"{letter}_{name}", [getattr(layer.self_attn, name) for layer in layers])

    def settings(self) -> dict[str, str]:
        return _settings(self, "rank", "alpha")

    def _adapt(self, name: str, linears: list[nn.Linear]) -> None:
        updates = nn.ModuleList()
        for linear in linears:
            update = LowRank(linear.in_features, linear.out_features, self.rank, self.alpha / self.rank)
            linear.register_forward_hook(update.after_linear)
            updates.append(update)
        self.add_module(f"{name}_lora", updates)


def load_base(network: AdaptedCLIPSeg, weights: str | Path) -> None:
    """Put the weights of a plain :class:`CLIPSeg` under a network's adapters, which stay as they are.

    Raises:
        FileNotFoundError, ValueError: no such file, or weights of another network.
    """
    plain = CLIPSeg(network.clipseg)
    load_weights(plain, weights)
    network.set_trainable(network.trainable)


def on_base(network: AdaptedCLIPSeg, weights: str | Path) -> AdaptedCLIPSeg:
    """``network`` after :func:`load_base`, for configurations."""
    load_base(network, weights)
    return network


def _checked(variant: str) -> str:
    if variant not in VARIANTS:
        raise ValueError(f"expected variant to be one of {', '.join(VARIANTS)}, got {variant!r}: choose one")
    return variant


def _settings(network: nn.Module, *names: str) -> dict[str, str]:
    return {"network": type(network).__name__, **{name: str(getattr(network, name)) for name in names}}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _words(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items())) or "no settings"
