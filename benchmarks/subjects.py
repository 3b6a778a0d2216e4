"""The networks that `strength.py` attacks: those that are shipped, clean and hardened, and three toys.

All of them see real CT. The shipped 3-D network gets one window of CT B, the shipped 2-D ones slices of CT B at their
own 128 x 128 pixels. The toys are trained on the spot on CT A (a minute each, kept in the cache folder) and attacked on
slices that they did not see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from medrobust.attacks import HardDice
from medrobust.attacks.objectives import Head
from medrobust.bundle import Bundle
from medrobust.data import ct_organs
from medrobust.data.archive import cache_folder
from medrobust.data.slices import load_volume_ras
from medrobust.inferers import bind

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
WINDOW = (-500.0, 500.0)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and the cases it is attacked on.

    Attributes:
        model: ``image (B, C, *S) -> logits (B, K, *S)``.
        image, label: the cases, intensities in [0, 1].
        head: how the channels are read.
        eps: radius of the Linf ball: large enough to hurt, too small to erase everything.
        eps_l2: the same for L2.
        block: of the frequency attacks.
    """

    name: str
    model: nn.Module
    image: Tensor
    label: Tensor
    head: Head
    eps: float
    eps_l2: float
    block: tuple[int, ...]

    def dice(self, image: Tensor) -> Tensor:
        """Mean Dice over the foreground, (B,)."""
        with torch.no_grad():
            return 1 - HardDice(head=self.head)(self.model(image), self.label)


def names() -> list[str]:
    return list(_MAKERS)


@cache
def load(name: str) -> Subject:
    """A subject by its name, its model in evaluation mode and frozen."""
    found = _MAKERS[name]()
    for parameter in found.model.eval().parameters():
        parameter.requires_grad_(False)
    return replace(found, name=name)


def _organs(weights: str, eps: float) -> Subject:
    opened = Bundle(root=BUNDLES / "ct_organs_unetr", overrides={}, weights=_weights("ct_organs_unetr", weights))
    case = opened.preprocessing(dict(opened.cases("validation")[0]))
    window = (slice(None), slice(42, 122), slice(14, 94), slice(0, 16))
    image, label = (case[key].as_tensor()[window][None].clone() for key in ("image", "label"))
    eps_l2 = eps * image.numel() ** 0.5 / 3
    return Subject(
        name="",
        model=opened.network,
        image=image,
        label=label,
        head="softmax",
        eps=eps,
        eps_l2=eps_l2,
        block=(32, 32, 16),
    )


def _slices(weights: str, eps: float) -> Subject:
    opened = Bundle(root=BUNDLES / "ct_slices_upernet", overrides={}, weights=_weights("ct_slices_upernet", weights))
    image, label = _at_own_size(opened, opened.cases("validation"))
    eps_l2 = eps * image[0].numel() ** 0.5 / 3
    return Subject(
        name="", model=opened.network, image=image, label=label, head="softmax", eps=eps, eps_l2=eps_l2, block=(16, 16)
    )


def _prompted(eps: float) -> Subject:
    root = "ct_slices_clipseg"
    opened = Bundle(root=BUNDLES / root, overrides={}, weights=_weights(root, "model"))
    chosen = [case for case in opened.cases("validation") if case["slice"] == 12]
    image, label, tokens = _at_own_size(opened, chosen, "input_ids")
    eps_l2 = eps * image[0].numel() ** 0.5 / 3
    model = bind(opened.network, None, input_ids=tokens)
    return Subject(
        name="", model=model, image=image, label=label, head="softmax", eps=eps, eps_l2=eps_l2, block=(16, 16)
    )


def _weights(bundle: str, name: str) -> Path:
    return BUNDLES / bundle / "models" / f"{name}.pt"


def _at_own_size(opened: Bundle, cases: list[dict[str, Any]], *keys: str) -> tuple[Tensor, ...]:
    """Images, labels and what else is asked for, squares of the network's 128 pixels."""
    found = [opened.preprocessing(dict(case)) for case in cases]
    image = torch.stack([_square(case["image"].as_tensor(), "area") for case in found])
    label = torch.stack([_square(case["label"].as_tensor(), "nearest") for case in found])
    return image, label, *(torch.stack([torch.as_tensor(case[key]) for case in found]) for key in keys)


def _square(x: Tensor, mode: str, size: int = 128) -> Tensor:
    height, width = x.shape[-2:]
    side = max(height, width)
    padded = F.pad(
        x.float(),
        (
            (side - width) // 2,
            side - width - (side - width) // 2,
            (side - height) // 2,
            side - height - (side - height) // 2,
        ),
    )
    return F.interpolate(padded[None], (size, size), mode=mode)[0]


@dataclass(frozen=True, kw_only=True)
class _Toy:
    """What a toy is: its network, its loss, and its cases."""

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]
    head: Head
    eps: float
    steps: int
    batch: int
    block: tuple[int, ...]


