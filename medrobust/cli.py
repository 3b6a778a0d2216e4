"""The command line: ``attack``, ``evaluate``, ``universal``, ``report``, ``status``, ``data``, ``list`` and ``demo``.

Heavy imports stay inside the commands, so that ``--help`` answers at once. Exit codes: 0 all went well, 1 some case
failed (the others are there), 2 wrong input.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from medrobust.batch.command import batch
from medrobust.batch.faults import RunError
from medrobust.batch.pacs_command import pacs

if TYPE_CHECKING:
    from medrobust.batch.evaluating import Crew
    from medrobust.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Attack medical image segmentation models, measure what breaks, write the report.",
)
out = Console()
err = Console(stderr=True)

BundleArg = Annotated[
    Path, typer.Option("--bundle", "-b", help="Folder of a MONAI bundle. It is code: trust it first.")
]
OutputArg = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")]
AttackArg = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        "-a",
        help="Such as 'pgd eps=8/255 steps=40', 'pgd goal=erase:liver' or 'sea eps=8/255 budget=fast'. May be "
        "repeated. See `medrobust list`.",
    ),
]
WeightsArg = Annotated[Path | None, typer.Option(help="Checkpoint; default: the bundle's own.")]
SplitArg = Annotated[str, typer.Option(help="Cases of the bundle: validation or training.")]
ListArg = Annotated[Path | None, typer.Option(help="Data list (Decathlon JSON) instead of the bundle's cases.")]
SectionArg = Annotated[str, typer.Option(help="Section of the data list.")]
ImageArg = Annotated[Path | None, typer.Option(help="One image instead of the bundle's cases.")]
LabelArg = Annotated[Path | None, typer.Option(help="Its label; without one the model's own prediction is attacked.")]
OverlayArg = Annotated[
    list[Path] | None, typer.Option("--overlay", help="Configuration file on top of the bundle's. Repeat for several.")
]
EpsArg = Annotated[str | None, typer.Option(help="Sizes for every attack with an eps: '1/255,2/255,4/255,8/255'.")]
PromptsArg = Annotated[
    str | None, typer.Option(help="Also each case under these of its prompts, on the clean image: 'synonym,typo,p0'.")
]
StoredArg = Annotated[
    str | None, typer.Option(help="Also each attacked picture after storing it: 'png,jpeg75'. For 2-D images.")
]
SetArg = Annotated[list[str] | None, typer.Option("--set", help="Override the bundle's configuration: id=value.")]
SeedArg = Annotated[int, typer.Option(help="Seed of every attack.")]
ProtocolArg = Annotated[
    str,
    typer.Option(
        help="whole (through the inferer, what is deployed), tiles, both, or prompts (whole, and all prompts at once)."
    ),
]
SoundnessArg = Annotated[
    str,
    typer.Option(
        help="Checklist of the evaluation itself: quick, full, off, or auto: quick where it takes at most ten minutes."
    ),
]
MinimumArg = Annotated[
    list[str] | None,
    typer.Option("--minimum-eps", help="Search each case's smallest eps of this attack: 'pgd steps=20'. Repeatable."),
]
BelowArg = Annotated[float, typer.Option(help="With --minimum-eps: a case is broken when it scores less than this.")]
MostArg = Annotated[str | None, typer.Option(help="With --minimum-eps: the largest eps tried, 32/255 unless given.")]
BrokenByArg = Annotated[
    str,
    typer.Option(help="With --minimum-eps: what --below judges: dice, or recall, the foreground's voxels still found."),
]
PerStructureArg = Annotated[
    bool, typer.Option("--per-structure", help="With --minimum-eps: also search for each structure alone.")
]
TransferArg = Annotated[
    list[str] | None,
    typer.Option(
        "--transfer", help="Also make the attacks on another network: NAME=BUNDLE, or NAME=WEIGHTS. Repeatable."
    ),
]
RegionArg = Annotated[
    str | None, typer.Option(help="Attack only there: body, label (all structures), or names of structures.")
]
WorkersArg = Annotated[int, typer.Option(help="Processes that do cases; 0: this one does them.", min=0)]
TimeoutArg = Annotated[float, typer.Option(help="With --workers: seconds for a case; 0: no limit.", min=0)]
MemoryArg = Annotated[str, typer.Option(help="With --workers: largest memory of each, such as 6G.")]
PartsArg = Annotated[int, typer.Option(help="Share the cases among so many runs (on one OUTPUT, or several) ...")]
PartArg = Annotated[int, typer.Option(help="... and do this share, from 0.")]
LabelFreeArg = Annotated[bool, typer.Option("--label-free", help="Attack the model's own prediction, not the label.")]


@app.command()
def attack(
    bundle: BundleArg,
    output: OutputArg,
    attack: AttackArg = None,
    weights: WeightsArg = None,
    split: SplitArg = "validation",
    data_list: ListArg = None,
    section: SectionArg = "validation",
    image: ImageArg = None,
    label: LabelArg = None,
    override: SetArg = None,
    overlay: OverlayArg = None,
    eps: EpsArg = None,
    seed: SeedArg = 0,
    protocol: ProtocolArg = "whole",
    label_free: LabelFreeArg = False,
    region: RegionArg = None,
    workers: WorkersArg = 0,
    timeout_per_case: TimeoutArg = 0,
    memory: MemoryArg = "",
    num_parts: PartsArg = 1,
    part_id: PartArg = 0,
) -> None:
    """Craft adversarial volumes and their records; no report."""
    with told():
        run = _evaluate({**locals(), "pictures": False}, soundness=None)
        out.print(f"volumes and records: {output}", highlight=False, soft_wrap=True)
        if run.failures:
            raise typer.Exit(1)


@app.command()
def evaluate(
    bundle: BundleArg,
    output: OutputArg,
    attack: AttackArg = None,
    weights: WeightsArg = None,
    split: SplitArg = "validation",
    data_list: ListArg = None,
    section: SectionArg = "validation",
    image: ImageArg = None,
    label: LabelArg = None,
    override: SetArg = None,
    overlay: OverlayArg = None,
    eps: EpsArg = None,
    seed: SeedArg = 0,
    protocol: ProtocolArg = "whole",
    label_free: LabelFreeArg = False,
    prompts: PromptsArg = None,
    stored: StoredArg = None,
    saved: Annotated[Path | None, typer.Option(help="`volumes` folder of an earlier run, evaluated again.")] = None,
    pictures: Annotated[bool, typer.Option(help="One picture per case and attack.")] = True,
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS; needs the extra medrobust[lpips].")] = False,
    soundness: SoundnessArg = "auto",
    minimum_eps: MinimumArg = None,
    below: BelowArg = 0.5,
    most: MostArg = None,
    broken_by: BrokenByArg = "dice",
    per_structure: PerStructureArg = False,
    transfer: TransferArg = None,
    region: RegionArg = None,
    workers: WorkersArg = 0,
    timeout_per_case: TimeoutArg = 0,
    memory: MemoryArg = "",
    num_parts: PartsArg = 1,
    part_id: PartArg = 0,
    note: Annotated[list[str] | None, typer.Option(help="A line for the report's notes.")] = None,
) -> None:
    """Measure clean and under attack, keep the adversarial volumes, write the report."""
    with told():
        words = {key: value for key, value in locals().items() if key not in ("note", "soundness")}
        from medrobust.batch.evaluating import joining

        run = _evaluate(words, soundness)
        if num_parts > 1 and not run.failures and not run.records_path.is_file():
            out.print("no case falls to this share")
            return
        with joining(run.folder) if num_parts > 1 else contextlib.nullcontext():
            _report([run.records_path], run.folder, note or [])


@app.command()
def universal(
    bundle: BundleArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the perturbation, such as universal.pt.")],
    eps: Annotated[str, typer.Option(help="Largest change of a voxel.")] = "8/255",
    size: Annotated[str, typer.Option(help="Its own size, as in 128,128; images of other sizes get it resized.")] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the cases.")] = 10,
    weights: WeightsArg = None,
    split: Annotated[str, typer.Option(help="Cases it is made from: training or validation.")] = "training",
    override: SetArg = None,
    overlay: OverlayArg = None,
    seed: SeedArg = 0,
) -> None:
    """Make one perturbation for all images; evaluate it with --attack 'universal file=FILE'."""
    with told():
        import torch

        from medrobust import universal as making
        from medrobust.bundle import Bundle
        from medrobust.parsing import parse_overrides, parse_value

        opened = Bundle(root=bundle, overrides=parse_overrides(override), weights=weights, overlays=overlay or [])
        cases = making.read(opened, opened.cases(split))
        sides = parse_value(size) if size else tuple(cases[0].image.shape[2:])
        delta = making.fit(
            cases,
            sides,
            eps=float(parse_value(eps)),
            epochs=epochs,
            generator=torch.Generator().manual_seed(seed),
            progress=lambda epoch, score: out.print(f"epoch {epoch + 1}: mean objective {score:.4f}", highlight=False),
        )
        making.save(delta, output, eps=float(parse_value(eps)))
        out.print(f"perturbation: {output}", highlight=False, soft_wrap=True)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="records.csv, or the folder of a run; several: side by side.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: beside the records.")] = None,
    note: Annotated[list[str] | None, typer.Option(help="A line for the report's notes.")] = None,
) -> None:
    """Write report.html and report.md from records (and pictures, where a run has them)."""
    with told():
        paths = [path / "records.csv" if path.is_dir() else path for path in records]
        if len(paths) > 1 and output is None:
            raise ValueError("expected --output for the report of several runs, got none")
        _report(paths, output or paths[0].parent, note or [])


@app.command()
def data(
    folder: Annotated[Path | None, typer.Option(help="Where to put it; default: the user's cache.")] = None,
) -> None:
    """Fetch the real CT and MR exams (38 MB, once) and prepare them."""
    with told():
        from medrobust.data import ct_organs

        with out.status("fetching and preparing two CT exams and one MR exam"):
            found = ct_organs.prepare(folder)
        out.print(f"ready in {found}")


@app.command("list")
def list_() -> None:
    """Name the attacks with their settings, and the metrics."""
    with told():
        from rich.table import Table

        from medrobust import attacks, metrics

        table = Table("attack", "what it is", "settings", title="attacks: --attack 'NAME setting=value ...'")
        for name in attacks.names():
            instance = attacks.load(name)()
            settings = repr(instance).partition("(")[2].removesuffix(")")
            table.add_row(name, (type(instance).__doc__ or "").splitlines()[0], settings)
        out.print(table)
        found = Table("metric", "unit", "ideal", title="metrics")
        for name in metrics.names():
            about = metrics.about(name)
            found.add_row(name, about.unit, f"{about.ideal:g}")
        out.print(found)


@app.command()
def demo(
    output: OutputArg = Path("demo_output"),
    bundle: BundleArg = Path("bundles/ct_organs_unetr"),
) -> None:
    """Attack a trained UNETR on a real CT exam (and its hardened twin): table, adversarial volumes, report."""
    with told():
        from medrobust.data import ct_organs

        if not (bundle / "configs").is_dir():
            raise FileNotFoundError(f"expected the bundle in {bundle}, got no such folder: run in the project's root")
        with out.status("fetching the CT exams (38 MB, once)"):
            ct_organs.prepare()
        _clear_demo(output)
        strong = ["pgd eps=8/255 steps=20", "vafa q_max=20 block_size=32,32,16"]
        attacks = [
            "gaussian_noise std=8/255",
            "fgsm eps=8/255",
            "bim eps=8/255",
            strong[0],
            "vafa2d q_max=20",
            strong[1],
        ]
        from medrobust.preparing import prepare

        run, cases = prepare(bundle=bundle, output=output, attack=attacks, protocol="both", purpose=DEMO)
        runs = [(run, cases)]
        hardened = bundle / "models" / f"{HARDENED}.pt"
        notes = [
            "Trained on one CT exam (CT A), evaluated on another (CT B: contrast agent, arms down).",
            "The reference masks come from TotalSegmentator, not from a human: Dice is agreement with that model.",
        ]
        if hardened.is_file():
            fewer = ["fgsm eps=8/255", *strong]
            runs.append(prepare(bundle=bundle, output=output / HARDENED, attack=fewer, weights=hardened, purpose=DEMO))
            notes.append(f"model.pt was trained on clean images; {HARDENED}.pt goes on from it with VAFT.")
        for one, its_cases in runs:
            _go(one, its_cases)
        _report([one.records_path for one, _ in runs], run.folder, notes)


@app.command()
def status(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the results of `medrobust batch`.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """How far the runs of `medrobust batch` on an OUTPUT are: what is done, at work and left, and what it will take."""
    with told():
        from medrobust.batch import status as asked

        found = asked.status_of(output)
        out.print(json.dumps(found) if as_json else asked.told(found), highlight=False, markup=False, soft_wrap=True)


app.command()(batch)
app.command()(pacs)


def main() -> None:
    """Entry point of the ``medrobust`` command."""
    app()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Wrong input ends in one line and exit code 2; our own mistakes keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RunError) as error:
        from medrobust.run import reason

        err.print(f"[bold red]error:[/] {_escape(reason(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _evaluate(words: dict[str, Any], soundness: str | None) -> Run:
    """The run of ``attack`` and ``evaluate``, from all their options; without ``soundness`` there is no checklist."""
    from medrobust.batch.evaluating import Crew
    from medrobust.batch.options import bytes_of
    from medrobust.batch.plan import check_part
    from medrobust.preparing import prepare

    own = {key: words.pop(key) for key in ("workers", "timeout_per_case", "memory", "num_parts", "part_id")}
    check_part(own["num_parts"], own["part_id"])
    crew = Crew(
        workers=own["workers"],
        timeout=own["timeout_per_case"] or None,
        memory=bytes_of(own["memory"]),
        number=own["num_parts"],
        part=own["part_id"],
    )
    if (crew.timeout or crew.memory) and not crew.workers:
        raise ValueError("expected --workers with --timeout-per-case and --memory: only another process can be ended")
    make = partial(prepare, **words)
    run, cases = make()
    check = _plan(run, cases, soundness if crew.part == 0 else "off") if soundness else lambda: None
    if crew.alone:
        _go(run, cases)
    else:
        _share(make, run, cases, crew)
    check()
    return run


def _plan(run: Run, cases: Sequence[Mapping[str, Any]], soundness: str) -> Callable[[], None]:
    """Say how long the run will take where that is long; returns the check of its soundness, to be run after it."""
    from medrobust import preflight

    asked = preflight.strongest(run.conditions)
    mode, why_not = preflight.plan(asked, soundness, 0.0)
    opened = None
    if mode or preflight.is_long(run.conditions):
        opened = preflight.first_case(run, cases)
    if opened is not None:
        one = preflight.one_gradient(run.conditions, opened)
        for line in preflight.estimates(run.conditions, one, len(cases)):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    if mode:
        mode, why_not = preflight.plan(asked, soundness, one if opened else None)

    def check() -> None:
        with out.status("checking the evaluation itself"):
            preflight.check(run, asked, opened, mode, why_not)

    return check


def _go(run: Run, cases: Sequence[Mapping[str, Any]]) -> None:
    """Evaluate with a progress bar; failed cases are named at the end and turn the exit code to 1 later."""
    from medrobust.run import case_names

    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns.append(TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting", total=len(case_names(cases)) * len(run.conditions))

        def progress(case: str, what: str) -> None:
            bar.update(task, description=f"{case}: {what}")
            if what != "reading":
                bar.advance(task)
            if not out.is_terminal:
                out.print(f"{case}: {what}", highlight=False, markup=False)

        run.evaluate(cases, progress)
    _tell_failures(run)


def _share(make: Callable[[], Any], run: Run, cases: Sequence[Mapping[str, Any]], crew: Crew) -> None:
    """Evaluate on workers, or one share of the cases, with a bar that counts cases."""
    from medrobust.batch.evaluating import evaluate

    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns.append(TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def log(event: str, *, level: str = "info", advance: bool = False, **content: Any) -> None:
            words = f"{content.get('case', '')}: {content.get('stage', event) if event == 'stage' else event}"
            bar.update(task, description=words, advance=1 if advance else 0)
            if level == "warning" or not out.is_terminal:
                out.print(f"{words} {content.get('reason', '')}".rstrip(), highlight=False, markup=False)

        evaluate(make, run, cases, crew, log, expect=lambda count: bar.update(task, total=count))
    _tell_failures(run)


def _tell_failures(run: Run) -> None:
    for case, why in run.failures.items():
        err.print(f"[yellow]case {_escape(case)} failed:[/] {_escape(why)}", highlight=False, soft_wrap=True)


def _report(paths: Sequence[Path], target: Path, notes: Sequence[str]) -> None:
    """Write the report of runs' records; exit with 1 where cases failed."""
    from rich.markdown import Markdown

    from medrobust.atomic import write_text
    from medrobust.records import read_csv
    from medrobust.report import Picture, caption, html, markdown
    from medrobust.run_tables import read_failures

    failures = [item for path in paths for item in read_failures(path.parent).items()]
    from medrobust.findings import FILE, Checked, read

    missing = [path for path in paths if not path.is_file()]
    if missing and len(paths) == 1 and failures:
        raise typer.Exit(1)
    if missing:
        raise FileNotFoundError(f"expected records in {missing[0]}, got none: run `medrobust evaluate` first")
    records = [record for path in paths for record in read_csv(path)]
    notes = [*notes, *(f"Case {case} failed; what it lacks is in no number: {why}" for case, why in failures)]
    pictures: list[Picture] = []
    for path in paths:
        files = sorted((path.parent / "pictures").glob("*.png"), key=lambda picture: picture.stat().st_mtime_ns)
        model = read_csv(path)[0].model if len(paths) > 1 else ""
        pictures += [(f"{caption(picture)}, {model}", picture.read_bytes()) if model else picture for picture in files]
    checks = []
    for path in paths:
        if (found := read(path.parent / FILE)) is None:
            found = Checked(model=read_csv(path)[0].model, why_not="it was not asked for")
        checks.append(found)
    summary = markdown(records, notes=notes, checks=checks)
    write_text(target / "report.md", summary)
    write_text(target / "report.html", html(records, pictures, notes=notes, checks=checks))
    out.print(Markdown(summary))
    out.print(f"\nreport: {target / 'report.html'}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


DEMO = "demo"
HARDENED = "vaft"
"""The demo's second weights, and the folder of their run."""


def _clear_demo(folder: Path) -> None:
    """Make room for a new demo; anything that is not a demo's is left alone.

    Raises:
        ValueError: the folder holds something else.
    """
    import json
    import shutil

    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / "run.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["shared"].get("purpose") != DEMO:
        raise ValueError(f"expected a new folder or that of an earlier demo, got {folder}: choose another --output")
    for name in (
        "run.json",
        "records.csv",
        "failures.csv",
        "prompts.csv",
        "soundness.json",
        "report.html",
        "report.md",
    ):
        (folder / name).unlink(missing_ok=True)
    for name in ("volumes", "pictures", HARDENED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
