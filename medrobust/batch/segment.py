"""One case from file to committed result, in a worker that loads the network once."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirstd, MapTransform
from monai.utils import SpaceKeys
from torch import Tensor, nn

from medrobust.batch import attacked, plan, volumes
from medrobust.batch.commit import Made, Store
from medrobust.batch.faults import TRANSIENT, CaseError, Exit, RunError, fault_of
from medrobust.batch.locks import BusyError
from medrobust.batch.nifti import Policy, Scan, read, sha256_of
from medrobust.batch.recipe import Recipe
from medrobust.batch.regrid import regrid
from medrobust.batch.resample import is_known, regridded
from medrobust.batch.stitch import stitch
from medrobust.batch.workers import FREE

if TYPE_CHECKING:
    from medrobust.batch.dicom_seg import SegWriter

Tell = Callable[[str], None]
SEGMENTATION = "seg.nii.gz"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One case to do.

    Attributes:
        files: of a DICOM series, which is read instead of ``path``.
        problem: what discovery found wrong with it already, code and message.
        attempt: 0, or 1 after a failure that may pass.
        last: no other attempt follows.
        seen: the attempts that had been recorded for this case when the run began; what came since is another run's.
        overwrite: do it even if it is done, unless another run has done so since.
    """

    key: str
    path: Path
    files: tuple[Path, ...] = ()
    label: Path | None = None
    problem: tuple[str, str] | None = None
    attempt: int = 0
    last: bool = False
    seen: tuple[str, ...] = ()
    overwrite: bool = False


