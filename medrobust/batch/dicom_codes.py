"""Which code a class's name stands for in DICOM: SNOMED CT, through pydicom's dictionary.

``segment_of("right kidney")`` is SCT's *Kidney* with the modifier *Right*. Names are compared in small letters, ``_``
and ``-`` as spaces, without ``left`` and ``right``. A name that is not in the table is called *Tissue*, and keeps its
label. A bundle says it better in ``configs/segments.json``, in the format of dcmqi and 3D Slicer
(``segmentAttributes``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

SEGMENTS = "segments.json"
LARGEST = 1 << 20
ORGANS = {
    "adrenal gland": "AdrenalGland",
    "aorta": "Aorta",
    "bladder": "UrinaryBladderStructure",
    "brain": "Brain",
    "colon": "Colon",
    "duodenum": "Duodenum",
    "esophagus": "Esophagus",
    "gallbladder": "Gallbladder",
    "heart": "Heart",
    "kidney": "Kidney",
    "large bowel": "LargeIntestine",
    "liver": "Liver",
    "lung": "Lung",
    "lung lower lobe": "LowerLobeOfLung",
    "lung middle lobe": "MiddleLobeOfRightLung",
    "lung upper lobe": "UpperLobeOfLung",
    "oesophagus": "Esophagus",
    "pancreas": "Pancreas",
    "prostate": "Prostate",
    "rectum": "Rectum",
    "small bowel": "SmallIntestine",
    "spinal cord": "SpinalCord",
    "spleen": "Spleen",
    "stomach": "Stomach",
    "thyroid gland": "Thyroid",
    "trachea": "Trachea",
    "urinary bladder": "UrinaryBladderStructure",
    "uterus": "Uterus",
}
VESSELS = {
    "brachiocephalic trunk": "BrachiocephalicTrunk",
    "brachiocephalic vein": "BrachiocephalicVein",
    "common carotid artery": "CommonCarotidArtery",
    "iliac artery": "IliacArtery",
    "iliac vena": "IliacVein",
    "inferior vena cava": "InferiorVenaCava",
    "portal and splenic veins": "PortalVein",
    "portal vein": "PortalVein",
    "portal vein and splenic vein": "PortalVein",
    "postcava": "InferiorVenaCava",
    "pulmonary artery": "PulmonaryArtery",
    "pulmonary vein": "PulmonaryVein",
    "subclavian artery": "SubclavianArtery",
    "superior vena cava": "SuperiorVenaCava",
}
HEART = {
    "left atrial appendage": "LeftAuricularAppendage",
    "atrial appendage left": "LeftAuricularAppendage",
    "left atrium": "LeftAtrium",
    "left ventricle": "LeftVentricle",
    "myocardium": "LeftVentricleMyocardium",
    "right atrium": "RightAtrium",
    "right ventricle": "RightVentricle",
}
"""Here the side is a part of the code."""
BONES = {
    "bone": "Bone",
    "bones": "Bone",
    "clavicula": "Clavicle",
    "costal cartilage": "CostalCartilage",
    "costal cartilages": "CostalCartilage",
    "femur": "Femur",
    "hip": "Hip",
    "humerus": "Humerus",
    "rib": "Rib",
    "ribs": "Rib",
    "sacrum": "Sacrum",
    "scapula": "Scapula",
    "skull": "Skull",
    "spine": "Spine",
    "sternum": "Sternum",
    **{f"rib {number}": "Rib" for number in range(1, 13)},
    **{f"vertebrae c{number}": f"C{number}Vertebra" for number in range(1, 8)},
    **{f"vertebrae t{number}": f"T{number}Vertebra" for number in range(1, 13)},
    **{f"vertebrae l{number}": f"L{number}Vertebra" for number in range(1, 6)},
}
MUSCLES = {
    "autochthon": "ErectorSpinaeMuscle",
    "back muscle": "ErectorSpinaeMuscle",
    "back muscles": "ErectorSpinaeMuscle",
    "gluteus maximus": "Muscle",
    "gluteus medius": "Muscle",
    "gluteus minimus": "Muscle",
    "iliopsoas": "Muscle",
}
ABNORMAL = {
    "cyst": "Cyst",
    "edema": "Edema",
    "kidney cyst": "Cyst",
    "lesion": "Lesion",
    "mass": "Mass",
    "necrosis": "Necrosis",
    "nodule": "Nodule",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
}
NORMAL = {**ORGANS, **VESSELS, **BONES, **MUSCLES}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What DICOM calls one class.

    Attributes:
        modifier, region, region_modifier: such as a side; ``None``: not said.
        rgb: 0..255 each, for viewers; ``None``: theirs to choose.
    """

    label: str
    category: Code
    type: Code
    modifier: Code | None = None
    region: Code | None = None
    region_modifier: Code | None = None
    rgb: tuple[int, int, int] | None = None


def segment_of(name: str) -> Segment:
    """The codes of a class's name."""
    label = " ".join(name.split())[:64]
    words = re.sub(r"[\s_-]+", " ", name.lower()).strip()
    if words in HEART:
        return Segment(label=label, category=codes.SCT.AnatomicalStructure, type=_sct(HEART[words]))
    sides = [word for word in words.split() if word in ("left", "right")]
    rest = " ".join(word for word in words.split() if word not in ("left", "right"))
    modifier = _sct(sides[0].capitalize()) if len(sides) == 1 else None
    if rest in ABNORMAL:
        kind, code = codes.SCT.MorphologicallyAbnormalStructure, _sct(ABNORMAL[rest])
    elif rest in NORMAL:
        kind, code = codes.SCT.AnatomicalStructure, _sct(NORMAL[rest])
    else:
        kind, code = codes.SCT.Tissue, codes.SCT.Tissue
    return Segment(label=label, category=kind, type=code, modifier=modifier)


def segments_of(root: Path, names: Sequence[str]) -> list[Segment]:
    """The codes of a bundle's classes, without the background; ``configs/segments.json`` wins where it names a class.

    Args:
        root: the bundle's folder.
        names: of its classes, background first.

    Raises:
        ValueError: ``segments.json`` is not what dcmqi writes.
    """
    said = _said(root / "configs" / SEGMENTS)
    unknown = sorted(number for number in said if not 0 < number < len(names))
    if unknown:
        raise ValueError(f"expected labelID 1 to {len(names) - 1} in {SEGMENTS}, got {unknown}")
    return [said.get(number) or segment_of(name) for number, name in enumerate(names) if number]


def _said(path: Path) -> dict[int, Segment]:
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise ValueError(f"expected at most {LARGEST >> 10} KB of {SEGMENTS}")
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["segmentAttributes"]
        items = [item for group in groups for item in group]
        return {int(item["labelID"]): _segment(item) for item in items}
    except (KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(f"expected segmentAttributes as of dcmqi in {SEGMENTS}, got {error!r}"[:200]) from None


def _segment(item: Mapping[str, Any]) -> Segment:
    rgb = item.get("recommendedDisplayRGBValue")
    if rgb is not None and not (len(rgb) == 3 and all(0 <= int(part) <= 255 for part in rgb)):
        raise ValueError(f"expected three numbers of 0 to 255 as recommendedDisplayRGBValue in {SEGMENTS}, got {rgb!r}")
    kind = _code(item["SegmentedPropertyTypeCodeSequence"])
    category = _code(item["SegmentedPropertyCategoryCodeSequence"])
    return Segment(
        label=str(item.get("SegmentLabel") or item.get("SegmentDescription") or kind.meaning)[:64],
        category=category,
        type=kind,
        modifier=_maybe(item.get("SegmentedPropertyTypeModifierCodeSequence")),
        region=_maybe(item.get("AnatomicRegionSequence")),
        region_modifier=_maybe(item.get("AnatomicRegionModifierSequence")),
        rgb=(int(rgb[0]), int(rgb[1]), int(rgb[2])) if rgb is not None else None,
    )


def _code(content: Mapping[str, str]) -> Code:
    parts = [str(content[name]) for name in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")]
    if any(not part or len(part) > most for part, most in zip(parts, (64, 16, 64), strict=True)):
        raise ValueError(f"expected codes of 1 to 64 letters in {SEGMENTS}, got {parts}")
    return Code(*parts)


def _maybe(content: Mapping[str, str] | None) -> Code | None:
    return _code(content) if content else None


def _sct(keyword: str) -> Code:
    found: Code = getattr(codes.SCT, keyword)
    return found
