"""Attacks as Ignite handlers on MONAI's own engines, on patches of volumes and on slices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import AsDiscreted, Compose, EnsureChannelFirstd, LoadImaged
from oracles import SmallNet, VoxelLinear, data
from PIL import Image
from torch import nn

from medrobust.attacks import FGSM, PGD, CrossEntropy, RandomNoise
from medrobust.goals import Erase, MoveBoundary
from medrobust.handlers import CraftAdversarial, RobustEvaluation, SaveAdversarial, SaveMasks, bare
from medrobust.tiles import attack_tiles

EPS = 8 / 255
WORST = FGSM(eps=EPS, objective=CrossEntropy())
"""Reaches the known worst image of ``VoxelLinear``."""


def loader(folder: Path, spatial_dims: int = 3, cases: int = 2, batch_size: int = 2) -> DataLoader:
    """Cases on disk with names and an oblique affine of their own, so that mixed-up metadata shows."""
    image, label = data(spatial_dims, batch=cases, classes=2)
    affine = np.array([[0.9, 0.1, 0, 5], [-0.1, 1.1, 0, -7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])
    items = []
    for i in range(cases):
        item = {}
        for key, volume in (("image", image), ("label", label.float())):
            item[key] = str(folder / f"{key}{i}.nii.gz")
            written = nib.Nifti1Image(volume[i, 0].numpy(), affine)
            written.set_qform(affine, code=1, strip_shears=True)
            written.set_sform(affine, code=4)
            written.header.set_xyzt_units("mm", "sec")
            nib.save(written, item[key])
        items.append(item)
    keys = ["image", "label"]
    transform = Compose([LoadImaged(keys), EnsureChannelFirstd(keys, channel_dim="no_channel")])
    return DataLoader(Dataset(items, transform), batch_size=batch_size, num_workers=0)


def evaluator(batches: Any, network: nn.Module, handlers: list[Any], **settings: Any) -> SupervisedEvaluator:
    return SupervisedEvaluator(torch.device("cpu"), batches, network, val_handlers=handlers, **settings)


def outputs(engine: SupervisedEvaluator) -> list[dict[str, Any]]:
    """Run the engine; every case's output."""
    found: list[dict[str, Any]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: found.extend(e.state.output))
    engine.run()
    return found


def stacked(items: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.stack([item[key].as_tensor() for item in items])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_clean_and_adversarial_metrics_in_one_pass(tmp_path: Path, spatial_dims: int) -> None:
    """The Dice under attack is that of the known worst image."""
    batches = loader(tmp_path, spatial_dims)
    dice = {pred: MeanDice(output_transform=from_engine([pred, "label"])) for pred in ("pred", "pred_adv")}
    engine = evaluator(
        batches,
        VoxelLinear(),
        [RobustEvaluation(WORST)],
        postprocessing=AsDiscreted(keys=["pred", "pred_adv", "label"], argmax=[True, True, False], to_onehot=2),
        key_val_metric={"clean": dice["pred"]},
        additional_metrics={"robust": dice["pred_adv"]},
    )
    engine.run()
    (batch,) = batches
    image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
    pred = VoxelLinear()(VoxelLinear.worst(image, label, EPS)).argmax(1, keepdim=True)
    expected = []
    for k in (0, 1):
        a, b = (pred == k).flatten(1), (label == k).flatten(1)
        expected.append(2 * (a & b).sum(1) / (a.sum(1) + b.sum(1)))
    assert engine.state.metrics["robust"] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert engine.state.metrics["robust"] < engine.state.metrics["clean"]


def test_adversarial_batch_is_new_and_keeps_the_images_metadata(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    engine = evaluator(loader(tmp_path), VoxelLinear(), [])
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda e: given.append(e.state.batch))
    CraftAdversarial(WORST).attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.batch))
    engine.run()
    (before,), (after,) = given, seen
    assert after is not before
    assert "image_clean" not in before
    torch.testing.assert_close(after["image_clean"], before["image"])
    assert isinstance(after["image"], MetaTensor)
    assert [Path(str(f)).name for f in after["image"].meta["filename_or_obj"]] == ["image0.nii.gz", "image1.nii.gz"]
    torch.testing.assert_close(after["image"].affine, before["image"].affine)
    expected = VoxelLinear.worst(before["image"].as_tensor(), before["label"].as_tensor(), EPS)
    torch.testing.assert_close(after["image"].as_tensor(), expected, rtol=0, atol=1e-6)