@dataclass(kw_only=True)
class Segmenter:
    """Does cases; sent to each worker, where the network is loaded when the first case needs it.

    Args:
        details: folder for tracebacks, which may hold patient data; outside OUTPUT.
        dicom: also writes the labels of a DICOM series as DICOM SEG, outside OUTPUT.
    """

    store: Store
    recipe: Recipe
    settings: str
    policy: Policy = field(default_factory=Policy)
    attacks: attacked.Attacks = field(default_factory=attacked.Attacks)
    details: Path | None = None
    threads: int = 0
    dicom: SegWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def network(self) -> nn.Module:
        """Loaded once a worker.

        Raises:
            RunError: it cannot be: that is no case's fault.
        """
        try:
            return self.recipe.network()
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise RunError(Exit.USAGE, f"the bundle's network cannot be loaded: {error}") from error

    def __call__(self, task: Task, tell: Tell) -> dict[str, Any]:
        """Do one case under its lock.

        Returns:
            Its record; ``status`` is ``"done"``, ``"kept"`` (was done), ``"rejected"``, ``"failed"``, ``"again"`` (it
            may go well if tried once more), or ``"busy"`` (another run has it).
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            with self.store.lock(task.key):
                return self._held(task, tell)
        except BusyError:
            return {"case": task.key, "status": "busy"}

    def _held(self, task: Task, tell: Tell) -> dict[str, Any]:
        clock = _Clock(tell)
        made: list[Made] = []
        try:
            return self._do(task, clock, made)
        except RunError:
            raise
        except Exception as error:  # whatever a file, a library or a disk does, the other cases go on
            fault = fault_of(error)
            if not isinstance(error, CaseError):
                self._note(task.key, error)
            about = {"stage": clock.stage, "attempts": task.attempt + 1, "measured": clock.measured()}
            if fault.code in TRANSIENT and not task.last:
                return {"case": task.key, "status": "again", "code": fault.code, "reason": fault.message, **about}
            return self.refuse(task.key, made[0] if made else self.made_of(task), fault, about)

    def refuse(self, key: str, made: Made | None, fault: CaseError, about: Mapping[str, Any]) -> dict[str, Any]:
        """Record a failure; where even that cannot be written, it is only reported."""
        try:
            return self.store.refuse(key, made, fault, about)
        except OSError as error:
            self._note(key, error)
            return {"case": key, "status": fault.kind, "code": fault.code, "reason": fault.message, **about} | {
                "unrecorded": True
            }

    def lost(self, task: Task, fault: CaseError, about: dict[str, Any]) -> dict[str, Any]:
        """A worker was lost with this case; nobody holds its lock any more, unless another run has taken it."""
        try:
            with self.store.lock(task.key, wait=5.0):
                made = self.made_of(task)
                done = self.store.done(task.key, made) if made else None
                if done and done["attempt"] not in task.seen:  # lost between committing and saying so
                    self.store.forgive(task.key)
                    return done
                return self.refuse(task.key, made, fault, about)
        except BusyError:
            return {"case": task.key, "status": "busy"}

    def _do(self, task: Task, clock: _Clock, made: list[Made]) -> dict[str, Any]:
        clock("check")
        before = self._settled(task)
        if before is not None:
            return before
        if task.problem:
            raise CaseError(*task.problem)
        clock("read")
        scan = _scan(task, self.policy)
        label_sha = sha256_of(task.label) if task.label and self.attacks else ""
        made.append(self._made(scan.sha256, label_sha))
        if "constant" in scan.warnings and self.attacks:
            raise CaseError("constant", "a volume of one value cannot be attacked")
        clock("prepare")
        label = read(task.label, self.policy) if task.label and self.attacks else None
        data = _tensors(scan, label, len(self.recipe.class_names))
        geometry, warnings = scan.geometry, scan.warnings
        voxel = abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000
        del scan, label
        image, reference = self._prepare(data)
        self.store.check_space(plan.disk_of(int(np.prod(geometry.shape)), image.numel(), self.attacks))
        clock(FREE)
        network = self.network
        clock("segment")
        windows = 1 if task.attempt else None

        def segment(image: Tensor) -> np.ndarray:
            axis, slabs = stitch(image, network, self.recipe.inferer, device=self.recipe.torch_device, windows=windows)
            return regrid(
                slabs,
                axis,
                size=tuple(image.shape[1:]),
                affine=np.asarray(affine),
                scan_shape=geometry.shape,
                scan_affine=geometry.affine,
                classes=len(self.recipe.class_names),
            )

        affine = image.affine
        labels = segment(image)
        names = self.recipe.class_names
        # One plane at a time: numpy counts in 64-bit copies.
        planes = [np.bincount(labels[:, :, z].ravel(), minlength=len(names)) for z in range(labels.shape[2])]
        counts = np.sum(planes, axis=0)
        clock("write")
        with self.store.stage(task.key) as folder:
            volumes.write(labels, folder / SEGMENTATION, geometry)
            place = (task.key, task.files, labels, geometry.affine, self.recipe, self.settings)
            seg = self.dicom.write(*place) if self.dicom else {}
            del labels
            adversarial = []
            if self.attacks:
                clock("attack")
                adversarial = attacked.attack(
                    *(self.attacks, self.recipe, network, task.key, image, reference, geometry, segment, folder, clock)
                )
            clock("commit")
            about = {
                "use": "research only, not for diagnosis",
                "geometry": _told(geometry.shape, geometry.affine),
                "volume_ml": {name: round(float(count) * voxel, 3) for name, count in zip(names, counts, strict=True)},
                "warnings": list(warnings),
                "adversarial": adversarial,
                "attempts": task.attempt + 1,
                "measured": clock.measured(),
                **seg,
            }
            return self.store.commit(task.key, folder, made[0], about)

    def made_of(self, task: Task) -> Made | None:
        """What a case would be made of, from its files; ``None`` if they cannot be read."""
        try:
            label = sha256_of(task.label) if task.label and self.attacks else ""
            return self._made(_sha256(task), label)
        except CaseError:
            return None

    def _made(self, image: str, label: str) -> Made:
        return Made(input=f"{image}+{label}" if label else image, bundle=self.recipe.digest, settings=self.settings)

    def _settled(self, task: Task) -> dict[str, Any] | None:
        """The record of a case that needs no work: done of the same input and settings, or failed in another run."""
        done = self.store.done(task.key, None, check=False)
        failed = self.store.failed(task.key)
        failed = failed if failed and failed["attempt"] not in task.seen else None
        if task.overwrite and done and done["attempt"] in task.seen:
            done = None
        if not done and not failed:
            return None
        made = self.made_of(task)
        held = done is not None and (self.dicom is None or self.dicom.holds(task.key, done))
        if done and held and made and self.store.done(task.key, made) is not None:
            self.store.forgive(task.key)
            return {**done, "status": "kept"}
        return failed if failed and failed["made_of"] == (vars(made) if made else None) else None

    def _prepare(self, given: dict[str, Any]) -> tuple[MetaTensor, Tensor | None]:
        """The bundle's transforms: (1, *S) image, and label if there is one; ``given`` is emptied to free memory."""
        data = {key: given.pop(key) for key in list(given)}
        for transform in self.recipe.transforms:
            if isinstance(transform, EnsureChannelFirstd):
                continue
            if isinstance(transform, MapTransform):
                transform.allow_missing_keys = True
            if is_known(transform):
                others = {key: value for key, value in data.items() if key != "image"}
                data = {"image": regridded(data.pop("image"), transform), **(transform(others) if others else {})}
            else:
                data = transform(data)
        image = data["image"]
        if not isinstance(image, MetaTensor) or image.ndim != 4:
            raise CaseError(
                "preprocessing", "expected a preprocessing that gives one volume with its affine", kind="failed"
            )
        if image.numel() == 0:
            raise CaseError("no-foreground", "the preprocessing crops everything away: there is nothing to segment")
        channels = self.recipe.channels
        if channels is not None and image.shape[0] != channels:
            raise CaseError("channels", f"expected {channels} channel(s), the file gives {image.shape[0]}")
        if not bool(torch.isfinite(image.as_subclass(Tensor)).all()):
            raise CaseError("preprocessing", "the preprocessing makes NaN or infinity of this volume", kind="failed")
        found = data.get("label")
        return image, found.as_subclass(Tensor) if found is not None else None

    def _note(self, key: str, error: BaseException) -> None:
        if self.details is None:
            return
        try:
            path = self.details / f"{key}.txt"
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(traceback.format_exception(error)) + "\n")
        except OSError:
            pass


