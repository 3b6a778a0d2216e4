"""Read a MONAI bundle: its network with weights, its inferer, its cases. A bundle is code: open only trusted ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import load_decathlon_datalist
from monai.inferers import Inferer
from monai.transforms import Compose, MapTransform
from torch import nn

import medrobust.monai_notes  # noqa: F401
from medrobust.networks.weights import load_weights
from medrobust.parsing import check_name

CONFIGS = ("train", "evaluate")
ENDINGS = (".yaml", ".yml", ".json")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle folder with ``configs/train`` and, on top of it, ``configs/evaluate`` (YAML or JSON), and overrides.

    What is read of it are the ids ``network_def``, ``ckpt_path``, ``device``, ``validate#inferer``,
    ``validate#preprocessing``, ``validate#dataset#data`` and ``train#dataset#data``, as bundles of MONAI's model zoo
    have them, and the names of the classes in ``metadata.json``.

    Args:
        root: the bundle's folder.
        overrides: configuration id (``a`` or ``a#b``) -> value; an id that the configuration does not have is refused.
        weights: checkpoint; ``None`` is the bundle's own ``ckpt_path``.
        overlays: further configuration files on top, in their order.
    """

    root: Path
    overrides: Mapping[str, Any]
    weights: Path | None = None
    overlays: Sequence[Path] = ()

    @cached_property
    def parser(self) -> ConfigParser:
        """The merged configuration.

        Raises:
            FileNotFoundError: no such bundle.
            ValueError: an override of something that does not exist.
        """
        named = [self.root / "configs" / f"{name}{ending}" for name in CONFIGS for ending in ENDINGS]
        files = [file for file in named if file.is_file()]
        if not files:
            raise FileNotFoundError(f"expected a MONAI bundle with configs/train.yaml in {self.root}, got none there")
        for overlay in self.overlays:
            if not overlay.is_file():
                raise FileNotFoundError(f"expected the configuration {overlay}, got no such file")
        parser = ConfigParser()
        parser.read_config([str(file) for file in (*files, *self.overlays)])
        parser["bundle_root"] = str(self.root)
        for name, value in self.overrides.items():
            key = name.replace("::", "#")
            check_name(key, _ids(parser.config), f"configuration id of {self.root.name}")
            parser[key] = value
        return parser

    def _get(self, name: str) -> Any:
        """What a configuration id stands for; MONAI's layers around an error are taken off.

        Raises:
            ValueError: there is no such id, or it cannot be built.
        """
        if name not in self.parser:
            raise ValueError(f"expected the id {name} in the configuration of {self.root.name}, got none")
        try:
            return self.parser.get_parsed_content(name)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ValueError(f"expected {name} of {self.root.name} to be built, got: {cause}") from error

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self._get("device"))

    @property
    def weights_path(self) -> Path:
        return self.weights or Path(self._get("ckpt_path"))

    @cached_property
    def network(self) -> nn.Module:
        """The network with its weights, on the device, in evaluation mode.

        Raises:
            FileNotFoundError: the bundle ships no weights and none were given.
            ValueError: the weights are of another network.
        """
        if not self.weights_path.is_file():
            raise FileNotFoundError(f"expected weights in {self.weights_path}, got no such file: pass --weights")
        network: nn.Module = self._get("network_def")
        load_weights(network, self.weights_path)
        return network.to(self.device).eval()

    @property
    def model(self) -> str:
        """Name of the network, of its weights' file and hash of its weights."""
        digest = hashlib.sha256(self.weights_path.read_bytes()).hexdigest()
        return f"{type(self.network).__name__} {self.weights_path.name} sha256:{digest[:12]}"

    @cached_property
    def inferer(self) -> Inferer:
        inferer: Inferer = self._get("validate#inferer")
        return inferer

    @cached_property
    def preprocessing(self) -> Compose:
        """The evaluation transforms, which also take a case without a label."""
        compose: Compose = self._get("validate#preprocessing")
        for transform in compose.flatten().transforms:
            if isinstance(transform, MapTransform):
                transform.allow_missing_keys = True
        return compose

    @property
    def class_names(self) -> list[str]:
        """The channels' names from the metadata, background first."""
        channels = self._data_format.get("outputs", {}).get("pred", {}).get("channel_def")
        if not channels:
            raise ValueError(f"expected outputs#pred#channel_def in metadata.json of {self.root.name}, got none")
        return [channels[key] for key in sorted(channels, key=int)]

    @property
    def channels(self) -> int | None:
        """How many channels the network takes, from the metadata."""
        inputs = self._data_format.get("inputs", {})
        return inputs.get("image", {}).get("num_channels")

    @property
    def arguments(self) -> list[str]:
        """Names of the network's inputs beside the image, from the metadata, such as ``input_ids``."""
        return [name for name in self._data_format.get("inputs", {}) if name != "image"]

    @cached_property
    def _data_format(self) -> dict[str, Any]:
        path = self.root / "configs" / "metadata.json"
        if not path.is_file():
            raise FileNotFoundError(f"expected metadata.json in {path.parent}, got none: it names the classes")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["network_data_format"]
        return found

    def cases(self, split: str) -> list[dict[str, Any]]:
        """The data list of ``"validation"`` or ``"training"``; a case that the list repeats appears once."""
        where = {"validation": "validate#dataset#data", "training": "train#dataset#data"}
        if split not in where:
            raise ValueError(f"expected a split 'validation' or 'training', got {split!r}")
        found: list[Mapping[str, Any]] = self._get(where[split])
        # Cases with prompts share images, and have names.
        unique = {(str(case["image"]), str(case.get("case", ""))): dict(case) for case in found}
        return list(unique.values())


def read_list(path: Path, section: str) -> list[dict[str, Any]]:
    """Cases of a Medical Segmentation Decathlon style data list; paths are relative to its folder.

    Raises:
        FileNotFoundError, ValueError: no such file, or no such section.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a data list in {path}, got no such file")
    try:
        found = load_decathlon_datalist(str(path), data_list_key=section, base_dir=str(path.parent))
    except (ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a data list with a section {section!r} in {path.name}, got: {error}") from error
    return [{key: case[key] for key in ("image", "label") if key in case} for case in found]


def _ids(config: Any, prefix: str = "") -> list[str]:
    """Every id of a configuration: ``a``, ``a#b``, ``a#b#0``."""
    if isinstance(config, Mapping):
        items: Sequence[tuple[Any, Any]] = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    else:
        return []
    found: list[str] = []
    for key, value in items:
        name = f"{prefix}#{key}" if prefix else str(key)
        found += [name, *_ids(value, name)]
    return found
