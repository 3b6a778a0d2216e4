"""A case under attack: adversarial volumes and their segmentations beside the clean one, and the records of both.

What is crafted lies on the network's grid, in the [0, 1] intensities that the network saw, as float32: any other grid
or type would weaken it. Names, header text and ``case.json`` say that it is adversarial. Without reference labels the
model's own clean prediction is attacked. The attack holds the logits of the whole volume, unlike the segmentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from torch import Tensor, nn

from medrobust.attacks.base import Attack
from medrobust.batch import volumes
from medrobust.batch.nifti import COPIED, Geometry
from medrobust.batch.recipe import Recipe
from medrobust.evaluation import Condition, Evaluation, conditions, slug
from medrobust.records import csv_text

RECORDS = "records.csv"


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What every case is attacked with.

    Args:
        named: what to call each attack -> the attack.
        seed: of every attack's generator, the same for each case.
    """

    named: Mapping[str, Attack] = field(default_factory=dict)
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.named)

    @property
    def conditions(self) -> list[Condition]:
        """Clean, each attack, and its controls."""
        return conditions(self.named) if self.named else []

    @property
    def text(self) -> list[str]:
        """Everything that the results depend on, for the hash of the settings."""
        return [f"{one.name}: {one.text}" for one in self.conditions]


def file_name(condition: Condition) -> str:
    """Of the adversarial volume, without its ending; nothing but letters, digits, ``.``, ``_`` and ``-``."""
    return "adv-" + re.sub(r"[^A-Za-z0-9._-]+", "-", slug(condition))[:100]


def attack(
    attacks: Attacks,
    recipe: Recipe,
    network: nn.Module,
    key: str,
    image: MetaTensor,
    label: Tensor | None,
    geometry: Geometry,
    segment: Callable[[Tensor], np.ndarray],
    folder: Path,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Attack one preprocessed case; write volumes, their segmentations and ``records.csv`` into ``folder``.

    Args:
        image: (1, *S) in [0, 1] on the network's grid.
        label: (1, *S) on the same grid.
        geometry: of the scan.
        segment: an image on the network's grid -> labels on the scan's.

    Returns:
        What ``case.json`` says of each volume.
    """
    evaluation = Evaluation(
        network=network,
        inferer=recipe.inferer,
        class_names=recipe.class_names,
        channels=recipe.channels,
        seed=attacks.seed,
        label_free=label is None,
        model=f"{type(network).__name__} sha256:{recipe.weights_sha256[:12]}",
        device=recipe.torch_device,
    )
    grid = on_grid(image, geometry)
    records, made = [], []
    for result in evaluation.case(key, image, label, attacks.conditions):
        records += result.records
        if result.attack is None:
            continue
        tell(f"attack {result.condition.name}")
        name = file_name(result.condition)
        adversarial = result.image_adv.detach().cpu()
        volumes.write(adversarial[0].numpy(), folder / f"{name}.nii.gz", grid, description=volumes.ADVERSARIAL)
        text = f"{volumes.ADVERSARIAL}, labels of"[:79]
        volumes.write(segment(adversarial), folder / f"{name}_seg.nii.gz", geometry, description=text)
        made.append(
            {"file": f"{name}.nii.gz", "ADVERSARIAL": True, "attack": repr(result.attack), "seed": attacks.seed}
        )
    (folder / RECORDS).write_text(csv_text(records), encoding="utf-8", newline="")
    return made


def on_grid(image: MetaTensor, like: Geometry) -> Geometry:
    """The geometry of a preprocessed image, with the codes and units of the scan that it came from."""
    affine = np.asarray(image.affine, dtype=np.float64)
    header: Any = nib.Nifti1Header()
    shape: Sequence[int] = image.shape[1:]
    header.set_data_shape(shape)
    codes = [int(like.fields[name]) for name in ("qform_code", "sform_code")]
    header.set_qform(affine, code=codes[0])
    header.set_sform(affine, code=codes[1] if any(codes) else 2)
    header["xyzt_units"] = like.fields["xyzt_units"]
    return Geometry(
        shape=(shape[0], shape[1], shape[2]),
        affine=affine,
        version=1,
        pixdim=np.array(header["pixdim"])[:4],
        fields={name: np.array(header[name]) for name in COPIED},
        plain=like.plain,
    )
