"""Attacks on segmentation models, 2-D and 3-D: one file each, named after the attack.

``from medrobust.attacks import PGD`` works for every attack and objective and imports only what is asked for.
:func:`names` and :func:`load` find attacks by their file names: that is how the command line and the contract tests
know them, so a new file in this folder is all that a new attack needs.
"""

from __future__ import annotations

if __name__ != "medrobust.attacks":
    raise ImportError(f"import medrobust.attacks, not {__name__}: a second copy of every class would appear")

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

_SUPPORT = ("base", "class_losses", "norms", "objectives", "scores", "step_sizes", "threat", "voxel_losses")
"""Files that hold what attacks share."""


def names() -> list[str]:
    """The public names of all attacks, sorted: ``fgsm``, ``pgd``, ..."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in _SUPPORT)


def load(name: str) -> Any:
    """The class of an attack by its public name; case, ``-`` and ``_`` do not matter (``"vafa-2d"`` is ``VAFA2D``).

    Raises:
        ValueError: there is none of that name.
    """
    for candidate in names():
        if _key(candidate) == _key(name):
            module = import_module(f"{__name__}.{candidate}")
            return next(value for key, value in vars(module).items() if _key(key) == _key(candidate))
    raise ValueError(f"expected an attack among {', '.join(names())}, got {name!r}")


def _key(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not name[0].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for support in ("objectives", "class_losses", "voxel_losses", "scores", "threat", "base"):
        module = import_module(f"{__name__}.{support}")
        if hasattr(module, name):
            return getattr(module, name)
    try:
        return load(name)
    except ValueError as error:
        raise AttributeError(str(error)) from None
