"""The data list of BTCV ("Synapse") abdominal CT: 30 scans with 13 organs, split 18 / 12 as the literature does.

The scans are not public enough to be fetched: they come from https://www.synapse.org/#!Synapse:syn3193805 after
registration. Put ``img00NN.nii.gz`` into ``imagesTr`` and ``label00NN.nii.gz`` into ``labelsTr`` of one folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from monai.data import load_decathlon_datalist

CLASSES = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)

SECTIONS = {
    "training": (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40),
    "validation": (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38),
}
"""Case numbers of the 18 / 12 split. The literature reports on ``validation``: choose nothing by looking at it."""


def folder() -> Path:
    """Where the scans are expected: the environment variable ``MEDROBUST_BTCV``, else ``data/btcv`` where you are."""
    return Path(os.environ.get("MEDROBUST_BTCV") or Path("data") / "btcv").expanduser()


def datalist(
    dataset_dir: str | Path, section: str = "training", listing: str | Path | None = None
) -> list[dict[str, str]]:
    """Image and label paths of one section, every one of them checked to exist.

    Args:
        dataset_dir: folder with ``imagesTr`` and ``labelsTr``.
        section: ``"training"`` or ``"validation"``, or any section of ``listing``.
        listing: another split, as a Medical Segmentation Decathlon style JSON with paths relative to ``dataset_dir``.

    Raises:
        FileNotFoundError: the folder or a scan is missing.
        ValueError: there is no such section, or no such listing.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise FileNotFoundError(
            f"expected BTCV's imagesTr and labelsTr in {root}, got no such folder: set dataset_dir or MEDROBUST_BTCV"
        )
    if listing is None:
        found = [{key: str(root / path) for key, path in case.items()} for case in _published(section)]
    else:
        found = load_decathlon_datalist(listing, is_segmentation=True, data_list_key=section, base_dir=root)
    missing = [path for case in found for path in case.values() if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected {len(found)} cases of section {section!r} in {root}, got {len(missing)} files missing, "
            f"the first of them {missing[0]}. Complete the folder or pass a listing of your own split"
        )
    return found


def _published(section: str) -> list[dict[str, str]]:
    if section not in SECTIONS:
        raise ValueError(f"expected a section among {', '.join(SECTIONS)}, got {section!r}")
    return [
        {"image": f"imagesTr/img{number:04d}.nii.gz", "label": f"labelsTr/label{number:04d}.nii.gz"}
        for number in SECTIONS[section]
    ]
