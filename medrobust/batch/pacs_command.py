"""``medrobust pacs``: options, exit codes, signals. What it does is in ``pacs``; heavy imports stay inside."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medrobust.batch.command import batch
from medrobust.batch.signals import TerminatedError, terminable

if TYPE_CHECKING:
    from medrobust.batch.faults import Exit


def pacs(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Orthanc, or with --dicomweb the root of a DICOMweb service.")
    ],
    state: Annotated[Path, typer.Argument(metavar="STATE", help="Folder of what was done. Holds patient data.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Folder of a MONAI bundle.")],
    dicomweb: Annotated[bool, typer.Option("--dicomweb", help="Ask by QIDO-RS instead of following Orthanc.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Do what is there now, and end.")] = False,
    modality: Annotated[
        list[str] | None,
        typer.Option(help="Of the series to segment: CT, MR, PT, or any; default: the bundle's. Repeatable."),
    ] = None,
    dicom_seg: Annotated[str, typer.Option("--dicom-seg", help="Kind of SEG: binary or labelmap.")] = "binary",
    restart: Annotated[
        bool,
        typer.Option("--restart", help="From the first change on; do series again that failed or another bundle did."),
    ] = False,
    poll: Annotated[float, typer.Option(help="Seconds between two questions.", min=0.1)] = 5,
    settle: Annotated[float, typer.Option(help="With --dicomweb: seconds without a new instance.", min=0)] = 60,
    days: Annotated[int, typer.Option(help="With --dicomweb: only studies of so many days; 0: all.", min=0)] = 3,
    credentials: Annotated[
        Path | None, typer.Option(help="netrc file, used instead of MEDROBUST_PACS_USER, _PASSWORD and _TOKEN.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificates (PEM) to trust instead of the system's.")] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow http to another machine: patient data can be read on the way.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte from the archive.", min=0.1)] = 30,
    tries: Annotated[int, typer.Option(help="Of a request that fails in passing.", min=1)] = 5,
    trust_bundle: Annotated[
        bool, typer.Option("--trust-bundle", help="Run the bundle's configuration as the code that it is.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint; default: the bundle's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the bundle's.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: none, without protection.", min=0)] = 1,
    timeout_per_case: Annotated[float, typer.Option(help="Seconds; 0: no limit.", min=0)] = 3600,
    memory: Annotated[str, typer.Option(help="Largest memory of a worker, such as 6G.")] = "",
    attack: Annotated[list[str] | None, typer.Option("--attack", "-a", hidden=True)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
) -> None:
    """Segment each series that arrives in an archive, and store the result there as DICOM SEG. Research only.

    Exit codes: 0 all done; 2 wrong usage, a bundle or credentials that are refused; 3 finished, some series failed;
    5 the archive cannot be reached; 6 STATE cannot be written or is full; 7 STATE is held by another run; 130 and 143
    interrupted. The same command goes on from where it was.
    """
    from medrobust.batch.ending import exit_code
    from medrobust.batch.faults import Exit, RunError

    options: dict[str, Any] = {"trust_bundle": trust_bundle, "weights": weights, "device": device, "workers": workers}
    options |= {"timeout_per_case": timeout_per_case, "memory": memory, "bundle": bundle, "dicom_seg": dicom_seg}

    def work() -> Exit:
        if attack:
            raise RunError(
                Exit.USAGE, "medrobust pacs does not attack: fetch the studies, and use `medrobust batch --attack`"
            )
        if dicom_seg not in ("binary", "labelmap"):
            raise RunError(Exit.USAGE, f"expected --dicom-seg binary or labelmap, got {dicom_seg!r}")
        options["modality"] = _modalities(modality or [], bundle)
        return _run(
            state,
            options,
            connection={
                "url": url,
                "credentials": credentials,
                "authority": ca,
                "plain": plain_http,
                "timeout": timeout,
                "tries": tries,
            },
            asking={"settle": settle, "days": days} if dicomweb else None,
            modalities=tuple(options["modality"]),
            once=once,
            model=_model(options),
            restart=restart,
            poll=poll,
            quiet=quiet,
        )

    raise typer.Exit(int(exit_code(work, "STATE")))


def _run(
    state: Path,
    options: dict[str, Any],
    *,
    connection: dict[str, Any],
    asking: dict[str, Any] | None,
    modalities: tuple[str, ...],
    model: dict[str, Any],
    once: bool,
    restart: bool,
    poll: float,
    quiet: bool,
) -> Exit:
    from medrobust.batch.faults import Exit, RunError
    from medrobust.batch.locks import BusyError, hold
    from medrobust.batch.logs import Log
    from medrobust.batch.pacs_http import AwayError, GoneError, RefusedError, connect

    try:
        from medrobust.batch.pacs import Desk, Memory
        from medrobust.batch.pacs_sources import DicomWeb, Orthanc, Source
    except ImportError:
        raise RunError(Exit.USAGE, "expected highdicom for this command: pip install 'medrobust[dicom]'") from None
    server = connect(**connection)
    source: Source = Orthanc(server=server)
    if asking is not None:
        source = DicomWeb(server=server, modalities=modalities, **asking)
    memory = Memory(state)
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RunError(Exit.OUTPUT, f"STATE cannot be made: {error.strerror}") from None
    if state.stat().st_mode & 0o077:
        raise RunError(Exit.USAGE, "expected a STATE that only its owner may look into (chmod 700), for patient data")
    try:
        with hold(state / "lock"), Log(state / "pacs.jsonl", quiet=quiet) as log, terminable():
            memory.bind(connection["url"])
            memory.prepare()
            if restart:
                memory.move(source.first)
            work = partial(_work, options)
            desk = Desk(source=source, memory=memory, work=work, log=log, modalities=modalities)
            desk.model, desk.again, desk.once = model, restart, once
            log("begin", once=once)
            if not once:
                desk.follow(poll)
            desk.drain()
            while source.waiting:
                time.sleep(poll)
                desk.drain()
            counts: dict[str, Any] = {**desk.counts}
            failed = counts.get("failed", 0) + counts.get("rejected", 0)
            code = Exit.SOME_FAILED if failed else Exit.DONE
            log("end", exit=int(code), **counts)
            return code
    except BusyError:
        raise RunError(Exit.HELD, "STATE is held by another run: wait, or choose another") from None
    except (AwayError, GoneError, RefusedError) as error:
        raise RunError(Exit.INPUT, str(error)) from None


def _work(options: dict[str, Any], inbox: Path, output: Path) -> Exit:
    """The batch, as if its command had been given; its end by a signal is ours."""
    from medrobust.batch.faults import Exit

    try:
        batch(source=inbox, output=output, quiet=True, **options)
    except typer.Exit as end:
        code = Exit(end.exit_code)
        if code == Exit.TERMINATED:
            raise TerminatedError from None
        if code == Exit.INTERRUPTED:
            raise KeyboardInterrupt from None
        return code
    return Exit.DONE


def _modalities(wanted: list[str], bundle: Path) -> list[str]:
    """What was asked for, or what the bundle says it was made for; sorted, each once."""
    from medrobust.batch.faults import Exit, RunError
    from medrobust.batch.nifti import MODALITIES
    from medrobust.batch.recipe import Recipe

    known = f"{', '.join(MODALITIES)} or any"
    if unknown := sorted({*wanted} - {*MODALITIES, "any"}):
        raise RunError(Exit.USAGE, f"expected --modality {known}, got {', '.join(unknown)}")
    found = MODALITIES if "any" in wanted else wanted or [Recipe(root=bundle).modality]
    if not {*found} <= {*MODALITIES}:
        raise RunError(Exit.USAGE, f"expected --modality {known}: the bundle's metadata names none of these")
    return sorted({*found})


def _model(options: dict[str, Any]) -> dict[str, Any]:
    """What decides what a series' SEG becomes."""
    from medrobust.batch.recipe import Recipe

    recipe = Recipe(root=options["bundle"], trusted=options["trust_bundle"], weights=options["weights"])
    recipe.check()
    return {"bundle": recipe.digest, "dicom_seg": options["dicom_seg"], "modalities": options["modality"]}
