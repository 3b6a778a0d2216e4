"""All options of ``medrobust batch``, and what they mean: found to be wrong before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medrobust.batch import plan
from medrobust.batch.attacked import Attacks
from medrobust.batch.discovery import Search
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.nifti import MODALITIES, Policy
from medrobust.batch.recipe import Recipe
from medrobust.parsing import parse_attacks, parse_overrides

if TYPE_CHECKING:
    from medrobust.batch.dicom_seg import SegWriter


@dataclass(kw_only=True)
class Options:
    """The words of the command line; see ``medrobust batch --help``."""

    source: Path
    output: Path
    bundle: Path
    trust_bundle: bool
    weights: Path | None
    override: Sequence[str] | None
    attack: Sequence[str] | None
    seed: int
    dry_run: bool
    resume: bool
    on_error: str
    max_failures: int | None
    timeout_per_case: float
    memory: str
    workers: int
    scheduler: str
    num_parts: int
    part_id: int
    device: str | None
    layout: str
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    section: str
    allow_outside_root: bool
    geometry: str
    nonfinite: str
    modality: Sequence[str] | None
    dicom_seg: str
    private: Path | None
    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        """
        Raises:
            RunError: an option that cannot be meant.
        """
        if self.scheduler:
            check_scheduler(self.scheduler, self.workers)
            # Another machine is in another folder.
            self.source, self.output, self.bundle = (
                path.absolute() for path in (self.source, self.output, self.bundle)
            )
            self.weights, self.private = (path.absolute() if path else None for path in (self.weights, self.private))
        if self.on_error not in ("skip", "stop"):
            raise RunError(Exit.USAGE, f"expected --on-error skip or stop, got {self.on_error!r}")
        plan.check_part(self.num_parts, self.part_id)
        _ = self.largest, self.attacks, self.recipe, self.policy
        if self.source.resolve() == self.output.resolve() or self.output.resolve() in self.source.resolve().parents:
            raise RunError(Exit.USAGE, "expected INPUT outside OUTPUT")

    @cached_property
    def largest(self) -> int | None:
        """Bytes that a worker may have in memory."""
        return bytes_of(self.memory)

    @property
    def beside(self) -> Path:
        """The private folder."""
        return self.private or self.output.with_name(self.output.name + ".private")

    @cached_property
    def attacks(self) -> Attacks:
        """What is done to each case beside segmenting it."""
        try:
            named, wishes = parse_attacks(self.attack or [])
            if wishes:
                names = ", ".join(wishes)
                raise ValueError(f"expected attacks without a goal here, got {names}: use `medrobust evaluate`")
            found = Attacks(named=named, seed=self.seed)
            _ = found.text
            return found
        except (ValueError, TypeError) as error:
            raise RunError(Exit.USAGE, str(error)) from None

    @cached_property
    def recipe(self) -> Recipe:
        """The bundle."""
        try:
            overrides = parse_overrides(self.override)
            return Recipe(
                root=self.bundle,
                trusted=self.trust_bundle,
                weights=self.weights,
                device=self.device,
                overrides=overrides,
            )
        except (ValueError, TypeError) as error:
            raise RunError(Exit.USAGE, str(error)) from None

    @cached_property
    def policy(self) -> Policy:
        """What is accepted."""
        wanted = self.modality or [self.recipe.modality or "any"]
        unknown = ", ".join(sorted({*wanted} - {*MODALITIES, "any"}))
        # What the bundle says is its own affair: a model of photographs has no modality of ours.
        if unknown and self.modality:
            raise RunError(Exit.USAGE, f"expected --modality {', '.join(MODALITIES)} or any, got {unknown}")
        modalities = () if "any" in wanted or unknown else tuple(sorted({*wanted}))
        try:
            return Policy(geometry=self.geometry, nonfinite=self.nonfinite, modalities=modalities)
        except ValueError as error:
            raise RunError(Exit.USAGE, str(error)) from None

    @property
    def search(self) -> Search:
        """What counts as a case."""
        return Search(
            layout=self.layout,
            include=self.include or (),
            exclude=self.exclude or (),
            aside=(self.output, self.beside),
            outside=self.allow_outside_root,
            section=self.section,
        )

    @cached_property
    def writer(self) -> SegWriter | None:
        """What writes DICOM SEG, if it was asked for."""
        if self.dicom_seg == "none":
            return None
        try:
            from medrobust.batch.dicom_codes import segments_of
            from medrobust.batch.dicom_seg import SegWriter

            segments_of(self.recipe.root, self.recipe.class_names)
        except ImportError:
            raise RunError(Exit.USAGE, "expected highdicom for --dicom-seg: pip install 'medrobust[dicom]'") from None
        except ValueError as error:
            raise RunError(Exit.USAGE, str(error)) from None
        return SegWriter(private=self.beside.absolute(), kind=self.dicom_seg)


def check_scheduler(scheduler: str, workers: int) -> None:
    """See that ``--scheduler`` can be meant, without asking it.

    Raises:
        RunError: it cannot, or Dask is missing.
    """
    try:
        from medrobust.batch.cluster import LOCAL
    except ImportError:
        raise RunError(Exit.USAGE, "expected Dask for --scheduler: pip install 'medrobust[cluster]'") from None
    if scheduler == LOCAL and not workers:
        raise RunError(Exit.USAGE, "expected --workers 1 or more with --scheduler local, got 0")
    if scheduler != LOCAL and "://" not in scheduler and not Path(scheduler).is_file():
        known = "local, an address such as tcp://host:8786, or a scheduler file"
        raise RunError(Exit.USAGE, f"expected --scheduler {known}, got {scheduler!r}")


def bytes_of(text: str) -> int | None:
    """Bytes from words such as ``6G``; ``None`` from nothing.

    Raises:
        RunError: these are no such words.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise RunError(Exit.USAGE, f"expected --memory such as 800M or 6G, got {text!r}")
    return int(float(match[1]) * (1 << (20 if match[2].upper() == "M" else 30)))
