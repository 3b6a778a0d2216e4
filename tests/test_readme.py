"""The README's examples run as they stand, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from monai.engines import SupervisedEvaluator
from oracles import SmallNet, data

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_two_examples() -> None:
    assert len(BLOCKS) == 2


def test_the_function_example() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    image, image_adv = names["image"], names["image_adv"]
    assert isinstance(image, torch.Tensor)
    assert isinstance(image_adv, torch.Tensor)
    assert image_adv.shape == image.shape
    assert not torch.equal(image_adv, image)


def test_the_handler_example() -> None:
    image, label = data()
    evaluator = SupervisedEvaluator(torch.device("cpu"), [{"image": image, "label": label}], SmallNet())
    exec(BLOCKS[1].replace("PGD(", "PGD(steps=1, "), {"evaluator": evaluator})
    evaluator.run()
    assert evaluator.state.output[0]["image_adv"].shape == image[0].shape


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []
