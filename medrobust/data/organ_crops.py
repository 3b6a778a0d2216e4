"""Square crops around single structures of the real CT and MR exams: the small stand-in for zero-shot classification.

Who tells what apart, and what stands in for what:

* training: slabs of CT A; validation: other slabs of CT A, with a gap between. **The same patient**: validation chooses
  settings, it does not say how well a model does on another patient;
* test: CT B, another exam (contrast agent, arms down); shift: MR D, another modality.

A crop is centred on the point of its structure that lies deepest inside it, in that slice. Nothing marks the structure:
a model has to know what lies in the middle. Neighbouring slices are alike, so counts of crops are not counts of
independent cases. The structures are TotalSegmentator's output, not a human's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Randomizable, Transform
from nibabel.affines import voxel_sizes
from scipy.ndimage import distance_transform_edt
from torch.nn import functional as F

from medrobust.atomic import replacing
from medrobust.data import ct_organs
from medrobust.data.archive import cache_folder, extract
from medrobust.data.slices import load_volume_ras

TOTAL: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "spleen": (1,),
    "stomach": (6,),
    "colon": (20,),
    "aorta": (52,),
    "inferior vena cava": (63,),
    "portal vein": (64,),
    "spine": tuple(range(26, 51)),
    "spinal cord": (79,),
    "left back muscle": (86,),
    "right back muscle": (87,),
    "left ribs": tuple(range(92, 104)),
    "right ribs": tuple(range(104, 116)),
    "costal cartilage": (117,),
}
"""Structures that both CT exams show, by their ids in TotalSegmentator's ``total`` task."""

TOTAL_MR: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "spleen": (1,),
    "stomach": (6,),
    "colon": (15,),
    "aorta": (23,),
    "inferior vena cava": (24,),
    "portal vein": (25,),
    "spine": (19,),
    "spinal cord": (21,),
    "left back muscle": (46,),
    "right back muscle": (47,),
}
"""The same in the ``total_mr`` task, which has neither ribs nor cartilage."""

CLASSES = tuple(TOTAL)

EXAMS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "training": ("ct_a", TOTAL),
    "validation": ("ct_a", TOTAL),
    "test": ("ct_b", TOTAL),
    "shift": ("mr_d", TOTAL_MR),
}
"""Section: the exam it is taken from, and what its ids mean."""

SLAB, HELD_OUT, GAP = 16, 4, 2
"""Of every 16 slices of CT A the last 4 validate; 2 slices (6 mm) before and after them belong to nobody."""

LEAST = 60.0
"""Square millimetres below which a structure does not count as present in a slice."""


def folder() -> Path:
    """Where the maps of structures of CT B and MR D lie."""
    return cache_folder() / "organ_crops"


def prepare(target: Path | None = None) -> Path:
    """Put images and maps of all structures of the three exams into one folder; return it.

    A second call does nothing. The archive is that of :func:`medrobust.data.ct_organs.prepare`, fetched once.
    """
    target = target or folder()
    wanted = [f"{exam}{end}.nii.gz" for exam in ("ct_a", "ct_b", "mr_d") for end in ("", "_structures")]
    if all((target / name).is_file() for name in wanted):
        return target
    exams = ct_organs.prepare()
    target.mkdir(parents=True, exist_ok=True)
    for name in ("ct_a.nii.gz", "ct_a_structures.nii.gz", "ct_b.nii.gz", "mr_d.nii.gz"):
        with replacing(target / name) as partial:
            partial.write_bytes((exams / name).read_bytes())
    with tempfile.TemporaryDirectory(dir=target, prefix=".prepare-") as work:
        found = {"ct_b": "example_seg_dicom.nii.gz", "mr_d": "example_seg_mr.nii.gz"}
        archive = ct_organs.ARCHIVE.fetch(cache_folder() / "archives")
        extract(archive, {f"{ct_organs.INSIDE}/{name}": Path(work) / name for name in found.values()})
        for exam, name in found.items():
            image = nib.load(Path(work) / name)
            values = np.asarray(image.dataobj).astype(np.uint8)
            with replacing(target / f"{exam}_structures.nii.gz") as partial:
                nib.save(nib.Nifti1Image(values, image.affine), partial)
    return target