class _Clock:
    """Tells the stages, and measures."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.stage, self.begin = tell, "", time.monotonic()
        self.seconds: dict[str, float] = {}
        self.since = self.begin

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        if self.stage:
            self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + now - self.since, 3)
        self.stage, self.since = stage, now
        self.tell(stage)

    def measured(self) -> dict[str, Any]:
        """Seconds, in all and by stage; and the largest memory that this worker ever had, in MB."""
        now = time.monotonic()
        stages = {**self.seconds, self.stage: round(self.seconds.get(self.stage, 0.0) + now - self.since, 3)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)
        return {"seconds": round(now - self.begin, 3), "stages": stages, "peak_mb": round(peak)}


def _scan(task: Task, policy: Policy) -> Scan:
    if not task.files:
        return read(task.path, policy)
    from medrobust.batch import dicom_series  # needs the extra

    return dicom_series.read(task.files, policy)


def _sha256(task: Task) -> str:
    if not task.files:
        return sha256_of(task.path)
    from medrobust.batch import dicom_series

    return dicom_series.sha256_of(task.files)


def _tensors(scan: Scan, label: Scan | None, classes: int) -> dict[str, Any]:
    """What ``LoadImaged`` would give.

    Raises:
        CaseError: image and label are not on one grid, or the label is none.
    """
    if label is None:
        return {"image": _tensor(scan)}
    same = label.geometry.shape == scan.geometry.shape
    if not same or not np.allclose(label.geometry.affine, scan.geometry.affine, atol=1e-3):
        raise CaseError("label-grid", "expected the label on the image's grid")
    values = np.unique(label.volume)
    if (values != np.round(values)).any() or values[0] < 0 or values[-1] >= classes:
        raise CaseError("bad-label", f"expected labels 0 to {classes - 1}, got {values[0]:g} to {values[-1]:g}")
    return {"image": _tensor(scan), "label": _tensor(label)}


def _tensor(scan: Scan) -> MetaTensor:
    """(1, X, Y, Z), with what the transforms ask of a loaded image, and no name of a file."""
    meta = {"space": SpaceKeys.RAS, "spatial_shape": np.array(scan.geometry.shape), "filename_or_obj": "case"}
    meta["original_affine"] = scan.geometry.affine.copy()
    return MetaTensor(torch.from_numpy(scan.volume)[None], affine=torch.tensor(scan.geometry.affine), meta=meta)


def _told(shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    return {"shape": list(shape), "affine": [[float(value) for value in row] for row in affine]}