def test_trainer_learns_from_the_adversarial_image_only(tmp_path: Path) -> None:
    """One step equals a hand-written step on the known worst image; crafting leaves nothing in the gradients."""
    batches = loader(tmp_path)
    network, twin = VoxelLinear(), VoxelLinear()
    loss = nn.CrossEntropyLoss()
    optimizer, own = torch.optim.SGD(network.parameters(), 0.1), torch.optim.SGD(twin.parameters(), 0.1)
    SupervisedTrainer(
        torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=lambda logits, label: loss(logits.as_subclass(torch.Tensor), label.as_tensor()[:, 0].long()),
        train_handlers=[CraftAdversarial(WORST)],
    ).run()
    (batch,) = batches
    image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
    loss(twin(VoxelLinear.worst(image, label, EPS)), label[:, 0].long()).backward()
    own.step()
    assert network.gain.item() == pytest.approx(twin.gain.item(), abs=1e-6)
    assert network.gain.item() != 6.0


def test_crafting_leaves_mode_and_statistics_of_the_trainer_alone(tmp_path: Path) -> None:
    network = SmallNet(classes=2).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    engine = SupervisedTrainer(
        torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader(tmp_path),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.0),
        loss_function=lambda logits, label: logits.sum() * 0,
    )
    CraftAdversarial(PGD(steps=2)).attach(engine)
    seen: list[tuple[bool, bool]] = []

    def look(_engine: Any) -> None:
        same = all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        seen.append((network.training, same))

    engine.add_event_handler(Events.ITERATION_STARTED, look)
    engine.run()
    assert seen == [(True, True)]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluator_inside_no_grad(tmp_path: Path, context: Any) -> None:
    engine = evaluator(loader(tmp_path), VoxelLinear(), [RobustEvaluation(WORST)])
    with context():
        first, *_ = outputs(engine)
    expected = VoxelLinear.worst(first["image"].as_tensor(), first["label"].as_tensor(), EPS)
    torch.testing.assert_close(first["image_adv"].as_tensor(), expected, rtol=0, atol=1e-6)


def test_attacks_through_the_engines_own_inferer(tmp_path: Path) -> None:
    """Sliding window in, sliding window out: the gradient equals that of MONAI's inferer under full autograd."""
    network, attack = SmallNet(classes=2), FGSM(eps=EPS)
    inferer = SlidingWindowInferer((4, 4, 4), sw_batch_size=2, overlap=0.5, mode="gaussian")
    found = outputs(evaluator(loader(tmp_path), network, [RobustEvaluation(attack)], inferer=inferer))
    network.eval()
    image, label = stacked(found, "image"), stacked(found, "label")
    probe = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attack.score(lambda x: inferer(x, network), probe, label).sum(), probe)
    expected = (image + EPS * gradient.sign()).clamp(0, 1)
    # Signs of gradients near zero may round either way.
    assert ((stacked(found, "image_adv") - expected).abs() < 1e-6).float().mean() > 0.999


def test_tiles_are_attacked_one_by_one(tmp_path: Path) -> None:
    network, attack = SmallNet(classes=2), FGSM(eps=EPS)
    inferer = SlidingWindowInferer((8, 8, 8), sw_batch_size=2, overlap=0.5)
    handler = RobustEvaluation(attack, protocol="tiles")
    found = outputs(evaluator(loader(tmp_path), network, [handler], inferer=inferer))
    image, label = stacked(found, "image"), stacked(found, "label")
    expected = image.clone()
    network.eval()
    for x in (0, 1):  # sizes 9, 10, 11 with tiles of 8: the last tile of each axis is pulled back
        for y in (0, 2):
            for z in (0, 3):
                place = (slice(None), slice(None), slice(x, x + 8), slice(y, y + 8), slice(z, z + 8))
                expected[place] = attack(network, image[place], label[place])
    torch.testing.assert_close(stacked(found, "image_adv"), expected, rtol=0, atol=1e-6)


