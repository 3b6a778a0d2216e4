"""What a bundle contributes to a night: network, preprocessing, inferer, names of classes; and a hash of all of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from monai.transforms import Compose, LoadImaged
from torch import nn

from medrobust.batch import trust
from medrobust.batch.faults import Exit, RunError
from medrobust.bundle import Bundle
from medrobust.networks.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A bundle as the batch uses it; cheap to make and to send to a worker, built where it is used.

    Args:
        root: the bundle's folder.
        trusted: read it as MONAI does, running its code; else through the gate (see ``trust``).
        weights: checkpoint; ``None`` is the bundle's own.
        device: such as ``"cuda:0"``; ``None`` is the bundle's, or what there is.
        overrides: configuration id -> value; for trusted bundles only.
    """

    root: Path
    trusted: bool = False
    weights: Path | None = None
    device: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Only the settings travel to a worker."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def _bundle(self) -> Bundle:
        return Bundle(root=self.root, overrides=self.overrides, weights=self.weights)

    @cached_property
    def _config(self) -> dict[str, Any]:
        if self.overrides:
            raise RunError(Exit.USAGE, "expected --set with --trust-bundle, got it without")
        return trust.read_plain(self.root)

    @property
    def modality(self) -> str:
        """DICOM's word for the scans that the bundle is made for, by its metadata; ``""`` where that tells none."""
        try:
            about = json.loads((self.root / "configs" / "metadata.json").read_text(encoding="utf-8"))
            found = about["network_data_format"]["inputs"]["image"]["modality"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return found if isinstance(found, str) and re.fullmatch(r"[A-Z]{2}", found) else ""

    def check(self) -> None:
        """See that the bundle can be opened, without building its network.

        Raises:
            RunError: it cannot, or the gate refuses it.
        """
        if not (self.root / "configs").is_dir():
            raise RunError(Exit.USAGE, "expected a MONAI bundle (a folder with configs/) as --bundle")
        try:
            _ = self._bundle.parser if self.trusted else self._config
            if not self.weights_path.is_file():
                raise RunError(
                    Exit.USAGE, f"expected weights in {self.weights_path.name}, got no such file: pass --weights"
                )
            _ = self.class_names, self.transforms, self.inferer
        except (ValueError, OSError, KeyError) as error:
            raise RunError(Exit.USAGE, str(error)) from None

    @property
    def weights_path(self) -> Path:
        if self.trusted or self.weights:
            return self.weights or self._bundle.weights_path
        path = self.root / str(self._config.get("ckpt_path", "models/model.pt"))
        if self.root.resolve() not in path.resolve().parents:
            raise trust.refuse("its weights lie outside it")
        return path

    @cached_property
    def torch_device(self) -> torch.device:
        if self.device:
            return torch.device(self.device)
        if self.trusted:
            return self._bundle.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def network(self) -> nn.Module:
        """The network with its weights (tensors only are read), on the device, in evaluation mode."""
        made = self._bundle._get("network_def") if self.trusted else trust.build(self._config, "network_def")
        load_weights(made, self.weights_path)
        network: nn.Module = made.to(self.torch_device).eval()
        return network

    @cached_property
    def inferer(self) -> Inferer:
        found = self._bundle.inferer if self.trusted else trust.build(self._config, "inferer")
        if type(found) not in (SlidingWindowInferer, SimpleInferer):
            raise ValueError(f"expected SlidingWindowInferer or SimpleInferer, got {type(found).__name__}")
        return found

    @cached_property
    def transforms(self) -> Sequence[Any]:
        """The preprocessing of the image after its loading, which is ours."""
        made = self._bundle.preprocessing if self.trusted else trust.build(self._config, "preprocessing")
        first, *rest = (made if isinstance(made, Compose) else Compose(made)).flatten().transforms
        if not isinstance(first, LoadImaged) or any(isinstance(one, LoadImaged) for one in rest):
            raise ValueError("expected a preprocessing that begins with LoadImaged")
        return rest

    @property
    def class_names(self) -> list[str]:
        """Background first."""
        return Bundle(root=self.root, overrides={}).class_names

    @property
    def channels(self) -> int | None:
        return Bundle(root=self.root, overrides={}).channels

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights, the configurations and the overrides; another bundle gives another."""
        digest = hashlib.sha256()
        for path in sorted((self.root / "configs").iterdir()):
            if path.suffix in (".yaml", ".yml", ".json"):
                digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        digest.update(f"weights:{self.weights_sha256}\n".encode())
        digest.update(json.dumps([self.trusted, dict(self.overrides)], sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        with self.weights_path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
