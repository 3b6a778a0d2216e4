"""A label map as DICOM SEG: in the study, at the place and with the references of the series that it was made of.

The file names the patient, so it lies in the private folder beside OUTPUT (``dicom/<case>/seg.dcm``), and ``case.json``
has its SHA-256. The same series, bundle and settings give the same bytes and the same UIDs, so that an archive to which
it is sent twice has it once. Only labels of the scan as it came are written: there is no way from an attacked volume
to here.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.valuerep import DA, TM

from medrobust import __version__
from medrobust.atomic import WRITING, flush, replacing
from medrobust.batch.commit import digest_of
from medrobust.batch.dicom_codes import Segment, segments_of
from medrobust.batch.dicom_grid import Grid
from medrobust.batch.dicom_header import Instance, Plane, quiet
from medrobust.batch.dicom_series import gate
from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.naming import KEY
from medrobust.batch.nifti import Policy, displacement
from medrobust.batch.recipe import Recipe

FOLDER, NAME = "dicom", "seg.dcm"
KINDS = ("binary", "labelmap")
FORMAT = 1
"""A change of what is written makes other UIDs."""
DESCRIPTION = "RESEARCH ONLY - medrobust"
EMPTY_DAY, EMPTY_TIME = "19000101", "000000"
"""Where an anonymised source has no date at all: the standard asks for one."""
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID", "Modality")
MAY_BE_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
CLOSE = 1e-2
"""Share of a voxel by which a label map and its series may lie apart: headers of NIfTI have single precision."""
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"


@dataclass(frozen=True, kw_only=True)
class SegWriter:
    """Writes the SEG of one case after the other.

    Args:
        private: the folder beside OUTPUT.
        kind: ``"binary"``, which every viewer reads, or ``"labelmap"``, which is smaller and young.
    """

    private: Path
    kind: str = "binary"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RunError(Exit.USAGE, f"expected --dicom-seg {', '.join(KINDS)} or none, got {self.kind!r}")

    def path_of(self, key: str) -> Path:
        """Where the SEG of a case lies."""
        if not KEY.fullmatch(key):
            raise ValueError(f"expected a name such as case-0123456789abcdef, got {key!r}")
        return self.private / FOLDER / key / NAME

    def holds(self, key: str, record: Mapping[str, Any]) -> bool:
        """Whether the SEG that a record names is there; also true where it names none."""
        said = record.get("dicom_seg")
        if not said:
            return True
        try:
            return hashlib.sha256(self.path_of(key).read_bytes()).hexdigest() == said["sha256"]
        except OSError:
            return False

    def write(
        self, key: str, files: Sequence[Path], labels: np.ndarray, affine: np.ndarray, recipe: Recipe, settings: str
    ) -> dict[str, Any]:
        """Write, read back, put in place; nothing is written for a case that was no DICOM series (no ``files``).

        Args:
            files: the series' instances.
            labels: (X, Y, Z), whole numbers, on the series' grid.
            affine: voxel to mm, x to the right and y to the front (RAS).
            settings: digest of the run's settings.

        Returns:
            What ``case.json`` says of it: without anything of the patient's.

        Raises:
            CaseError: the source lacks what a SEG needs, or what was read back is another mask or lies elsewhere.
        """
        if not files:
            return {}
        with quiet():
            instances, grid = gate(files, Policy())
            sheet = _Sheet.of(labels, affine, [one for one, _ in instances.values()], grid)
            # In the order of the slices, whatever order the files came in.
            first: dict[int, Path] = {place: min(paths) for place, (_, paths) in enumerate(instances.values())}
            sources = [pydicom.dcmread(first[place], stop_before_pixels=True) for place in sheet.sources]
            filled = _fill(sources)
            seg = _build(sources, sheet, self.kind, recipe, settings)
            path = self.path_of(key)
            for folder in (self.private, path.parent.parent, path.parent):
                folder.mkdir(exist_ok=True, mode=0o700)
            for left in path.parent.glob(WRITING + "*"):  # of a worker that was killed; we hold the case's lock
                shutil.rmtree(left, ignore_errors=True)
            with replacing(path) as partial:
                seg.save_as(partial)
                _verify(partial, sheet)
                content = partial.read_bytes()
            flush(path.parent)
        found = {"kind": self.kind, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return {"dicom_seg": {**found, "empty": not sheet.planes.any(), "filled": filled}}


def uid_of(purpose: str, sources: Sequence[Dataset], *digests: str) -> str:
    """A UID that follows from the series, the set of its instances, and digests."""
    instances = digest_of(sorted(str(source.SOPInstanceUID) for source in sources))
    text = "|".join([purpose, str(FORMAT), __version__, str(sources[0].SeriesInstanceUID), instances, *digests])
    # 2.25 stands for a UUID as a number; version 5 is that of names that were hashed.
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=5).int}"


def _fill(sources: Sequence[Dataset]) -> list[str]:
    """Add what must be there but may be empty, and empty what is no value; returns the names of these attributes."""
    for name in NEEDED:
        if any(not source.get(name) for source in sources):
            raise CaseError("seg-source", f"a DICOM SEG needs {name}, which the series lacks: leave --dicom-seg out")
    changed = set()
    for source in sources:
        for name in MAY_BE_EMPTY:
            if name not in source or not _valid(name, source[name].value):
                setattr(source, name, "")
                changed.add(name)
    return sorted(changed)


def _valid(name: str, value: Any) -> bool:
    if value in (None, ""):
        return True
    try:
        if name.endswith("Date"):
            DA(value)
        elif name.endswith("Time"):
            TM(value)
    except ValueError:
        return False
    return name != "PatientSex" or value in ("M", "F", "O")


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """The labels as the series' own slices.

    Attributes:
        planes: (slices, rows, columns), in the order of the series' frames: along the slices' normal, or as the one
            multi-frame file has them.
        places: where each of these lies, as the series says it.
        sources: for each file, which instance it is of those that passed the gate.
    """

    planes: np.ndarray
    places: list[Plane]
    sources: list[int]

    @classmethod
    def of(cls, labels: np.ndarray, affine: np.ndarray, instances: Sequence[Instance], grid: Grid) -> _Sheet:
        shape = grid.geometry.shape
        if labels.shape != shape or displacement(affine, grid.geometry.affine, shape) > CLOSE:
            raise CaseError("seg-grid", "the labels do not lie on the series' grid", kind="failed")
        slots = list(range(shape[2]))
        if instances[0].multiframe:
            slots.sort(key=lambda slot: grid.order[slot][1])
        order = [grid.order[slot] for slot in slots]
        return cls(
            planes=np.ascontiguousarray(labels.transpose(2, 1, 0)[slots]),
            places=[instances[place].planes[frame] for place, frame in order],
            sources=list(dict.fromkeys(place for place, _ in order)),
        )


def _build(sources: Sequence[Dataset], sheet: _Sheet, kind: str, recipe: Recipe, settings: str) -> Any:
    name = _plain(recipe.root.resolve().name)
    digests = (recipe.digest, settings)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=name,
        family=codes.cid7162.ArtificialIntelligence,
        version=f"sha256 {recipe.digest[:16]}",
        source="medrobust",
        parameters={"bundle": recipe.digest, "settings": settings},
    )
    equipment = hd.ContributingEquipment(
        "medrobust",
        codes.DCM.ProcessingEquipment,
        manufacturer_model_name=name,
        software_versions=__version__,
        contribution_description="Segmentation by a neural network; research only",
    )
    number = sources[0].get("SeriesNumber")
    empty = not sheet.planes.any()
    place = hd.PlanePositionSequence("PATIENT", sheet.places[0].position)
    seg = hd.seg.Segmentation(
        source_images=sources,
        # An empty mask is one empty frame a segment: that nothing was found is a finding.
        pixel_array=sheet.planes[:1] if empty else sheet.planes,
        plane_positions=[place] if empty else None,
        omit_empty_frames=not empty,
        segmentation_type=kind.upper(),
        segment_descriptions=[
            _described(place, one, algorithm)
            for place, one in enumerate(segments_of(recipe.root, recipe.class_names), start=1)
        ],
        series_instance_uid=uid_of("series", sources, *digests),
        series_number=9000 + (int(number) if number is not None and 0 < int(number) < 1000 else 0),
        sop_instance_uid=uid_of("instance", sources, *digests),
        instance_number=1,
        manufacturer="medrobust",
        manufacturer_model_name=name,
        software_versions=__version__,
        device_serial_number=recipe.digest[:16],
        content_label="MEDROBUST",
        content_description="Research only, not for diagnosis",
        series_description=DESCRIPTION,
        contributing_equipment=[equipment],
    )
    return _timeless(seg, sources, uid_of("dimensions", sources, *digests))


def _described(
    number: int, segment: Segment, algorithm: hd.AlgorithmIdentificationSequence
) -> hd.seg.SegmentDescription:
    found = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=_plain(segment.label),
        segmented_property_category=segment.category,
        segmented_property_type=segment.type,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        anatomic_regions=[segment.region] if segment.region else None,
        display_color=_lab(segment.rgb) if segment.rgb else None,
    )
    if segment.modifier:
        item = found.SegmentedPropertyTypeCodeSequence[0]
        item.SegmentedPropertyTypeModifierCodeSequence = [_concept(segment.modifier)]
    if segment.region and segment.region_modifier:
        found.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_concept(segment.region_modifier)]
    return found


def _timeless(seg: Any, sources: Sequence[Dataset], dimensions: str) -> Any:
    """Put the source's times and fixed UIDs where the library puts the clock's and random ones."""
    for name in ("InstanceCreationDate", "InstanceCreationTime"):
        if name in seg:
            del seg[name]
    source = sources[0]
    seg.ContentDate, seg.ContentTime = EMPTY_DAY, EMPTY_TIME
    for kind in ("Content", "Acquisition", "Series", "Study"):
        day, time = source.get(f"{kind}Date"), source.get(f"{kind}Time")
        if day and _valid("Date", day):
            seg.ContentDate = day
            seg.ContentTime = time if time and _valid("Time", time) else EMPTY_TIME
            break
    for item in seg.ContributingEquipmentSequence:
        if item.Manufacturer.startswith("Highdicom") and "ContributionDateTime" in item:
            del item.ContributionDateTime
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = dimensions
    return seg


def _verify(path: Path, sheet: _Sheet) -> None:
    """Read the file with pydicom alone: every frame is the plane of the labels that lies where the frame says.

    Raises:
        CaseError: it is not.
    """

    def wrong(what: str) -> CaseError:
        return CaseError("read-back", f"the DICOM SEG was read back with {what}", kind="failed")

    seg = pydicom.dcmread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    one = sheet.places[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    if not np.allclose(orientation, one.orientation, atol=1e-5) or not np.allclose(spacing, one.spacing, rtol=1e-5):
        raise wrong("other axes")
    places = np.array([place.position for place in sheet.places])
    labelmap = seg.SOPClassUID == LABELMAP
    left = {(slot, int(number)) for slot, plane in enumerate(sheet.planes) for number in np.unique(plane) if number}
    for groups, pixels in zip(seg.PerFrameFunctionalGroupsSequence, iter_pixels(seg), strict=True):
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        away = np.linalg.norm(places - position, axis=1)
        slot = int(away.argmin())
        if away[slot] > CLOSE * min(one.spacing):
            raise wrong("a frame elsewhere")
        if labelmap:
            same, numbers = np.array_equal(pixels, sheet.planes[slot]), {int(value) for value in np.unique(pixels)}
        else:
            holder = groups if "SegmentIdentificationSequence" in groups else shared
            number = int(holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            same, numbers = np.array_equal(pixels != 0, sheet.planes[slot] == number), {number}
        if not same:
            raise wrong("other voxels")
        left -= {(slot, number) for number in numbers}
    if left:
        raise wrong("planes missing")


def _concept(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept.from_code(code)


def _lab(rgb: tuple[int, int, int]) -> hd.color.CIELabColor:
    return hd.color.CIELabColor.from_rgb(*rgb)


def _plain(text: str) -> str:
    """Text that fits every character set, and DICOM's 64 letters."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")[:64] or "?"
