"""A training as a whole: checks before it, logs during it, the same curve after an interruption."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import LrScheduleHandler, MeanDice, ValidationHandler, from_engine
from monai.transforms import Compose, RandAdjustContrastd, RandFlipd
from test_training import LOSS, batches, small_net, trainer, vaft_handlers

from medrobust.attacks import PGD, VAFA
from medrobust.schedules import WarmUp
from medrobust.training import CSVLog, EpochSeed, KeepBest, Progress, Resumable, StopOnNaN, check


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def items(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{key: value[0] for key, value in batch.items()} for batch in batches(count, batch=1)]


def test_csv_log_has_means_of_every_term_and_validation_metrics(tmp_path: Path) -> None:
    batch = batches(2)
    network = small_net()
    validator = SupervisedEvaluator(
        torch.device("cpu"),
        batch[:1],
        network,
        key_val_metric={"val_mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
        decollate=False,
        postprocessing=None,
    )
    validator.state.metrics = {}
    seen: list[dict[str, float]] = []
    handlers = [*vaft_handlers(), ValidationHandler(2, validator), CSVLog(tmp_path / "log.csv", validator=validator)]
    engine = trainer(network, batch, handlers, max_epochs=3)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: seen.append({k: v.detach().item() for k, v in e.state.output.items() if k.startswith("loss")}),
    )
    validator.run = lambda *_: validator._fire_event(Events.COMPLETED)  # type: ignore[assignment, method-assign]
    validator.state.metrics = {"val_mean_dice": 0.625, "confusion": torch.zeros(2)}
    engine.run()

    found = rows(tmp_path / "log.csv")
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert [row["iteration"] for row in found] == ["2", "4", "6"]
    assert [row["val_mean_dice"] for row in found] == ["", "0.625", ""]
    for epoch, row in enumerate(found):
        for name in ("loss", "loss_clean", "loss_adv", "loss_fr"):
            assert float(row[name]) == pytest.approx(np.mean([s[name] for s in seen[2 * epoch : 2 * epoch + 2]]))
    assert float(found[0]["lr"]) == 0.1


def test_the_rate_in_the_log_is_the_one_that_the_epoch_was_trained_with(tmp_path: Path) -> None:
    network = small_net()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    handlers = [LrScheduleHandler(schedule, print_lr=False), CSVLog(tmp_path / "log.csv")]
    trainer(network, batches(1), handlers, max_epochs=3, optimizer=optimizer).run()
    assert [float(row["lr"]) for row in rows(tmp_path / "log.csv")] == pytest.approx([0.1, 0.05, 0.025])


def test_shorter_epochs_do_not_end_a_resumed_training(tmp_path: Path) -> None:
    """As with twice the processes: the checkpoint's iterations are more than those of all epochs to come."""
    network = small_net()
    trainer(network, batches(8), [Resumable(tmp_path / "last.pt", network=network)], max_epochs=3).run()
    engine = trainer(network, batches(2), [Resumable(tmp_path / "last.pt", network=network)], max_epochs=5)
    seen: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.epoch))
    with pytest.warns(UserWarning, match="an epoch had 8 iterations in last.pt and has 2 now"):
        engine.run()
    assert seen == [4, 4, 5, 5]


def resumable(folder: Path, epochs: int, until: int | None = None) -> list[dict[str, str]]:
    """A training with every kind of chance, a checkpoint per epoch, and a resumption when there is one."""
    network = small_net()
    network.body[3].p = 0.3
    data_set = Dataset(
        items(), Compose([RandFlipd(["image", "label"], prob=0.5), RandAdjustContrastd("image", prob=0.7)])
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    handlers = [EpochSeed(seed=3), *vaft_handlers(PGD(eps=4 / 255, steps=1)), CSVLog(folder / "log.csv")]
    engine = trainer(
        network, DataLoader(data_set, batch_size=2, shuffle=True), handlers, max_epochs=epochs, optimizer=optimizer
    )
    Resumable(folder / "last.pt", network=network, optimizer=optimizer).attach(engine)
    if until is not None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=2 * until + 1), lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
    engine.run()
    return rows(folder / "log.csv")