def cases(section: str, dataset_dir: str | Path | None = None, *, every: int = 1) -> list[dict[str, Any]]:
    """Cases ``{"image", "slice", "centre", "label", "name", "case"}`` for :class:`LoadCrop`, always in the same order.

    ``label`` counts through :data:`CLASSES`; ``centre`` is in voxels of the slice as right, anterior.

    Args:
        section: of :data:`EXAMS`.
        dataset_dir: of :func:`prepare`; ``None`` is its own.
        every: take only each so many-th slice.

    Raises:
        FileNotFoundError: the crops were not prepared.
        ValueError: there is no such section.
    """
    if section not in EXAMS:
        raise ValueError(f"expected a section among {', '.join(EXAMS)}, got {section!r}")
    root = Path(dataset_dir) if dataset_dir else folder()
    exam, _ = EXAMS[section]
    image, structures = root / f"{exam}.nii.gz", root / f"{exam}_structures.nii.gz"
    for path in (image, structures):
        if not path.is_file():
            raise FileNotFoundError(f"expected {path.name} in {root}, got none: run medrobust.data.organ_crops.prepare")
    found = []
    for index, name, centre in _centres(str(structures), section in ("test", "training", "validation")):
        if index % every or (exam == "ct_a" and slab(index) != section):
            continue
        found.append(
            {
                "image": str(image),
                "structures": str(structures),
                "slice": index,
                "centre": centre,
                "label": CLASSES.index(name),
                "name": name,
                "case": f"{exam}_slice{index:03d}_{name.replace(' ', '-')}",
            }
        )
    return found


def slab(index: int) -> str:
    """Which section a slice of CT A belongs to: ``training``, ``validation`` or, in a gap, ``neither``."""
    place = index % SLAB
    if place >= SLAB - HELD_OUT:
        return "validation"
    return "training" if GAP <= place < SLAB - HELD_OUT - GAP or index < GAP else "neither"


def check(training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a slice is in both lists, or nearer than the gap to one of the other list in the same exam.

    Raises:
        ValueError: one is, or a list is empty.
    """
    lists = [{(case["image"], case["slice"]) for case in cases} for cases in (training, validation)]
    near = sum((image, index + step) in lists[1] for image, index in lists[0] for step in range(-GAP, GAP + 1))
    if near or not all(lists):
        raise ValueError(
            f"expected crops of other exams, or of slices more than {GAP} apart, got {len(lists[0])} and "
            f"{len(lists[1])} slices and {near} pairs of near ones: choose other sections"
        )


class LoadCrop(Transform):
    """Case to ``image`` (1, S, S) in [0, 1] and ``label`` (1, 1, 1), int64; right to left, posterior to anterior.

    Exams differ in their grid: each is brought to ``resolution`` by averaging where it is finer, then sampled linearly
    at ``pixel`` around the centre. What lies outside the scan is air.

    Args:
        window: intensities that become 0 and 1, such as HU.
        size: pixels of the crop's edge.
        pixel: millimetres.
        resolution: millimetres; that of CT A.
        structures: also crop the map of structures, by nearest neighbour, for transforms that need it.
    """

    def __init__(
        self,
        *,
        window: tuple[float, float],
        size: int = 48,
        pixel: float = 2.5,
        resolution: float = 3.0,
        structures: bool = False,
    ) -> None:
        low, high = window
        if not low < high or size < 1 or pixel <= 0:
            raise ValueError(f"expected a window from low to high, size and pixel above 0, got {window, size, pixel}")
        self.window = (float(low), float(high))
        self.size = size
        self.pixel = pixel
        self.resolution = resolution
        self.structures = structures

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        volume, affine = load_volume_ras(data["image"])
        spacing = tuple(float(step) for step in voxel_sizes(affine)[:2])
        place = (volume.shape[:2], data["centre"], spacing)
        found = {key: value for key, value in data.items() if key != "structures"}
        low, high = self.window
        plane, centre = self._around(volume[:, :, data["slice"]], *place)
        plane = ((plane - low) / (high - low)).clamp(0, 1)
        wide = [max(round(self.resolution / step) // 2 * 2 + 1, 1) for step in spacing]
        if max(wide) > 1:
            plane = F.avg_pool2d(plane, wide, 1, [w // 2 for w in wide])
        crop = self._sample(plane, centre, spacing, "bilinear")
        found["image"] = MetaTensor(crop, meta={"filename_or_obj": str(data["case"])})
        if self.structures:
            ids, _ = load_volume_ras(data["structures"])
            around, centre = self._around(ids[:, :, data["slice"]], *place)
            found["structures"] = self._sample(around, centre, spacing, "nearest")
        found["label"] = torch.tensor(data["label"]).view(1, 1, 1)
        return found

    def _around(
        self, plane: np.ndarray[Any, Any], shape: Sequence[int], centre: Sequence[int], spacing: Sequence[float]
    ) -> tuple[torch.Tensor, list[float]]:
        """The part (1, 1, h, w) of a slice that the crop needs, and the centre in it."""
        reach = [math.ceil((self.size * self.pixel / 2 + self.resolution) / step) + 1 for step in spacing]
        first = [max(c - r, 0) for c, r in zip(centre, reach, strict=True)]
        last = [min(c + r + 1, count) for c, r, count in zip(centre, reach, shape, strict=True)]
        part = np.ascontiguousarray(plane[first[0] : last[0], first[1] : last[1]], dtype=np.float32)
        return torch.from_numpy(part)[None, None], [float(c - f) for c, f in zip(centre, first, strict=True)]

    def _sample(
        self, plane: torch.Tensor, centre: Sequence[float], spacing: Sequence[float], mode: str
    ) -> torch.Tensor:
        """(1, 1, h, w) to (1, S, S): voxel i lies at i times the spacing."""
        steps = (torch.arange(self.size) - (self.size - 1) / 2) * self.pixel
        axes = [
            (c + steps / step) * 2 / (count - 1) - 1
            for c, step, count in zip(centre, spacing, plane.shape[2:], strict=True)
        ]
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        # grid_sample wants the last axis first.
        grid = torch.stack([columns, rows], -1)[None].float()
        return F.grid_sample(plane, grid, mode=mode, padding_mode="zeros", align_corners=True)[0]


class RandPlaced(Randomizable, Transform):
    """A randomly turned, zoomed and moved crop ``image`` (1, S, S) out of a wider one, in one interpolation.

    Args:
        size: pixels of the crop's edge.
        turn: largest angle, in radians.
        zoom: largest change of scale, as a share.
        move: farthest shift of the centre, in pixels of the wide crop.
    """

    def __init__(self, size: int, *, turn: float = 0.25, zoom: float = 0.25, move: float = 4.0) -> None:
        self.size = size
        self.turn, self.zoom, self.move = turn, zoom, move

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        wide = data["image"].as_subclass(torch.Tensor)[None]
        angle, scale = self.R.uniform(-self.turn, self.turn), 1 + self.R.uniform(-self.zoom, self.zoom)
        # From the crop's pixels to the wide one's, both counted from -1 to 1.
        ratio = scale * (self.size - 1) / (wide.shape[-1] - 1)
        shift = self.R.uniform(-self.move, self.move, 2) * 2 / (wide.shape[-1] - 1)
        cos, sin = ratio * math.cos(angle), ratio * math.sin(angle)
        theta = torch.tensor([[[cos, -sin, shift[0]], [sin, cos, shift[1]]]], dtype=wide.dtype)
        grid = F.affine_grid(theta, [1, 1, self.size, self.size], align_corners=True)
        return {**data, "image": F.grid_sample(wide, grid, padding_mode="zeros", align_corners=True)[0]}


@lru_cache(maxsize=4)
def _centres(path: str, is_ct: bool) -> tuple[tuple[int, str, tuple[int, int]], ...]:
    """Slice, structure and its deepest point, slice by slice in the order of :data:`CLASSES`."""
    volume, affine = load_volume_ras(path)
    spacing = tuple(float(step) for step in voxel_sizes(affine)[:2])
    names = TOTAL if is_ct else TOTAL_MR
    table = np.zeros(256, dtype=np.uint8)
    for number, ids in enumerate(names.values(), 1):
        table[list(ids)] = number
    found = []
    for index in range(volume.shape[2]):
        numbers = table[np.ascontiguousarray(volume[:, :, index]).astype(np.uint8)]
        for number, name in enumerate(names, 1):
            rows, columns = np.nonzero(numbers == number)
            if len(rows) * math.prod(spacing) < LEAST:
                continue
            top, left = int(rows.min()), int(columns.min())
            mask = np.zeros((int(rows.max()) - top + 3, int(columns.max()) - left + 3), dtype=bool)
            mask[rows - top + 1, columns - left + 1] = True
            depth = distance_transform_edt(mask, sampling=spacing)
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            found.append((index, name, (top + int(row) - 1, left + int(column) - 1)))
    return tuple(found)
