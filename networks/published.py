"""Copy a published state dict into a network under other names: all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

WRAPPERS = re.compile(r"^(?:(?:module|base_model|model|_orig_mod)\.)+")
"""What ``DistributedDataParallel``, the authors' attack and normalisation wrappers and ``torch.compile`` put first."""


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """The name after every rule (pattern, replacement) in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put before their names."""
    return {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}


def copy_published(
    module: nn.Module, found: Mapping[str, Tensor], theirs: Mapping[str, str], unused: str | None
) -> None:
    """Copy ``found[theirs[name]]`` to every name; only what ``unused`` matches may remain.

    Raises:
        ValueError: names or shapes do not fit; the module is left as it was.
    """
    own = module.state_dict()
    known = {*theirs.values()}
    problems = [f"no {name}" for name in theirs.values() if name not in found]
    problems += [
        f"{name}, which has no place" for name in found if name not in known and not (unused and re.match(unused, name))
    ]
    problems += [
        f"{their} {tuple(found[their].shape)} where the network has {tuple(own[name].shape)}"
        for name, their in theirs.items()
        if their in found and found[their].shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"expected published weights of {len(theirs)} tensors, got {len(problems)} that do not fit: "
            f"{', '.join(problems[:6])}{', ...' if len(problems) > 6 else ''}. Build the network with the settings it "
            "was trained with"
        )
    module.load_state_dict({**own, **{name: found[their] for name, their in theirs.items()}})
