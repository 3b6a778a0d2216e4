"""medrobust: attack, harden and certify medical image segmentation models inside the MONAI ecosystem.

This module holds the version and nothing else: importing it imports no room. In a checkout the rooms ``attacks``,
``networks`` and ``transforms`` lie beside this folder and are found through ``__path__``; an installed wheel has them
inside and the lines below add nothing.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "attacks" / "__init__.py").is_file():
    __path__.append(str(_root))
