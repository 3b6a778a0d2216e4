"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from medrobust.data import ct_organs as dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def ct_organs() -> Path:
    """The real CT exams, prepared in the user's cache: 38 MB are fetched the first time, nothing later."""
    return dataset.prepare()
