"""A run's folder: records, adversarial volumes, pictures and the report, written as the run goes.

```
run.json        what every number of the run shares: bundle, weights, overrides, seed, and a hash of each case
records.csv     one number a row, appended condition by condition
failures.csv    cases that could not be evaluated, each with its reason
prompts.csv     which prompt each case had, where the network reads one
volumes/        adversarial volumes (float32), their clean image and label, and manifest.csv
pictures/       one PNG per case and condition
report.html     everything above, in one file;  report.md  its summary
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from torch import Tensor

from medrobust.atomic import replacing, write_text
from medrobust.ensembles import Key, ensemble_of
from medrobust.evaluation import CLEAN_CONDITION, Condition, Evaluation, Recorded, Result, is_broken, slug
from medrobust.hashing import sha256_of_file
from medrobust.io import load_volume, save_volume, stem, unused
from medrobust.parsing import parse_goal
from medrobust.prompting import Inputs
from medrobust.records import Record, append, read_csv
from medrobust.run_tables import (
    MANIFEST,
    Prompt,
    Saved,
    manifest,
    read_failures,
    read_prompts,
    volume_name,
    write_failures,
    write_manifest,
    write_prompts,
)

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
        settings: what else every number depends on, such as the bundle and its overrides; JSON types.
        arguments: keys of the preprocessed case that the network takes beside the image, such as ``input_ids``.
        ensemble: keys of the prompts that an attack on all prompts attacks; ``None`` is all but the empty one.
    """

    folder: Path
    evaluation: Evaluation
    conditions: Sequence[Condition]
    preprocessing: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    volumes: bool = True
    pictures: bool = True
    saved: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    ensemble: tuple[str, ...] | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def records_path(self) -> Path:
        return self.folder / "records.csv"

    def evaluate(
        self,
        cases: Sequence[Mapping[str, Any]],
        progress: Progress = lambda case, what: None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        """Evaluate every case; a case that fails is noted with its reason and costs nothing but itself.

        Conditions whose records are already in the folder are skipped: a run continues where it stopped. What failed
        earlier stays in ``failures.csv`` until its case is done.

        Args:
            cases: paths of each.
            names: what records call them; ``None``: see :func:`case_names`.

        Raises:
            ValueError: the folder holds a run of other settings, cases or attacks by the same names.
        """
        names = case_names(cases) if names is None else names
        self.check_settings(dict(zip(names, cases, strict=True)))
        done, failed = self.done(), read_failures(self.folder)
        for name, paths in zip(names, cases, strict=True):
            failed.pop(name, None)
            missing = self.missing(name, done)
            if not missing:
                progress(name, "already there")
                write_failures(self.folder, failed)
                continue
            wanted = missing if missing[0] is CLEAN_CONDITION else [CLEAN_CONDITION, *missing]
            try:
                self._case(name, paths, wanted, done, progress)
            except Exception as error:  # whatever a file or a network does, the other cases go on
                failed[name] = self.failures[name] = reason(error, [str(paths[key]) for key in FILES if key in paths])
                progress(name, f"failed: {failed[name]}")
            write_failures(self.folder, failed)

    def missing(self, name: str, done: set[tuple[str, str, str]]) -> list[Condition]:
        """The conditions without records of a case, where ``done`` is :meth:`done`."""
        return [one for one in self.conditions if self._key(name, one) not in done and self._can_be_had(name, one)]

    def _can_be_had(self, name: str, condition: Condition) -> bool:
        """Whether a saved volume is there, where one is needed: of a case that one member of an ensemble broke there
        is none of the others. A case of which nothing was saved is let through, to be noted as a failure.
        """
        needed = self.saved and condition.attack is not None and not (condition.prompt or condition.goal)
        return not needed or self._key(name, condition) in self._saved or all(case != name for case, *_ in self._saved)

    @cached_property
    def _saved(self) -> set[tuple[str, str, str]]:
        """Case, condition and protocol of the saved volumes."""
        return {(row.case, row.condition, row.protocol) for row in manifest(self.saved)} if self.saved else set()

    def check_settings(self, cases: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ``run.json``, or see that this run continues the one that is there.

        Raises:
            ValueError: it does not.
        """
        path = self.folder / "run.json"
        shared = {**self.settings, "model": self.evaluation.model, "seed": self.evaluation.seed}
        shared |= {"label_free": self.evaluation.label_free, "lpips": self.evaluation.lpips}
        shared |= {"region": self.evaluation.region.word} if self.evaluation.region else {}
        hashes = {name: _digest(paths) for name, paths in cases.items()}
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"shared": shared, "cases": {}}
        other = "choose another --output"
        for key in {*shared, *found["shared"]}:
            before, now = found["shared"].get(key), shared.get(key)
            if before != now:
                raise ValueError(f"expected the {key} of the run in {self.folder}, {before!r}, got {now!r}: {other}")
        for name, digest in hashes.items():
            if found["cases"].get(name, digest) != digest:
                raise ValueError(f"expected {name} as in {self.folder}, got another file of that name: {other}")
        attacks = {(r.condition, r.protocol): r.attack for r in self._records() if not self._matched(r.condition)}
        for condition in self.conditions:
            before, now = attacks.get((condition.name, condition.protocol)), condition.text
            if before and not condition.match and not self.saved and before != now:
                hint = f"name it, as in 'mine: {condition.name.lower()} ...', or {other}"
                raise ValueError(f"expected {condition.name} as in {self.folder}, got other settings: {hint}")
        known = dict(sorted({**found["cases"], **hashes}.items()))
        write_text(path, json.dumps({"shared": shared, "cases": known}, indent=2) + "\n")

    def _case(
        self,
        name: str,
        paths: Mapping[str, Any],
        wanted: Sequence[Condition],
        done: set[tuple[str, str, str]],
        progress: Progress,
    ) -> None:
        for key in FILES:
            if key in paths and not Path(str(paths[key])).exists():
                raise FileNotFoundError(f"expected the {key} {Path(str(paths[key])).name}, got no such file")
        progress(name, "reading")
        data = self.preprocessing(dict(paths))
        image, label = data["image"], data.get("label")
        if "prompt" in data:
            self._note_prompt(name, data)
        progress(name, wanted[0].name)
        known = [record for record in self._records() if record.case == name]
        norms = {(r.condition, r.protocol): r.value for r in known if r.metric == "l2"}
        results = self.evaluation.case(
            name,
            image,
            label,
            wanted,
            saved=lambda c: self._load(name, c, image),
            norms=norms,
            inputs=self.inputs(data, paths),
            broken=self._broken(known),
        )
        for index, result in enumerate(results):
            affine, meta = (image.affine, image.meta) if isinstance(image, MetaTensor) else (np.eye(4), {})
            made = not (result.condition.prompt or result.condition.stored or result.why_not)
            if self.volumes and not self.saved and made:
                self._keep(name, result, affine, meta)
            if self._key(name, result.condition) not in done:
                append(result.records, self.records_path)
            if self.pictures and result.condition.attack is not None and not result.why_not:
                self._picture(name, result, voxel_sizes(np.asarray(affine)))
            if index + 1 < len(wanted):
                following = wanted[index + 1]
                progress(name, " ".join(part for part in (following.name, following.protocol) if part))

    def inputs(self, data: Mapping[str, Any], paths: Mapping[str, Any]) -> Inputs:
        """What the network takes beside the image."""

        def of(one: Mapping[str, Any]) -> dict[str, Any]:
            return {key: one[key] for key in self.arguments}

        if "prompts" not in paths:
            return Inputs(own=of(data))
        from medrobust.data.pairs import token_settings, under_prompt
        from medrobust.data.prompts import Ensemble, Fixed

        case, tokens = {**data, "case": paths["case"], "prompts": paths["prompts"]}, token_settings(self.preprocessing)
        return Inputs(
            own=of(data),
            under=lambda key: of(under_prompt(case, Fixed(key).choose(case)[0], tokens)),
            each=lambda: [
                of(under_prompt(case, prompt, tokens)) for prompt in Ensemble(keys=self.ensemble).choose(case)
            ],
        )

    def _note_prompt(self, name: str, data: Mapping[str, Any]) -> None:
        """Write down which prompt a case has, or see that it is the one of the records that are there.

        Raises:
            ValueError: it is another one.
        """
        row = Prompt(name, str(data.get("prompt_key", "")), str(data["prompt"]))
        known = {prompt.case: prompt for prompt in read_prompts(self.folder)}
        if known.setdefault(name, row) != row:
            raise ValueError(
                f"expected the prompt {known[name].text!r} as in {self.folder}, got {row.text!r}: "
                "choose another --output"
            )
        write_prompts(self.folder, known.values())

    def _keep(self, name: str, result: Result, affine: Any, meta: Mapping[str, Any]) -> None:
        target = self.folder / "volumes"
        if result.condition.attack is None:
            note = "medrobust clean twin of adversarial volumes"
            save_volume(result.image, target / f"{name}__image.nii.gz", affine=affine, meta=meta, description=note)
            path = target / f"{name}__label.nii.gz"
            ignored = bool((result.label < 0).any())
            dtype = np.int16 if ignored else np.uint8
            save_volume(result.label, path, affine=affine, meta=meta, description=note, dtype=dtype)
            return
        path = target / volume_name(name, result.condition)
        save_volume(result.image_adv, path, affine=affine, meta=meta)
        row = Saved(
            file=path.name,
            case=name,
            condition=result.condition.name,
            protocol=result.condition.protocol,
            attack=repr(result.attack),
            seed=str(self.evaluation.seed),
            sha256=sha256_of_file(path),
            goal=result.condition.asked,
        )
        rows = [other for other in manifest(target) if other.file != row.file] if (target / MANIFEST).is_file() else []
        write_manifest(target, [*rows, row])

    def _picture(self, name: str, result: Result, spacing: Sequence[float]) -> None:
        from medrobust.pictures import panel

        condition = result.condition
        png = panel(
            *(m.cpu() for m in (result.image, result.image_adv, result.label, result.pred, result.pred_adv)),
            radiological=len(result.image) == 1,
            spacing=[float(s) for s in spacing][: result.image.ndim - 1],
            class_names=self.evaluation.class_names,
            title=f"{name}: {condition.name}, {condition.protocol}",
        )
        with replacing(self.folder / "pictures" / f"{name}__{slug(condition)}.png") as partial:
            partial.write_bytes(png)

    def _load(self, case: str, condition: Condition, image: Tensor) -> tuple[Tensor, Recorded] | None:
        """The saved volume of a condition and what its manifest says of it."""
        if self.saved is None:
            return None
        path = self.saved / volume_name(case, condition)
        affine = image.affine if isinstance(image, MetaTensor) else np.eye(4)
        volume = load_volume(path, image, affine)
        row = next((row for row in manifest(self.saved) if row.file == path.name), None)
        if row is None or row.sha256 != sha256_of_file(path):
            raise ValueError(f"expected {path.name} as its manifest describes it, got a file that was changed since")
        return volume, Recorded(text=f"saved {row.attack}", seed=int(row.seed))

    def _broken(self, records: Sequence[Record]) -> set[Key]:
        """Ensembles that broke the case of these records in an earlier run."""
        return {
            condition.ensemble
            for condition in self.conditions
            if condition.ensemble
            and (own := [r for r in records if (r.condition, r.protocol) == (condition.name, condition.protocol)])
            and is_broken(own)
        }

    def _records(self) -> list[Record]:
        return read_csv(self.records_path) if self.records_path.is_file() else []

    def _key(self, case: str, condition: Condition) -> tuple[str, str, str]:
        return case, condition.name, condition.protocol

    def done(self) -> set[tuple[str, str, str]]:
        """Case, condition and protocol of all records in the folder."""
        return {(record.case, record.condition, record.protocol) for record in self._records()}

    def _matched(self, name: str) -> bool:
        return any(condition.match for condition in self.conditions if condition.name == name)


FILES = ("image", "label")
"""What of a case is a path."""


def case_names(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """One name a case: its own or its image's file name without folder and ending, numbered where two are alike."""
    used: set[str] = set()
    return [unused(str(case.get("case") or stem(str(case["image"]))), used) for case in cases]


def saved_conditions(folder: Path, class_names: Sequence[str]) -> list[Condition]:
    """The conditions that a run's ``volumes`` folder holds, clean first, in the order they were made.

    Args:
        class_names: background first, to read goals.
    """
    found = {}
    for row in manifest(folder):
        goal = parse_goal(row.goal, class_names) if row.goal else None
        attack = Recorded(text=f"saved {row.attack}")
        wish = goal.describe(class_names) if goal else ""
        found[row.condition, row.protocol] = Condition(
            name=row.condition,
            protocol=row.protocol,
            attack=attack,
            goal=goal,
            wish=wish,
            asked=row.goal,
            ensemble=ensemble_of(row.condition, row.attack, row.protocol),
        )
    return [CLEAN_CONDITION, *found.values()]


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


def _digest(paths: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each file of a case; a missing file is found later, as that case's failure."""
    return {
        key: sha256_of_file(Path(str(paths[key]))) for key in FILES if key in paths and Path(str(paths[key])).is_file()
    }