def test_tiles_of_a_volume_smaller_than_a_tile() -> None:
    image, label = data(classes=2, side=6)
    image_adv = attack_tiles(WORST, VoxelLinear(), image, label, (8, 8, 8))
    torch.testing.assert_close(image_adv, VoxelLinear.worst(image, label, EPS), rtol=0, atol=1e-6)


def test_tiles_need_windows(tmp_path: Path) -> None:
    engine = evaluator(loader(tmp_path), VoxelLinear(), [RobustEvaluation(WORST, protocol="tiles")])
    engine.logger.disabled = True
    with pytest.raises(ValueError, match="expected a sliding-window inferer"):
        engine.run()


def test_label_free_needs_no_label(tmp_path: Path) -> None:
    batches = loader(tmp_path, batch_size=1)
    for item in batches.dataset.data:
        del item["label"]
    batches.dataset.transform = Compose([LoadImaged("image"), EnsureChannelFirstd("image", channel_dim="no_channel")])
    engine = evaluator(batches, VoxelLinear(), [RobustEvaluation(WORST, label_free=True)])
    item, *_ = outputs(engine)
    image = item["image"].as_tensor()[None]
    expected = VoxelLinear.worst(image, VoxelLinear()(image).argmax(1, keepdim=True), EPS)
    torch.testing.assert_close(item["image_adv"].as_tensor()[None], expected, rtol=0, atol=1e-6)
    engine = evaluator(batches, VoxelLinear(), [RobustEvaluation(WORST)])
    engine.logger.disabled = True
    with pytest.raises(ValueError, match="label_free=True"):
        engine.run()


def test_targeted_attacks_need_a_target_of_their_own(tmp_path: Path) -> None:
    """The label itself as a target would help the model; another map is what the attacker wants to see."""
    targeted = FGSM(eps=EPS, objective=CrossEntropy(), targeted=True)
    with pytest.raises(ValueError, match="expected target_key"):
        RobustEvaluation(targeted)
    batches = loader(tmp_path, batch_size=1)
    for item in batches.dataset.data:
        item["wanted"] = torch.ones(1, 9, 10, 11)
    item, *_ = outputs(evaluator(batches, VoxelLinear(), [RobustEvaluation(targeted, target_key="wanted")]))
    expected = (item["image"].as_tensor() + EPS).clamp(0, 1)
    torch.testing.assert_close(item["image_adv"].as_tensor(), expected, rtol=0, atol=1e-6)


def test_arguments_of_the_network_travel_along(tmp_path: Path) -> None:
    class Shifted(VoxelLinear):
        def forward(self, image: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
            assert shift is not None
            return super().forward(image) + shift.mean() * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)

    batches = loader(tmp_path, batch_size=1)
    for item in batches.dataset.data:
        item["shift"] = torch.tensor(0.25)
    prepare = PrepareBatchExtraInput({"shift": "shift"})
    engine = evaluator(
        batches, Shifted(), [RobustEvaluation(FGSM(eps=EPS))], prepare_batch=prepare, inferer=SimpleInferer()
    )
    for item in outputs(engine):
        expected = Shifted()(item["image_adv"].as_tensor()[None], torch.tensor(0.25))[0]
        torch.testing.assert_close(item["pred_adv"].as_tensor(), expected)


def test_each_iteration_draws_anew_and_a_second_run_the_same(tmp_path: Path) -> None:
    batches = loader(tmp_path, batch_size=1)

    def run() -> list[torch.Tensor]:
        engine = evaluator(batches, VoxelLinear(), [])
        CraftAdversarial(RandomNoise(eps=EPS), to="image_adv", seed=3).attach(engine)
        found: list[torch.Tensor] = []

        def keep(e: Any) -> None:
            found.append((e.state.batch["image_adv"] - e.state.batch["image"]).as_tensor().sign())

        engine.add_event_handler(Events.ITERATION_STARTED, keep)
        engine.run()
        return found

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_saved_volume_keeps_geometry_codes_units_and_every_bit(tmp_path: Path) -> None:
    handlers = [RobustEvaluation(WORST), SaveAdversarial(tmp_path / "out")]
    found = outputs(evaluator(loader(tmp_path), VoxelLinear(), handlers))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image0_adv.nii.gz", "image1_adv.nii.gz"]
    for i, item in enumerate(found):
        saved, source = nib.load(tmp_path / "out" / f"image{i}_adv.nii.gz"), nib.load(tmp_path / f"image{i}.nii.gz")
        assert saved.get_data_dtype() == np.float32
        np.testing.assert_array_equal(np.asarray(saved.dataobj), item["image_adv"].as_tensor()[0].numpy())
        np.testing.assert_allclose(saved.affine, source.affine, atol=1e-6)
        for key in ("qform_code", "sform_code", "xyzt_units"):
            assert saved.header[key] == source.header[key]
        assert "ADVERSARIAL" in str(saved.header["descrip"])


