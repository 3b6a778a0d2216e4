"""A bundle whose network has a known worst case, with scans on disk: for tests of runs and of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from oracles import VoxelLinear, data

AFFINE = np.array([[0.0, 2.0, 0.0, -5.0], [1.5, 0.0, 0.0, 3.0], [0.0, 0.0, 3.0, 8.0], [0.0, 0.0, 0.0, 1.0]])
"""Other axes than RAS and three different spacings: what is not handled shows."""


def write_scan(path: Path, array: np.ndarray) -> str:
    image = nib.Nifti1Image(array, AFFINE)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return str(path)


def make(root: Path, cases: int = 2) -> Path:
    """Write the bundle into ``root``; images are -1000..1000 units, scaled to [0, 1] by its preprocessing."""
    for folder in ("configs", "models", "data"):
        (root / folder).mkdir(parents=True)
    image, label = data(batch=cases, classes=2, side=12)
    listing = []
    for i in range(cases):
        scan = write_scan(root / "data" / f"case{i}.nii.gz", (image[i, 0].numpy() * 2000 - 1000).astype(np.float32))
        mask = write_scan(root / "data" / f"case{i}_label.nii.gz", label[i, 0].numpy().astype(np.uint8))
        listing.append({"image": scan, "label": mask})
    torch.save(VoxelLinear().state_dict(), root / "models" / "model.pt")
    keys = ["image", "label"]
    preprocessing = [
        {"_target_": "LoadImaged", "keys": keys},
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS", "labels": None},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -1000.0, "a_max": 1000.0}
        | {"b_min": 0.0, "b_max": 1.0, "clip": True},
    ]
    config = {
        "bundle_root": ".",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cpu')",
        "network_def": {"_target_": "oracles.VoxelLinear"},
        "train": {"dataset": {"data": listing[:1] * 3}},
        "validate": {
            "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
            "dataset": {"data": listing},
            "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [8, 8, 8], "sw_batch_size": 2, "overlap": 0.5},
        },
    }
    (root / "configs" / "train.yaml").write_text(yaml.safe_dump(config))
    channels = {"0": "background", "1": "organ"}
    data_format = {"inputs": {"image": {"num_channels": 1}}, "outputs": {"pred": {"channel_def": channels}}}
    metadata = {"network_data_format": data_format}
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    return root
