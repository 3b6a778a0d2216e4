"""Cases of an image, a mask and a text as MONAI transforms: pictures or slices of volumes, and the prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Randomizable, Transform
from torch import Tensor

from medrobust.data import images, slices
from medrobust.data.prompts import EMPTY, Fixed, Policy, Prompt
from medrobust.data.tokenizer import tokenize

Data = dict[str, Any]


class LoadPair(Transform):
    """Paths to tensors: ``image`` (3, H, W) of a picture or (1, H, W) of a slice, in [0, 1], and a binary ``label``.

    A case with ``slice`` is a slice of NIfTI volumes (:func:`medrobust.data.slices.load_slice`), and its ``value``, one
    or several, is what counts as mask in the label map; its ``structures``, another label map, is kept whole for
    transforms that need it. Any other case is a picture. A case without a label stays so. In the metadata, the file is
    called as the case is: many share an image, and what is saved of them must not.

    Args:
        window: intensities of a volume that become 0 and 1; only slices need it.
        threshold: of :func:`medrobust.data.images.binarise`; masks stored as JPEG need 128.

    Raises at call:
        OSError, ValueError: a file that is missing, no picture, no volume, or not on the image's grid.
    """

    def __init__(self, *, window: tuple[float, float] | None = None, threshold: int | None = None) -> None:
        self.window = None if window is None else (float(window[0]), float(window[1]))
        self.threshold = threshold

    def __call__(self, data: Mapping[str, Any]) -> Data:
        found = dict(data)
        found["image"] = self.image(data)
        found["image"].meta["filename_or_obj"] = str(data.get("case", data["image"]))
        if "structures" in data:
            found["structures"] = slices.load_slice_map(data["structures"], data["slice"])
        if "label" in data:
            found["label"] = label = self.label(data)
            if label.shape[1:] != found["image"].shape[1:]:
                raise ValueError(
                    f"expected image and mask of one size, got {tuple(found['image'].shape[1:])} and "
                    f"{tuple(label.shape[1:])}: resize the mask by nearest neighbour"
                )
        return found

    def image(self, data: Mapping[str, Any]) -> MetaTensor:
        """The image alone."""
        path = data["image"]
        if "slice" not in data:
            return _picture(images.load_image(path), path)
        if self.window is None:
            raise ValueError("expected a window for slices of volumes, got none: set window=(low, high), as in HU")
        return slices.load_slice(path, data["slice"], window=self.window)

    def label(self, data: Mapping[str, Any]) -> MetaTensor:
        """The mask alone."""
        path = data["label"]
        if "slice" not in data:
            return _picture(images.load_mask(path, threshold=self.threshold), path)
        value = data.get("value", 1)
        return slices.load_slice_mask(path, data["slice"], values=[value] if isinstance(value, int) else value)


class Prompted(Transform):
    """Add what a policy chooses for the case: ``prompt``, ``prompt_key``, and its ``input_ids`` (L,) int64.

    The same case gets the same prompt in training, attack and evaluation. Of an ensemble the first prompt is taken.

    Args:
        policy: of ``medrobust.data.prompts``; a text is the key of :class:`Fixed`.
        truncate: cut prompts of more than 77 tokens instead of refusing them.
        pad: id after a prompt's end; CRIS was released with 0.

    Raises at call:
        ValueError: a case without prompts, or without the policy's.
    """

    def __init__(self, policy: Policy | str, *, truncate: bool = False, **tokens: Any) -> None:
        self.policy: Policy = Fixed(policy) if isinstance(policy, str) else policy
        self.tokens = {"truncate": truncate, **tokens}

    def __call__(self, data: Mapping[str, Any]) -> Data:
        _check_prompts(data)
        return under_prompt(data, self.policy.choose(data)[0], self.tokens)


class RandPrompted(Randomizable, Transform):
    """The same with a fresh prompt each time, for training: a key, each as likely as another, then one of its texts.

    Args:
        keys: to draw from; ``None`` is all but the empty prompt.
        truncate, tokens: as for :class:`Prompted`.
    """

    def __init__(self, keys: tuple[str, ...] | None = None, *, truncate: bool = False, **tokens: Any) -> None:
        self.keys = keys
        self.tokens = {"truncate": truncate, **tokens}

    def __call__(self, data: Mapping[str, Any]) -> Data:
        _check_prompts(data)
        keys = [key for key in data["prompts"] if key != EMPTY] if self.keys is None else list(self.keys)
        key = keys[self.R.randint(len(keys))]
        chosen = Fixed(key, seed=int(self.R.randint(2**31 - 1))).choose(data)[0]
        return under_prompt(data, chosen, self.tokens)


def under_prompt(data: Mapping[str, Any], prompt: Prompt, tokens: Mapping[str, Any] | None = None) -> Data:
    """The case with this prompt's text, key and tokens; ``tokens`` are settings of :func:`tokenize`."""
    input_ids, _ = tokenize(prompt.text, **(tokens or {}))
    return {**data, "prompt": prompt.text, "prompt_key": prompt.key, "input_ids": input_ids[0]}


def token_settings(preprocessing: object) -> dict[str, Any]:
    """How the last :class:`Prompted` of a composition makes tokens; empty where it has none."""
    transforms = preprocessing.flatten().transforms if isinstance(preprocessing, Compose) else [preprocessing]
    found = [transform.tokens for transform in transforms if isinstance(transform, Prompted)]
    return dict(found[-1]) if found else {}


def _check_prompts(data: Mapping[str, Any]) -> None:
    if "prompts" not in data:
        raise ValueError(
            "expected a case with prompts, got an image alone: take the bundle's own cases, or list yours with their "
            "prompts as docs/prompts.md says"
        )


def _picture(tensor: Tensor, path: Any) -> MetaTensor:
    """A picture has no place in space: its pixels are its unit."""
    return MetaTensor(tensor, affine=torch.eye(4, dtype=torch.float64), meta={"filename_or_obj": str(path)})
