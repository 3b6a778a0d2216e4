"""A run's folder: records, adversarial volumes, pictures and the report, written as the run goes.

```
records.csv     one number a row, appended condition by condition
failures.csv    cases that could not be evaluated, each with its reason
volumes/        adversarial volumes (float32), their clean image and label, and manifest.csv
pictures/       one PNG per case and condition
report.html     everything above, in one file;  report.md  its summary
```
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from torch import Tensor

from medrobust.atomic import replacing, write_text
from medrobust.evaluation import CLEAN_CONDITION, Condition, Evaluation, Recorded, Result
from medrobust.io import load_volume, save_volume, stem
from medrobust.records import append, read_csv

Progress = Callable[[str, str], None]
"""Called with a case and what is being done to it."""


@dataclass(kw_only=True)
class Run:
    """Evaluates cases into a folder.

    Args:
        folder: of the run; made when missing.
        evaluation: how each case is evaluated.
        conditions: under which conditions.
        preprocessing: MONAI transforms from paths to ``image`` and ``label``.
        volumes: keep the adversarial volumes.
        pictures: make a picture per case and condition.
        saved: a run's ``volumes`` folder whose adversarial volumes are evaluated instead of crafting new ones.
    """

    folder: Path
    evaluation: Evaluation
    conditions: Sequence[Condition]
    preprocessing: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    volumes: bool = True
    pictures: bool = True
    saved: Path | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def records_path(self) -> Path:
        return self.folder / "records.csv"

    def evaluate(self, cases: Sequence[Mapping[str, Any]], progress: Progress = lambda case, what: None) -> None:
        """Evaluate every case; a case that fails is noted with its reason and costs nothing but itself.

        Conditions whose records are already in the folder, from the same attack, weights and seed, are skipped.
        """
        done = self._done()
        for name, paths in zip(case_names(cases), cases, strict=True):
            wanted = [c for c in self.conditions if self._key(name, c) not in done or c is CLEAN_CONDITION]
            if all(self._key(name, condition) in done for condition in self.conditions):
                progress(name, "already there")
                continue
            try:
                self._case(name, paths, wanted, done, progress)
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                self.failures[name] = reason(error, [str(path) for path in paths.values()])
                progress(name, f"failed: {self.failures[name]}")
        self._write_failures()

    def _case(
        self,
        name: str,
        paths: Mapping[str, Any],
        wanted: Sequence[Condition],
        done: set[tuple[str, ...]],
        progress: Progress,
    ) -> None:
        for key in ("image", "label"):
            if key in paths and not Path(str(paths[key])).exists():
                raise FileNotFoundError(f"expected the {key} {Path(str(paths[key])).name}, got no such file")
        progress(name, "reading")
        data = self.preprocessing(dict(paths))
        image, label = data["image"], data.get("label")
        progress(name, wanted[0].name)
        results = self.evaluation.case(name, image, label, wanted, saved=lambda c: self._load(name, c, image))
        for index, result in enumerate(results):
            self._keep(name, result, image)
            if self._key(name, result.condition) not in done:
                append(result.records, self.records_path)
            if index + 1 < len(wanted):
                following = wanted[index + 1]
                progress(name, " ".join(part for part in (following.name, following.protocol) if part))

    def _keep(self, name: str, result: Result, image: Tensor) -> None:
        affine, meta = (image.affine, image.meta) if isinstance(image, MetaTensor) else (np.eye(4), {})
        clean = result.condition.attack is None
        if self.volumes and not self.saved:
            target = self.folder / "volumes"
            if clean:
                note = "medrobust clean twin of adversarial volumes"
                save_volume(result.image, target / f"{name}__image.nii.gz", affine=affine, meta=meta, description=note)
                path = target / f"{name}__label.nii.gz"
                save_volume(result.label, path, affine=affine, meta=meta, description=note, dtype=np.uint8)
            else:
                path = target / volume_name(name, result.condition)
                save_volume(result.image_adv, path, affine=affine, meta=meta)
                self._manifest(path, name, result)
        if self.pictures and not clean:
            self._picture(name, result, voxel_sizes(np.asarray(affine)))

    def _picture(self, name: str, result: Result, spacing: Sequence[float]) -> None:
        from medrobust.pictures import panel

        condition = result.condition
        png = panel(
            *(m.cpu() for m in (result.image, result.image_adv, result.label, result.pred, result.pred_adv)),
            spacing=[float(s) for s in spacing][: result.image.ndim - 1],
            class_names=self.evaluation.class_names,
            title=f"{name}: {condition.name}, {condition.protocol}",
        )
        with replacing(self.folder / "pictures" / f"{stem(volume_name(name, condition))}.png") as partial:
            partial.write_bytes(png)

    def _manifest(self, path: Path, case: str, result: Result) -> None:
        table = path.parent / "manifest.csv"
        rows = _rows(table)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        condition = result.condition
        row = [path.name, case, condition.name, condition.protocol, repr(result.attack), digest]
        rows = [other for other in rows if other[0] != path.name] + [row]
        header = ["file", "case", "condition", "protocol", "attack", "sha256"]
        write_text(table, _csv([header, *rows]))

    def _load(self, case: str, condition: Condition, image: Tensor) -> Tensor | None:
        if self.saved is None:
            return None
        path = self.saved / volume_name(case, condition)
        affine = image.affine if isinstance(image, MetaTensor) else np.eye(4)
        return load_volume(path, image, affine)

    def _key(self, case: str, condition: Condition) -> tuple[str, ...]:
        attack = "" if condition.attack is None or condition.match else repr(condition.attack)
        return case, condition.name, condition.protocol, attack, self.evaluation.model, str(self.evaluation.seed)

    def _done(self) -> set[tuple[str, ...]]:
        if not self.records_path.is_file():
            return set()
        matched = {condition.name for condition in self.conditions if condition.match}
        return {
            (r.case, r.condition, r.protocol, "" if r.condition in matched else r.attack, r.model, str(r.seed))
            for r in read_csv(self.records_path)
        }

    def _write_failures(self) -> None:
        path = self.folder / "failures.csv"
        if self.failures:
            write_text(path, _csv([["case", "reason"], *([case, why] for case, why in self.failures.items())]))
        elif path.is_file():
            path.unlink()


def case_names(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """One name a case: its image's file name without folder and ending, numbered where two would be alike."""
    seen: dict[str, int] = {}
    names = []
    for case in cases:
        name = stem(str(case["image"]))
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def volume_name(case: str, condition: Condition) -> str:
    """File name of an adversarial volume: ``ct_b__PGD__whole-volume__adv.nii.gz``."""
    parts = (case, *(part.replace(" ", "-") for part in (condition.name, condition.protocol)))
    return "__".join(part.replace("/", "-") for part in parts) + "__adv.nii.gz"


def saved_conditions(folder: Path) -> list[Condition]:
    """The conditions that a run's ``volumes`` folder holds, clean first, in the order they were made.

    Their attacks are named, not known: they appear in records as their manifest's text.

    Raises:
        FileNotFoundError: no manifest there.
    """
    table = folder / "manifest.csv"
    if not table.is_file():
        raise FileNotFoundError(f"expected manifest.csv of an earlier run in {folder}, got none")
    found = {(row[2], row[3]): Recorded(text=row[4]) for row in _rows(table)}
    return [CLEAN_CONDITION, *(Condition(name=n, protocol=p, attack=attack) for (n, p), attack in found.items())]


def reason(error: BaseException, paths: Iterable[str] = ()) -> str:
    """The first line of what went wrong, without the folders of ``paths``: those may name a patient.

    MONAI wraps the cause in layers of its own; the innermost is the one that says something.
    """
    while error.__cause__ is not None and "applying transform" in str(error):
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for path in paths:
        text = text.replace(str(Path(path).parent) + os.sep, "")
    return text


def _rows(table: Path) -> list[list[str]]:
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))[1:]


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
