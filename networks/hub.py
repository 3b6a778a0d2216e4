"""Networks of ``transformers`` from a local folder or the hub, tensors only, with errors that say what to do."""

from __future__ import annotations

from typing import Any

try:
    from safetensors import SafetensorError
    from transformers import PretrainedConfig
except ImportError as error:
    raise ImportError("CLIP needs transformers: pip install 'medrobust[vlm]'") from error


def from_hub(cls: Any, name: str, *, called: str, example: str, **settings: Any) -> Any:
    """``cls.from_pretrained(name)``, complete and of the right architecture, from safetensors or a file without code.

    Args:
        cls: of ``transformers``.
        name: a local folder, or a name on the hub.
        called: what messages call the architecture, as in CLIPSeg.
        example: a name on the hub that would do.
        settings: passed on.

    Raises:
        FileNotFoundError: neither a folder nor a name on the hub that can be reached.
        ValueError: the weights are of another architecture, or incomplete.
    """
    try:
        found, _ = PretrainedConfig.get_config_dict(name)
        if found.get("model_type") != cls.config_class.model_type:
            raise ValueError(
                f"expected a {called} checkpoint, got {name} with model_type {found.get('model_type')!r}: use "
                f"{example} or a folder saved from it"
            )
        base, report = cls.from_pretrained(name, weights_only=True, output_loading_info=True, **settings)
    except OSError as error:
        raise FileNotFoundError(
            f"expected a folder with config.json and model.safetensors or a name on the hub, got {name}, where "
            "there is none. Check the spelling; without a network give a folder"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"expected weights in {name} that fit its config.json, got others or a file cut short: download both again"
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"expected weights for all of {called} in {name}, got none for {len(report['missing_keys'])} tensors "
            f"(such as {min(report['missing_keys'])}). Was the whole model saved?"
        )
    return base


def of_settings(cls: Any, base: Any, attention: str) -> Any:
    """``base`` itself where it is a ``cls``, else one of these settings (mapping or config), with random weights."""
    if isinstance(base, cls):
        return base
    settings = base.to_dict() if isinstance(base, cls.config_class) else dict(base)
    return cls(cls.config_class(**{**settings, "attn_implementation": attention}))
