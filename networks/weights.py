"""Load a state dict into a network: safely, completely, and with a report when it does not fit."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNETR
from torch import Tensor, nn

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "network")
"""Where training scripts put the weights in a checkpoint that holds more than weights."""

PREFIXES = ("module.", "_orig_mod.")
"""What ``DistributedDataParallel`` and ``torch.compile`` write before every name."""

UNETR_DROPPED = re.compile(r"(^|\.)cls_token$|\.(conv3|norm3)\.")
"""Parameters that MONAI 0.7's UNETR had and never used: a class token, and shortcuts of blocks of one width."""

UNETR_FILLED = re.compile(r"\.norm_cross_attn\.(weight|bias)$")
"""Parameters that newer MONAI has and UNETR never uses: the norm before a cross-attention it does not have."""

_numpy_scalar = np.float32(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]
"""Training scripts save their best score as a NumPy scalar beside the weights; reading one runs no foreign code."""


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What ``load_weights`` did.

    Attributes:
        path: the file.
        loaded: number of tensors copied into the network.
        dropped: names in the file that the network has no use for (known old layouts only).
        filled: names that the file lacks and the network kept as they were (known old layouts only).
    """

    path: Path
    loaded: int
    dropped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.path.name}"
        if self.dropped or self.filled:
            text += f"; old UNETR layout: {len(self.dropped)} unused ones dropped, {len(self.filled)} unused ones kept"
        return text


def load_weights(network: nn.Module, path: str | Path, *, key: str | None = None) -> WeightsReport:
    """Copy the weights in ``path`` into ``network``, all of them or none.

    A network with adapters also takes a file of those alone (``.safetensors``); its base then stays as it is. Else the
    file may hold a state dict or a dictionary with one under ``key`` (default: the first of ``STATE_DICT_KEYS``).
    Only tensors and plain values are read; a file that wants to run code is refused. For MONAI's ``UNETR`` the
    layout of MONAI 0.7 is accepted too: what it drops and fills is in the report and changes no output.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, holds code, or does not fit; the network is left as it was.
    """
    path = Path(path)
    load_adapters = getattr(network, "load_adapters", None)
    if load_adapters is not None and path.suffix == ".safetensors":
        load_adapters(path)
        return WeightsReport(path=path, loaded=len(network.adapter_state_dict()))  # type: ignore[operator]
    weights = _strip_prefixes(_state_dict(_read(path), path, key))
    own = network.state_dict()
    unexpected = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    known = isinstance(network, UNETR)
    dropped = tuple(name for name in unexpected if known and UNETR_DROPPED.search(name))
    filled = tuple(name for name in missing if known and UNETR_FILLED.search(name))
    misfits = [
        f"{name} {tuple(weights[name].shape)} where the network has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = [
        _sample("missing", [name for name in missing if name not in filled]),
        _sample("unexpected", [name for name in unexpected if name not in dropped]),
        _sample("of another shape", misfits),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise ValueError(
            f"expected weights for {type(network).__name__} in {path.name}, got {found}. "
            "Build the network with the settings it was trained with, or name the right entry with key="
        )
    fitting = {name: weights.get(name, tensor) for name, tensor in own.items()}
    network.load_state_dict(fitting)
    return WeightsReport(path=path, loaded=len(own) - len(filled), dropped=dropped, filled=filled)


def read_weights(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, for networks that copy published names themselves, such as ``UPerNet.load_published``.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_weights`.
    """
    path = Path(path)
    return _state_dict(_read(path), path, key)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, got {path}, which does not exist. Check the path")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"expected only tensors and plain values in {path.name}, got something that could run code when opened. "
            "Ask its author for a plain state dict, or save one yourself from a file that you trust"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"expected a file written by torch.save, got {path.name}: {reason}. Was the download complete?"
        ) from error


def _state_dict(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The mapping of names to tensors in a file's content."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"expected a dictionary in {path.name}, got {type(content).__name__}. Save network.state_dict() instead"
        )
    names = STATE_DICT_KEYS if key is None else (key,)
    found = next((content[name] for name in names if name in content), content if key is None else None)
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"expected a state dict in {path.name}" + (f" under {key!r}" if key else "") + ", got a dictionary with "
            f"{_list([str(name) for name in content])}. Name the entry that holds the weights with key="
        )
    return dict(found)


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _sample(what: str, names: Collection[str]) -> str:
    return f"{len(names)} {what} ({_list(names)})" if names else ""


def _list(names: Collection[str], most: int = 3) -> str:
    shown = ", ".join(list(names)[:most]) or "nothing"
    return shown + (", ..." if len(names) > most else "")
