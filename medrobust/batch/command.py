"""``medrobust batch``: its options and exit codes. What it does is in ``overnight``; heavy imports stay inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medrobust.batch.faults import Exit


def batch(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder, data list (.json, .csv) or one NIfTI file.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the results; may hold earlier ones.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Folder of a MONAI bundle.")],
    trust_bundle: Annotated[
        bool, typer.Option("--trust-bundle", help="Run the bundle's configuration as the code that it is.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint; default: the bundle's own.")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="Override the configuration: id=value.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", "-a", help="Also attack: 'pgd eps=8/255 steps=40'. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every attack.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it needs; write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--overwrite", help="Keep what is done of the same input, bundle and settings.")
    ] = True,
    on_error: Annotated[str, typer.Option(help="skip a case that fails, or stop.")] = "skip",
    max_failures: Annotated[int | None, typer.Option(help="Stop when more cases than this failed.", min=0)] = None,
    timeout_per_case: Annotated[float, typer.Option(help="Seconds; 0: no limit.", min=0)] = 3600,
    memory: Annotated[str, typer.Option(help="Largest memory of a worker, such as 6G; empty: no limit.")] = "",
    workers: Annotated[int, typer.Option(help="Processes; 0: none, in this one, without protection.", min=0)] = 1,
    scheduler: Annotated[
        str,
        typer.Option(help="Work on a Dask cluster: 'local', an address such as tcp://host:8786, or a scheduler file."),
    ] = "",
    num_parts: Annotated[int, typer.Option(help="Share the cases among so many machines ...")] = 1,
    part_id: Annotated[int, typer.Option(help="... and do this share, from 0.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the bundle's.")] = None,
    layout: Annotated[str, typer.Option(help="auto, tree or bids.")] = "auto",
    include: Annotated[list[str] | None, typer.Option(help="Only paths like this, as in '*/CT_*'. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No paths like this. Repeatable.")] = None,
    section: Annotated[str, typer.Option(help="Section of a JSON data list.")] = "validation",
    allow_outside_root: Annotated[
        bool, typer.Option("--allow-outside-root", help="Follow links and list entries that leave INPUT.")
    ] = False,
    geometry: Annotated[str, typer.Option(help="strict, or lenient with doubtful affines.")] = "strict",
    nonfinite: Annotated[str, typer.Option(help="reject NaN and infinity, or replace them.")] = "reject",
    modality: Annotated[
        list[str] | None,
        typer.Option(help="Of DICOM series: CT, MR, PT, or any; default: what the bundle says it is for. Repeatable."),
    ] = None,
    dicom_seg: Annotated[
        str, typer.Option("--dicom-seg", help="Of DICOM series also a SEG, in the private folder: binary or labelmap.")
    ] = "none",
    private: Annotated[
        Path | None, typer.Option(help="Folder for what holds patient data; default: OUTPUT.private.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary on standard output as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
) -> None:
    """Segment (and attack) every volume of a tree; nothing is lost, every failure is explained.

    Exit codes: 0 all done; 1 a mistake of this program; 2 wrong usage or a bundle that is refused; 3 finished, some
    cases failed; 4 nothing found; 5 INPUT cannot be read; 6 OUTPUT cannot be written or is full; 7 OUTPUT is held by a
    run of other settings; 130 and 143 interrupted. After 3, 6, 7, 130 and 143 the same command goes on.
    """
    options = locals()
    from medrobust.batch.ending import exit_code
    from medrobust.batch.options import Options
    from medrobust.batch.overnight import run

    def work() -> Exit:
        told, code = run(Options(**options))
        if isinstance(told, str):
            typer.echo(told)
        elif as_json:
            typer.echo(json.dumps({**told, "exit": int(code)}))
        elif not quiet:
            counts = ", ".join(f"{count} {status}" for status, count in told.get("status", {}).items())
            typer.echo(f"{told.get('cases', 0)} cases in OUTPUT: {counts or 'none'}; see report.html there")
        return code

    raise typer.Exit(int(exit_code(work, "OUTPUT or the folder beside it")))
