"""Weights go in whole or not at all, old layouts are named, and a file that could run code is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR
from torch import Tensor, nn

from medrobust.networks.weights import load_weights


def small_unetr(seed: int) -> UNETR:
    """A random UNETR for 16^3 that differs from seed to seed; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNETR(
            1, 2, (16, 16, 16), feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2, proj_type="perceptron"
        )
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def old_layout(network: UNETR) -> dict[str, Tensor]:
    """The same weights as MONAI 0.7 would have saved them, through ``DataParallel``."""
    state = {name: value for name, value in network.state_dict().items() if "norm_cross_attn" not in name}
    state["vit.patch_embedding.cls_token"] = torch.randn(1, 1, 24)
    for block in ("encoder2.blocks.0.1", "encoder2.blocks.1.1", "encoder3.blocks.0.1"):
        state[f"{block}.conv3.conv.weight"] = torch.randn(8, 8, 1, 1, 1)
    return {f"module.{name}": value for name, value in state.items()}


@pytest.fixture(scope="module")
def source() -> UNETR:
    return small_unetr(seed=1)


@pytest.fixture
def image() -> Tensor:
    return torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
def test_every_known_nesting_gives_the_source_network(
    entry: str | None, source: UNETR, image: Tensor, tmp_path: Path
) -> None:
    state = source.state_dict()
    torch.save(state if entry is None else {"epoch": 3, entry: state}, tmp_path / "model.pt")
    network = small_unetr(seed=2)
    report = load_weights(network, tmp_path / "model.pt")
    assert torch.equal(network(image), source(image))
    assert (report.loaded, report.dropped, report.filled) == (len(state), (), ())


def test_monai_0_7_unetr_gives_the_same_output_and_says_what_it_left_out(
    source: UNETR, image: Tensor, tmp_path: Path
) -> None:
    old = old_layout(source)
    torch.save({"epoch": 1, "best_acc": np.float32(0.8), "state_dict": old}, tmp_path / "old.pt")
    network = small_unetr(seed=2)
    report = load_weights(network, tmp_path / "old.pt")
    assert torch.equal(network(image), source(image))
    assert report.loaded == len(old) - 4
    assert len(report.dropped) == 4
    assert "vit.patch_embedding.cls_token" in report.dropped
    assert len(report.filled) == 24
    assert all("norm_cross_attn" in name for name in report.filled)
    assert str(report) == (
        f"{len(old) - 4} tensors from old.pt; old UNETR layout: 4 unused ones dropped, 24 unused ones kept"
    )


def test_the_old_layout_is_a_matter_of_unetr_only(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 3), "cls_token": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"expected weights for Linear in model\.pt, got 1 unexpected \(cls_token\)"):
        load_weights(nn.Linear(3, 2, bias=False), tmp_path / "model.pt")


def test_misfits_are_counted_and_named_and_change_nothing(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2), "9.x": torch.zeros(1)}, tmp_path / "model.pt")
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="expected weights for Sequential") as caught:
        load_weights(network, tmp_path / "model.pt")
    message = str(caught.value)
    assert "4 missing (1.weight, 1.bias, 2.weight, ...)" in message
    assert "1 unexpected (9.x)" in message
    assert "1 of another shape (0.weight (2, 3) where the network has (2, 4))" in message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_key_picks_the_entry(tmp_path: Path) -> None:
    plain, averaged = {"weight": torch.zeros(1, 1)}, {"weight": torch.full((1, 1), 7.0)}
    torch.save({"model": plain, "ema": averaged}, tmp_path / "model.pt")
    network = nn.Linear(1, 1, bias=False)
    load_weights(network, tmp_path / "model.pt", key="ema")
    assert network.weight.item() == 7.0
    with pytest.raises(ValueError, match=r"under 'swa', got a dictionary with model, ema"):
        load_weights(network, tmp_path / "model.pt", key="swa")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_a_file_that_could_run_code_is_refused_unopened(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    torch.save({"weight": torch.zeros(1, 1), "extra": Bomb(mark)}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"in bomb\.pt, got something that could run code"):
        load_weights(nn.Linear(1, 1, bias=False), tmp_path / "bomb.pt")
    assert not mark.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert mark.exists(), "the bomb itself must work, or this test shows nothing"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 half a zip"])
def test_garbage_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.pt")


@pytest.mark.parametrize(("content", "got"), [(torch.zeros(3), "Tensor"), ({}, "nothing"), ({"epoch": 3}, "epoch")])
def test_a_file_without_weights_is_named(content: object, got: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"in model\.pt, got .*{got}"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.pt")
