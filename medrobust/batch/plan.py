"""What a run would do, and what it would need: the dry run, and the share of one of several machines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from monai.inferers import SlidingWindowInferer

from medrobust.batch.attacked import Attacks
from medrobust.batch.discovery import Found
from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.nifti import Head, Policy, read_head
from medrobust.batch.recipe import Recipe
from medrobust.batch.sampling import BUDGET
from medrobust.batch.stitch import PIECE, slide_axis

T = TypeVar("T")
BASE = 600 << 20
"""Bytes of a worker without a case: Python, torch, MONAI, a small network."""


def check_part(number: int, part: int) -> None:
    """Parts are counted from 0.

    Raises:
        RunError: there is no such part.
    """
    if number < 1 or not 0 <= part < number:
        raise RunError(Exit.USAGE, f"expected --part-id from 0 to {max(number, 1) - 1}, got {part} of {number}")


def share(found: Mapping[str, T], number: int, part: int) -> dict[str, T]:
    """The cases of one part, by the paths that are the keys.

    Which part a case falls to depends on its path alone, so that machines which do not see the same list (files still
    arrive) never both do a case. Parts are about equally large.
    """
    check_part(number, part)
    return {path: case for path, case in found.items() if _number(path) % number == part}


def _number(path: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one case needs, as far as its header tells."""

    key: str
    shape: tuple[int, ...] = ()
    memory: int = 0
    disk: int = 0
    problem: str = ""


def need_of(key: str, found: Found, recipe: Recipe, policy: Policy, attacks: Attacks) -> Need:
    """Peak memory and disk of a case; an upper estimate, made from the header and the bundle's settings."""
    if found.problem:
        return Need(key=key, problem=found.problem[0])
    try:
        head = _head_of(found, policy)
    except CaseError as error:
        return Need(key=key, problem=error.code)
    scan, shape = head.voxels, head.geometry.shape
    net = net_shape(shape, head.geometry.spacing, recipe.transforms)
    voxels = int(np.prod(net, dtype=np.int64))
    classes = len(recipe.class_names)
    # The scan as float32, twice while it is turned; the transforms after that make copies on the network's grid.
    reading = 8 * scan + 8 * voxels
    working = 4 * voxels + _held(net, recipe, classes) + 3 * scan
    if attacks:
        working += 4 * voxels * (3 * classes + 8)
    memory = BASE + 16 * BUDGET + max(reading, working)
    return Need(key=key, shape=shape, memory=memory, disk=disk_of(scan, voxels, attacks))


def disk_of(scan: int, voxels: int, attacks: Attacks) -> int:
    """Bytes that a case's files may take: label maps of ``scan`` voxels, adversarial volumes of ``voxels``."""
    packed = scan // 20 + 1024
    count = sum(condition.attack is not None for condition in attacks.conditions)
    return packed * (1 + count) + 4 * voxels * count


def _head_of(found: Found, policy: Policy) -> Head:
    if not found.files:
        return read_head(found.path, policy)
    from medrobust.batch import dicom_series  # needs the extra

    return dicom_series.read_head(found.files, policy)


def net_shape(shape: Sequence[int], spacing: Sequence[float], transforms: Iterable[Any]) -> tuple[int, ...]:
    """About how large a volume is on the network's grid."""
    wanted = next((one.spacing_transform.pixdim for one in transforms if hasattr(one, "spacing_transform")), None)
    if wanted is None:
        return tuple(shape)
    sides = [float(side) for side in np.broadcast_to(np.asarray(wanted, dtype=np.float64), 3)]
    return tuple(
        max(1, round(count * own / side)) if side > 0 else count
        for count, own, side in zip(shape, spacing, sides, strict=True)
    )


def _held(net: tuple[int, ...], recipe: Recipe, classes: int) -> int:
    """Bytes of the logits that wait for their neighbours."""
    inferer = recipe.inferer
    if not isinstance(inferer, SlidingWindowInferer):
        return 4 * int(np.prod(net, dtype=np.int64)) * classes
    roi = inferer.roi_size
    wanted = [roi] * 3 if isinstance(roi, int) else [int(side) for side in roi]
    window = tuple(side if side > 0 else whole for side, whole in zip(wanted, net, strict=True))
    axis = slide_axis(net, window)
    plane = int(np.prod(net, dtype=np.int64)) // net[axis]
    return 4 * plane * (min(window[axis], net[axis]) + 6 * PIECE) * (classes + 1)


def told(needs: Sequence[Need], states: Mapping[str, str], workers: int) -> str:
    """The plan in words, one line a case."""
    lines = [
        f"{need.key}  {states[need.key]:8}  "
        + (f"rejected: {need.problem}" if need.problem else f"{_size(need)}, at most {_mb(need.memory)} of memory")
        for need in needs
    ]
    todo = [need for need in needs if states[need.key] != "done" and not need.problem]
    workers = max(workers, 1)
    most = sum(sorted((need.memory for need in todo), reverse=True)[:workers])
    disk = sum(need.disk for need in todo)
    lines.append(
        f"{len(needs)} cases: {len(todo)} to do, {sum(state == 'done' for state in states.values())} done, "
        f"{sum(bool(need.problem) for need in needs)} would be rejected; "
        f"at most {_mb(most)} of memory in {workers} worker(s), {_mb(disk)} of disk"
    )
    return "\n".join(lines)


def _size(need: Need) -> str:
    return " x ".join(str(side) for side in need.shape)


def _mb(count: int) -> str:
    return f"{count / 2**20:.0f} MB"