def test_two_cases_of_one_name_are_both_kept(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    batches, other = (loader(tmp_path / folder, cases=1, batch_size=1) for folder in ("a", "b"))
    batches.dataset.data = [*batches.dataset.data, *other.dataset.data]
    batches = DataLoader(batches.dataset, batch_size=1, num_workers=0)
    handlers = [RobustEvaluation(RandomNoise(eps=EPS)), SaveAdversarial(tmp_path / "out")]
    evaluator(batches, VoxelLinear(), handlers).run()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["image0_2_adv.nii.gz", "image0_adv.nii.gz"]


def test_wrappers_are_taken_off() -> None:
    network = SmallNet()

    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    class HasAChildOfThatName(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    assert bare(nn.DataParallel(Compiled(network))) is network
    other = HasAChildOfThatName(network)
    assert bare(other) is other


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="expected a protocol among"):
        RobustEvaluation(FGSM(), protocol="patches")


def test_a_goal_is_made_from_each_cases_label_and_spacing(tmp_path: Path) -> None:
    """The affine has slices of 2.5 mm: 2 mm around a voxel reach its neighbours in plane, not those above."""
    batches = loader(tmp_path)
    goal = MoveBoundary(class_index=1, mm=2)
    targeted = FGSM(eps=EPS, objective=CrossEntropy(), targeted=True)
    for item in outputs(evaluator(batches, VoxelLinear(), [RobustEvaluation(targeted, goal=goal)])):
        spacing = [float(size) for size in np.linalg.norm(item["image"].affine[:3, :3], axis=0)]
        target = goal(item["label"][None], spacing)[0]
        assert torch.equal(item["target"].as_tensor(), target)
        expected = (item["image"].as_tensor() + EPS * (2 * target - 1)).clamp(0, 1)
        torch.testing.assert_close(item["image_adv"].as_tensor(), expected, rtol=0, atol=1e-6)


def test_a_case_that_lacks_what_the_goal_needs_stays_clean_and_is_named(tmp_path: Path) -> None:
    batches = loader(tmp_path)
    path = batches.dataset.data[1]["label"]
    empty = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(empty.shape, dtype=np.float32), empty.affine), path)
    targeted = FGSM(eps=EPS, objective=CrossEntropy(), targeted=True)
    handler = RobustEvaluation(targeted, goal=Erase(class_index=1))
    with pytest.warns(UserWarning, match=r"impossible in epoch 1, iteration 1, on image1: expected class 1"):
        first, second = outputs(evaluator(batches, VoxelLinear(), [handler]))
    assert torch.equal(second["image_adv"].as_tensor(), second["image"].as_tensor())
    assert not torch.equal(first["image_adv"].as_tensor(), first["image"].as_tensor())
    with pytest.raises(ValueError, match="target_key or goal with a targeted attack"):
        RobustEvaluation(FGSM(eps=EPS), goal=Erase(class_index=1))
    with pytest.raises(ValueError, match="target_key or goal, got both"):
        RobustEvaluation(targeted, goal=Erase(class_index=1), target_key="wanted")


def test_masks_of_like_named_images_do_not_replace_each_other(tmp_path: Path) -> None:
    output = [
        {
            "image": MetaTensor(torch.zeros(3, 2, 2), meta={"filename_or_obj": f"{folder}/frame"}),
            "pred": torch.full((1, 2, 2), float(value)),
        }
        for value, folder in enumerate(("patient1", "patient2"))
    ]
    SaveMasks(tmp_path)(SimpleNamespace(state=SimpleNamespace(output=output)))
    found = {path.name: np.asarray(Image.open(path)).max() for path in tmp_path.iterdir()}
    assert found == {"frame.png": 0, "frame_2.png": 255}