def resumable_elsewhere(folder: Path, epochs: int, until: int | None = None) -> int:
    """The training in a process of its own, with one thread: the state of this one must not show in the last digits."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        from pathlib import Path
        from test_training_runs import resumable
        resumable(Path({str(folder)!r}), {epochs}, until={until})
    """)
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def test_a_killed_training_resumes_on_the_same_curve(tmp_path: Path) -> None:
    """Killed in the middle of the third epoch; the rows of the resumed run are those of the uninterrupted one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert resumable_elsewhere(whole, 5) == 0
    assert resumable_elsewhere(killed, 5, until=2) == -signal.SIGKILL
    assert len(rows(killed / "log.csv")) == 2
    assert resumable_elsewhere(killed, 5) == 0
    expected, found = rows(whole / "log.csv"), rows(killed / "log.csv")
    # To rounding, not to the digit: matrix products may depend on where in memory the matrices happen to lie.
    for one, other in zip(expected, found, strict=True):
        assert {name: float(value) for name, value in other.items()} == pytest.approx(
            {name: float(value) for name, value in one.items()}, rel=5e-4
        )
    assert len({row["loss"] for row in expected}) == 5


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    trainer(small_net(), batches(1), [Resumable(path, network=small_net())]).run()
    optimizer = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="belongs to another training"):
        trainer(small_net(), batches(1), [Resumable(path, network=small_net(), optimizer=optimizer)]).run()
    with pytest.raises(ValueError, match=r"expected weights for Conv3d in last\.pt"):
        trainer(small_net(), batches(1), [Resumable(path, network=torch.nn.Conv3d(1, 3, 1))]).run()


@pytest.mark.parametrize(("name", "value"), [("attack", "FGSM()"), ("seed", 1)])
def test_a_training_of_other_settings_is_not_gone_on_with(tmp_path: Path, name: str, value: object) -> None:
    path, settings = tmp_path / "last.pt", {"attack": "PGD()", "seed": 0}
    trainer(small_net(), batches(1), [Resumable(path, settings=settings, network=small_net())]).run()
    other = Resumable(path, settings={**settings, name: value}, network=small_net())
    with pytest.raises(ValueError, match=f"expected {name} .* in last.pt, got .* start anew"):
        trainer(small_net(), batches(1), [other]).run()
    anew = Resumable(path, settings={**settings, name: value}, network=small_net(), resume=False)
    trainer(small_net(), batches(1), [anew]).run()


def validated(network: Any, scores: list[float], folder: Path, epochs: int, patience: int | None) -> Any:
    """A training whose validation gives these scores, one an epoch."""
    validator = SupervisedEvaluator(torch.device("cpu"), batches(1), network)
    left = iter(scores)

    def run(*_: Any) -> None:
        validator.state.metrics = {"robust": next(left)}
        validator._fire_event(Events.COMPLETED)

    validator.run = run  # type: ignore[assignment, method-assign]
    best = KeepBest(folder / "best.pt", network=network, validator=validator, metric="robust", patience=patience)
    handlers = [ValidationHandler(1, validator), best, Resumable(folder / "last.pt", network=network, best=best)]
    engine = trainer(network, batches(1), handlers, max_epochs=epochs)
    engine.run()
    return engine, best


def test_the_best_weights_are_kept_and_patience_ends_the_training(tmp_path: Path) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    network = small_net()
    engine, best = validated(network, [0.2, 0.5, 0.4, 0.5, 0.9], tmp_path, 5, patience=2)
    assert engine.state.epoch == 4
    assert best.state_dict() == {"value": 0.5, "epoch": 2, "since": 2}
    alone = small_net()
    trainer(alone, batches(1), [], max_epochs=2).run()
    kept.append(torch.load(tmp_path / "best.pt", weights_only=True))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(kept[0][name], value)


def test_a_training_that_patience_ended_does_not_go_on(tmp_path: Path) -> None:
    validated(small_net(), [0.5, 0.4, 0.3], tmp_path, 9, patience=2)
    engine, _ = validated(small_net(), [], tmp_path, 9, patience=2)
    assert engine.state.iteration == 3


def test_a_word_is_no_answer_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got 'false': write --resume False"):
        Resumable(tmp_path / "last.pt", resume="false", network=small_net())  # type: ignore[arg-type]


def test_a_resumed_training_still_knows_its_best(tmp_path: Path) -> None:
    validated(small_net(), [0.2, 0.5], tmp_path, 2, patience=None)
    written = (tmp_path / "best.pt").stat().st_mtime_ns
    _, best = validated(small_net(), [0.4, 0.3], tmp_path, 4, patience=None)
    assert best.state_dict() == {"value": 0.5, "epoch": 2, "since": 2}
    assert (tmp_path / "best.pt").stat().st_mtime_ns == written


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    validator = SupervisedEvaluator(torch.device("cpu"), batches(1), small_net())
    best = KeepBest(tmp_path / "best.pt", network=small_net(), validator=validator, metric="robust")
    validator.state.metrics = {"clean": 0.5}
    best.validated()
    engine = trainer(small_net(), batches(1), [])
    with pytest.raises(KeyError, match="'robust' from the validation, got \\['clean'\\]"):
        best(engine)
    validator.state.metrics = {"robust": float("nan")}
    best.validated()
    with pytest.raises(ValueError, match="expected a finite robust"):
        best(engine)


def test_a_nan_loss_stops_with_the_case_named_before_the_weights_move() -> None:
    network = small_net()
    (batch,) = batches(1)
    batch["image"] = MetaTensor(batch["image"].clone(), meta={"filename_or_obj": ["/data/a.nii.gz", "/data/b.nii"]})
    batch["image"][1] = float("nan")
    with pytest.raises(ValueError, match=r"finite loss, got .*nan.* epoch 1, iteration 1, on a, b"):
        trainer(network, [batch], [StopOnNaN()]).run()
    for new, old in zip(network.parameters(), small_net().parameters(), strict=True):
        assert torch.equal(new, old)


def test_what_crafting_meets_has_the_case_s_name_too() -> None:
    (batch,) = batches(1)
    batch["image"] = MetaTensor(batch["image"].clone(), meta={"filename_or_obj": ["/data/a.nii.gz", "/data/b.nii"]})
    batch["image"][1] = float("nan")
    with pytest.raises(ValueError, match=r"finite intensities.* epoch 1, iteration 1, on a, b"):
        trainer(small_net(), [batch], vaft_handlers()).run()


def test_progress_shows_both_losses_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    trainer(small_net(), batches(2), [*vaft_handlers(), Progress()]).run()
    assert capfd.readouterr().err == ""
    for name, value in (("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    trainer(small_net(), batches(2), [*vaft_handlers(), Progress()]).run()
    shown = capfd.readouterr().err
    assert "loss_adv" in shown
    assert "2/2" in shown


def labelled(folder: Path, name: str, values: list[float]) -> dict[str, str]:
    case = {}
    for key, data in (("image", np.zeros((4, 4, 4))), ("label", np.resize(values, (4, 4, 4)))):
        case[key] = str(folder / f"{name}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(data.astype(np.float32), np.eye(4)), case[key])
    return {**case, "patient": name}


def test_a_sound_training_passes_the_check(tmp_path: Path) -> None:
    one, other = labelled(tmp_path, "p1", [0, 1, 2]), labelled(tmp_path, "p2", [0, 2])
    check([one], [other], num_classes=3, attack=VAFA(block_size=(8, 8, 8)), roi_size=(16, 16, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [([0, 3], r"1 labels with others: p2_label.nii.gz \(0 to 3\)"), ([-1, 0], "(-1 to 0)"), ([0, 0.5], "whole")],
)
def test_labels_outside_the_classes_are_named(tmp_path: Path, values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check([labelled(tmp_path, "p1", [0, 1])], [labelled(tmp_path, "p2", values)], num_classes=3)


def test_missing_files_and_shared_patients_are_refused(tmp_path: Path) -> None:
    one = labelled(tmp_path, "p1", [0, 1])
    with pytest.raises(FileNotFoundError, match="gone"):
        check([one], [{"image": str(tmp_path / "gone.nii.gz"), "patient": "p3"}])
    with pytest.raises(ValueError, match="p1"):
        check([one], [{**labelled(tmp_path, "p2", [0]), "patient": "p1"}])


@pytest.mark.parametrize(
    ("attack", "roi_size", "message"),
    [
        (VAFA(steps=0), (8, 8, 8), "at least one step"),
        (WarmUp(attack=VAFA(steps=0), epochs=2, setting="q_max"), (64, 64, 64), "at least one step"),
        (VAFA(block_size=(16, 16, 16)), (32, 32, 8), r"blocks within the training patch \(32, 32, 8\)"),
    ],
)
def test_attacks_that_cannot_train_are_refused(
    tmp_path: Path, attack: Any, roi_size: tuple[int, ...], message: str
) -> None:
    one, other = labelled(tmp_path, "p1", [0]), labelled(tmp_path, "p2", [0])
    with pytest.raises(ValueError, match=message):
        check([one], [other], attack=attack, roi_size=roi_size)


def test_persistent_workers_are_refused() -> None:
    class Loader(list[Any]):
        persistent_workers = True

    with pytest.raises(ValueError, match="without persistent_workers"):
        trainer(small_net(), Loader(batches(1)), [EpochSeed(seed=0)], loss=LOSS).run()
