"""The gate for bundles that nobody vouched for: read their plain configuration, run nothing of theirs.

MONAI's configurations are code: ``$`` evaluates Python, and ``_target_`` calls any function that can be imported, even
with evaluation switched off. An untrusted bundle therefore needs ``configs/batch.yaml`` (or ``.json``): plain values,
``'@name'`` for another value of the same file, and ``_target_`` only for the networks, transforms and inferers of the
list below. It is read by our own few lines, not by MONAI's parser; weights are read as tensors only. Its other
configurations are never opened, and a bundle that brings scripts, compiled models or pickles is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from medrobust.batch.faults import Exit, RunError

CONFIG_NAMES = ("batch.yaml", "batch.yml", "batch.json")
LARGEST, DEEPEST = 1 << 18, 40
REQUIRED = ("network_def", "preprocessing", "inferer")
ALLOWED_KEYS = ("_target_", "_desc_")
CODE_ENDINGS = (".py", ".pyc", ".so", ".pyd", ".dll", ".sh", ".ipynb", ".ts", ".onnx", ".plan", ".pkl", ".pickle")

_NETWORKS = "AttentionUnet BasicUNet DynUNet SegResNet SegResNetDS SwinUNETR UNet UNETR VNet"
_TRANSFORMS = (
    "Compose LoadImaged EnsureChannelFirstd EnsureTyped Orientationd Spacingd ScaleIntensityRanged ScaleIntensityd "
    "ScaleIntensityRangePercentilesd NormalizeIntensityd ThresholdIntensityd CropForegroundd SpatialPadd BorderPadd "
    "DivisiblePadd Resized"
)
ALLOWED = {
    **{name: f"monai.networks.nets.{name}" for name in _NETWORKS.split()},
    **{name: f"monai.transforms.{name}" for name in _TRANSFORMS.split()},
    **{name: f"monai.inferers.{name}" for name in ("SlidingWindowInferer", "SimpleInferer")},
    "medrobust.networks.unetr_pp.UNETRPP": "medrobust.networks.unetr_pp.UNETRPP",
}
"""What ``_target_`` may say (short, or in full), and what it is."""
ALLOWED |= {full: full for full in ALLOWED.values()}


def refuse(message: str) -> RunError:
    """The gate's answer."""
    return RunError(Exit.USAGE, f"the bundle is not trusted: {message} (--trust-bundle runs it as it is)")


def read_plain(root: Path) -> dict[str, Any]:
    """The configuration of an untrusted bundle, checked, nothing of it built yet.

    Raises:
        RunError: it has none, or something in it could run code.
    """
    found = next((root / "configs" / name for name in CONFIG_NAMES if (root / "configs" / name).is_file()), None)
    if found is None:
        raise refuse("expected the plain configuration configs/batch.yaml, got none")
    _check_files(root)
    if found.stat().st_size > LARGEST:
        raise refuse(f"expected at most {LARGEST >> 10} KB of configuration")
    try:
        text = found.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise refuse(f"expected at most {DEEPEST} levels of configuration")
            if isinstance(event, yaml.AliasEvent):
                raise refuse("expected no YAML aliases, which can grow without bound")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(f"expected plain YAML, got {type(error).__name__}") from None
    if not isinstance(config, dict):
        raise refuse("expected a mapping in configs/batch.yaml")
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise refuse(f"expected {', '.join(missing)} in configs/batch.yaml")
    check(config)
    return config


def check(config: Mapping[str, Any]) -> None:
    """Walk a configuration; everything that is not a plain value, a reference to one, or an allowed class is refused.

    Raises:
        RunError: naming the place.
    """
    for where, key, value in _walk(config, ""):
        if isinstance(key, str) and key.startswith("_") and key not in ALLOWED_KEYS:
            raise refuse(f"the key {key!r} at {where or 'the top'} is not allowed")
        if key in ("imports", "initialize", "run", "finalize"):
            raise refuse(f"the key {key!r} runs code")
        if key == "_target_" and (not isinstance(value, str) or value not in ALLOWED):
            raise refuse(f"the class {str(value)[:80]!r} at {where or 'the top'} is not on the list")
        if isinstance(value, str) and value[:1] in ("$", "%"):
            raise refuse(f"the value at {where}#{key} is an expression or a macro")
        if isinstance(value, str) and value.startswith("@") and value[1:].split("#")[0] not in config:
            raise refuse(f"the reference at {where}#{key} leads nowhere")


def build(config: Mapping[str, Any], name: str) -> Any:
    """What an id of a checked configuration stands for, its classes called.

    Raises:
        RunError: a reference that leads back to itself, or a class that does not take its settings.
    """
    return _build(config[name], config, (name,))


def _build(value: Any, config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        name = value[1:]
        if name in path:
            raise refuse(f"the reference @{name} leads back to itself")
        target: Any = config
        for part in name.split("#"):
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise refuse(f"the reference @{name} leads nowhere") from None
        return _build(target, config, (*path, name))
    if isinstance(value, list):
        return [_build(item, config, path) for item in value]
    if not isinstance(value, Mapping):
        return value
    built = {key: _build(item, config, path) for key, item in value.items() if key not in ALLOWED_KEYS}
    if "_target_" not in value:
        return built
    module, _, name = ALLOWED[value["_target_"]].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(**built)
    except (TypeError, ValueError) as error:
        raise refuse(f"{name} does not take these settings: {str(error)[:200]}") from None


def _walk(value: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any, Any]]:
    """Every (place, key, value) below ``value``."""
    if depth > DEEPEST:
        raise refuse(f"expected at most {DEEPEST} levels of configuration")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield where, key, item
        yield from _walk(item, f"{where}#{key}" if where else str(key), depth + 1)


def _check_files(root: Path) -> None:
    """No code among the bundle's files, and no link out of it."""
    here = root.resolve()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.name.lower().endswith(CODE_ENDINGS) or relative.split("/")[0] == "scripts":
            raise refuse(f"it brings code: {relative}")
        if path.is_symlink() and here not in path.resolve().parents:
            raise refuse(f"{relative} is a link out of it")