def _toy(name: str, toy: _Toy) -> Subject:
    image, label, test_image, test_label = toy.data()
    torch.manual_seed(0)
    network = toy.network()
    path = cache_folder() / "benchmarks" / f"{name}.pt"
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(network, toy, image, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    eps_l2 = toy.eps * test_image[0].numel() ** 0.5 / 3
    return Subject(
        name=name,
        model=network,
        image=test_image,
        label=test_label,
        head=toy.head,
        eps=toy.eps,
        eps_l2=eps_l2,
        block=toy.block,
    )


def _train(network: nn.Module, toy: _Toy, image: Tensor, label: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=toy.steps)
    network.train()
    for _ in range(toy.steps):
        chosen = torch.randint(len(image), (toy.batch,), generator=generator)
        gain = 1 + 0.1 * torch.randn(toy.batch, *[1] * (image.ndim - 1), generator=generator)
        loss = toy.loss(network((image[chosen] * gain).clamp(0, 1)), label[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _unet(dims: int, classes: int) -> nn.Module:
    return UNet(dims, 1, classes, (16, 32, 64), (2, 2), num_res_units=1)


def _ct_a() -> tuple[Tensor, Tensor]:
    """CT A at half its resolution in plane, (X, Y, Z)."""
    case = ct_organs.cases("training", ct_organs.prepare())[0]
    volume, label = (load_volume_ras(case[key])[0] for key in ("image", "label"))
    scaled = np.clip((volume.astype(np.float32) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
    image = F.avg_pool3d(torch.from_numpy(scaled)[None, None], (2, 2, 1))[0, 0]
    return image, torch.from_numpy(label[::2, ::2].astype(np.int64))[: image.shape[0], : image.shape[1]]


def _as_slices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test: every fifth slice is not trained on, nor are its neighbours."""
    image, label = (x.movedim(-1, 0)[:, None] for x in _ct_a())
    pad = [n for size in reversed(image.shape[2:]) for n in (0, -size % 8)]
    image, label = F.pad(image, pad), F.pad(label, pad)
    place = torch.arange(len(image)) % 15
    test = (place == 7) & (label.flatten(1).amax(1) > 0)
    train = (place < 5) | (place > 9)
    return image[train], label[train], image[test], label[test]


def _as_channels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with one sigmoid channel a structure."""
    image, label, test_image, test_label = _as_slices()
    hot = [torch.cat([(y == k) for k in range(1, 5)], 1).long() for y in (label, test_label)]
    return image, hot[0], test_image, hot[1]


def _as_volumes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of 16 slices, bones against the rest; the block in the middle of the exam is not trained on."""
    image, label = _ct_a()
    label = (label == ct_organs.CLASSES.index("bones")).long()
    pad = [0, 0, *(n for size in reversed(image.shape[:2]) for n in (0, -size % 8))]
    image, label = F.pad(image, pad), F.pad(label, pad)
    middle = image.shape[2] // 2
    starts = [start for start in range(0, image.shape[2] - 15, 2) if abs(start + 8 - middle) > 16]
    train = [torch.stack([x[:, :, start : start + 16] for start in starts])[:, None] for x in (image, label)]
    test = [x[:, :, middle - 8 : middle + 8][None, None] for x in (image, label)]
    return train[0], train[1], test[0], test[1]


def _softmax_loss(logits: Tensor, label: Tensor) -> Tensor:
    weight = torch.full((logits.shape[1],), 3.0)
    weight[0] = 1.0
    return F.cross_entropy(logits, label[:, 0], weight)


def _sigmoid_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, label.float(), pos_weight=torch.tensor(3.0))


_TOYS = {
    "toy 3-D, bones": _Toy(
        network=lambda: _unet(3, 2),
        loss=_softmax_loss,
        data=_as_volumes,
        head="softmax",
        eps=8 / 255,
        steps=150,
        batch=2,
        block=(16, 16, 16),
    ),
    "toy 2-D, 4 structures": _Toy(
        network=lambda: _unet(2, 5),
        loss=_softmax_loss,
        data=_as_slices,
        head="softmax",
        eps=4 / 255,
        steps=400,
        batch=16,
        block=(8, 8),
    ),
    "toy 2-D, sigmoids": _Toy(
        network=lambda: _unet(2, 4),
        loss=_sigmoid_loss,
        data=_as_channels,
        head="sigmoid",
        eps=4 / 255,
        steps=400,
        batch=16,
        block=(8, 8),
    ),
}

_MAKERS: dict[str, Callable[[], Subject]] = {
    "UNETR": lambda: _organs("model", 8 / 255),
    "UNETR, VAFT": lambda: _organs("vaft", 8 / 255),
    "UPerNet": lambda: _slices("model", 2 / 255),
    "UPerNet, PIR-AT": lambda: _slices("robust", 4 / 255),
    "CLIPSeg": lambda: _prompted(4 / 255),
    **{name: (lambda name=name, toy=toy: _toy(name, toy)) for name, toy in _TOYS.items()},
}
