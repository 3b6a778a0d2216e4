"""OpenAI's own names for CLIP's weights (ViT-B/32.pt and its kin), turned into those of ``transformers``.

OpenAI fuses queries, keys and values into one matrix, and stores both projections the other way round. The settings
follow from the shapes; heads are 64 channels wide in every released ViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD = 64
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that the released files hold beside the weights."""

OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}


def from_openai(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings for ``CLIPConfig`` and a state dict for ``CLIPModel``, in single precision.

    Args:
        weights: such as ``torch.jit.load("ViT-B-32.pt", map_location="cpu").state_dict()``.

    Raises:
        ValueError: a name that such a file does not have, or one that is missing; ResNets are not read here.
    """
    if "visual.proj" not in weights or "visual.conv1.weight" not in weights:
        raise ValueError(
            "expected OpenAI's names of a CLIP with a vision transformer (visual.conv1.weight, visual.proj, ...), got "
            f"{', '.join(list(weights)[:3])}, ...: is it a ResNet, or a folder for from_pretrained?"
        )
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in NO_WEIGHTS:
            state |= _renamed(name, tensor.detach().float())
    return _settings(weights), state


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "visual.proj":
        return {"visual_projection.weight": tensor.t().contiguous()}
    if name == "text_projection":
        return {"text_projection.weight": tensor.t().contiguous()}
    for prefix, tower in TOWERS.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            inside = f"{tower}.encoder.layers.{number}."
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.rpartition("_")[2]
                parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
                return {f"{inside}self_attn.{part}.{kind}": values.clone() for part, values in parts}
            module, _, kind = rest.rpartition(".")
            if module in BLOCK:
                return {f"{inside}{BLOCK[module]}.{kind}": tensor}
    if name in OUTER:
        return {OUTER[name]: tensor}
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return {f"{OUTER[module]}.{kind}": tensor}
    raise ValueError(f"expected OpenAI's names of CLIP's weights, got {name}: is it a state dict of another network?")


def _settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    def tower(prefix: str, width: int) -> dict[str, int]:
        layers = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
        inner = weights[f"{prefix}0.mlp.c_fc.weight"].shape[0]
        heads = max(width // HEAD, 1)
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
        }

    vision, text = TOWERS
    patches = weights["visual.positional_embedding"].shape[0] - 1
    side, patch = round(patches**0.5), weights["visual.conv1.weight"].shape[-1]
    vocabulary, words = weights["token_embedding.weight"].shape
    projection = weights["text_projection"].shape[1]
    return {
        "text_config": {
            **tower(text, words),
            "vocab_size": vocabulary,
            "max_position_embeddings": weights["positional_embedding"].shape[0],
            "eos_token_id": vocabulary - 1,
            "projection_dim": projection,
        },
        "vision_config": {
            **tower(vision, weights["visual.conv1.weight"].shape[0]),
            "patch_size": patch,
            "image_size": side * patch,
            "projection_dim": projection,
        },
        "projection_dim": projection,
    }
