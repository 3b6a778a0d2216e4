"""``medrobust batch``: options, exit codes, signals. What it does is in ``night``; heavy imports stay inside."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medrobust.batch.attacked import Attacks
    from medrobust.batch.commit import Store
    from medrobust.batch.dicom_seg import SegWriter
    from medrobust.batch.discovery import Found
    from medrobust.batch.faults import Exit
    from medrobust.batch.nifti import Policy
    from medrobust.batch.recipe import Recipe
    from medrobust.batch.workers import Runner

PRELOAD = ("medrobust.batch.segment", "SimpleITK")


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
    from medrobust.batch.faults import Exit, RunError, fault_of

    try:
        code = _run(**locals())
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, TerminatedError) as error:
        code = Exit.TERMINATED if isinstance(error, TerminatedError) else Exit.INTERRUPTED
        typer.echo("interrupted: the same command goes on from here", err=True)
    except OSError as error:
        if fault_of(error).code not in ("disk-full", "no-access"):
            raise
        typer.echo(f"error: OUTPUT or the folder beside it: {error.strerror}", err=True)
        code = Exit.OUTPUT
    raise typer.Exit(int(code))


class TerminatedError(BaseException):
    """SIGTERM."""


def _run(
    *,
    source: Path,
    output: Path,
    bundle: Path,
    trust_bundle: bool,
    weights: Path | None,
    override: list[str] | None,
    attack: list[str] | None,
    seed: int,
    dry_run: bool,
    resume: bool,
    on_error: str,
    max_failures: int | None,
    timeout_per_case: float,
    memory: str,
    workers: int,
    scheduler: str,
    num_parts: int,
    part_id: int,
    device: str | None,
    layout: str,
    include: list[str] | None,
    exclude: list[str] | None,
    section: str,
    allow_outside_root: bool,
    geometry: str,
    nonfinite: str,
    modality: list[str] | None,
    dicom_seg: str,
    private: Path | None,
    as_json: bool,
    quiet: bool,
    **_: Any,
) -> Exit:
    from medrobust.batch import naming, plan
    from medrobust.batch.commit import Store, digest_of
    from medrobust.batch.discovery import Search, discover
    from medrobust.batch.faults import Exit, RunError
    from medrobust.batch.locks import membership
    from medrobust.batch.logs import Log, new_run

    if scheduler:
        check_scheduler(scheduler, workers)
        # Another machine is in another folder.
        source, output, bundle = source.absolute(), output.absolute(), bundle.absolute()
        weights, private = (path.absolute() if path else None for path in (weights, private))
    if on_error not in ("skip", "stop"):
        raise RunError(Exit.USAGE, f"expected --on-error skip or stop, got {on_error!r}")
    limit = bytes_of(memory)
    plan.check_part(num_parts, part_id)
    policy, attacks, recipe = _settings(
        geometry, nonfinite, modality, attack, seed, bundle, trust_bundle, weights, device, override
    )
    if source.resolve() == output.resolve() or output.resolve() in source.resolve().parents:
        raise RunError(Exit.USAGE, "expected INPUT outside OUTPUT")
    beside = private or output.with_name(output.name + ".private")
    search = Search(
        layout=layout,
        include=include or (),
        exclude=exclude or (),
        aside=(output, beside),
        outside=allow_outside_root,
        section=section,
    )
    found = {one.relative: one for one in discover(source, search)}
    mine = plan.share(found, num_parts, part_id)
    if not found:
        raise RunError(Exit.NOTHING_FOUND, "no .nii, .nii.gz or DICOM file was found in INPUT")
    recipe.check()
    writer = _seg_writer(dicom_seg, beside, recipe)
    store = Store(output)
    if dry_run:
        known = (beside / naming.SECRET).is_file()
        secret = naming.secret_of(beside) if known else secrets.token_bytes(16)
        _tell_plan(store, naming.name_all(secret, mine), mine, recipe, policy, attacks, max(workers, 1))
        return Exit.DONE
    store.prepare()
    beside = naming.private_folder(output, private)
    secret = naming.secret_of(beside)
    naming.bind(store.state, secret)
    names = naming.name_all(secret, mine)
    naming.keep_names(beside, names)
    settled: dict[str, Any] = {"attacks": attacks.text, "seed": seed, "policy": vars(policy)}
    settings = digest_of({**settled, **({"dicom_seg": dicom_seg} if writer else {})})
    about = _about(recipe, attacks, policy)
    run = new_run()
    note: dict[str, Any] = {
        **about,
        "run": run,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "device": str(recipe.torch_device),
        "part": f"{part_id} of {num_parts}",
        "cases": len(names),
        "cases_sha256": digest_of(sorted(names)),
        "begin": _now(),
    }
    with membership(store.state, {"bundle": recipe.digest, "settings": settings}):
        _note(store, run, note)
        with Log(store.state / "runs" / f"{run}.jsonl", quiet=quiet) as log, terminable():
            log("begin", cases=len(names), part=note["part"], workers=workers)
            log.expect(len(names))
            code = Exit.INTERNAL
            try:
                code = _night(
                    store,
                    recipe,
                    settings,
                    policy,
                    attacks,
                    beside,
                    names,
                    mine,
                    log,
                    run=run,
                    scheduler=scheduler,
                    workers=workers,
                    dicom=writer,
                    timeout=timeout_per_case or None,
                    memory=limit,
                    on_error=on_error,
                    max_failures=max_failures,
                    resume=resume,
                )
            except KeyboardInterrupt:
                code = Exit.INTERRUPTED
            except TerminatedError:
                code = Exit.TERMINATED
            summary = _report(store, about, log)
            log("end", exit=int(code))
            _note(store, run, {**note, "end": _now(), "exit": int(code)})
    if summary is None:
        code = Exit.OUTPUT
    _tell(summary or {}, code, as_json=as_json, quiet=quiet)
    return code


def _night(
    store: Store,
    recipe: Recipe,
    settings: str,
    policy: Policy,
    attacks: Attacks,
    beside: Path,
    names: Mapping[str, str],
    found: Mapping[str, Found],
    log: Any,
    *,
    run: str,
    scheduler: str,
    workers: int,
    dicom: SegWriter | None,
    timeout: float | None,
    memory: int | None,
    on_error: str,
    max_failures: int | None,
    resume: bool,
) -> Exit:
    from medrobust.batch import naming
    from medrobust.batch.night import Night
    from medrobust.batch.segment import Segmenter, Task
    from medrobust.batch.workers import Here, Pool, cores

    segmenter = Segmenter(
        store=store,
        recipe=recipe,
        settings=settings,
        policy=policy,
        attacks=attacks,
        details=beside / naming.DETAILS,
        dicom=dicom,
        threads=max(1, cores() // workers) if workers else 0,
    )
    tasks = []
    for key, relative in names.items():
        one = found[relative]
        before = (store.done(key, None, check=False), store.failed(key))
        tasks.append(
            Task(
                key=key,
                path=one.path,
                files=one.files,
                label=one.label,
                problem=one.problem,
                seen=tuple(record["attempt"] for record in before if record),
                overwrite=not resume,
            )
        )
    runner: Runner = Here(work=segmenter)
    limits: dict[str, Any] = {"timeout": timeout, "memory": memory, "preload": PRELOAD}
    limits["log"] = beside / naming.DETAILS / "workers.log"
    if scheduler:
        from medrobust.batch.cluster import Cluster
        from medrobust.batch.sight import Sight

        sight = Sight(
            recipe=recipe,
            store=store,
            note=store.state / "runs" / f"{run}.json",
            example=tasks[0].path if tasks else None,
            details=beside / naming.DETAILS,
        )
        runner = Cluster(
            work=segmenter,
            scheduler=scheduler,
            workers=workers,
            threads=segmenter.threads,
            view=sight,
            tell=log,
            **limits,
        )
    elif workers:
        runner = Pool(work=segmenter, workers=workers, **limits)
    try:
        return Night(work=segmenter, runner=runner, log=log, on_error=on_error, max_failures=max_failures).run(tasks)
    finally:
        runner.close()
        store.sweep()


def check_scheduler(scheduler: str, workers: int) -> None:
    """See that ``--scheduler`` can be meant, without asking it.

    Raises:
        RunError: it cannot, or Dask is missing.
    """
    from medrobust.batch.faults import Exit, RunError

    try:
        from medrobust.batch.cluster import LOCAL
    except ImportError:
        raise RunError(Exit.USAGE, "expected Dask for --scheduler: pip install 'medrobust[cluster]'") from None
    if scheduler == LOCAL and not workers:
        raise RunError(Exit.USAGE, "expected --workers 1 or more with --scheduler local, got 0")
    if scheduler != LOCAL and "://" not in scheduler and not Path(scheduler).is_file():
        known = "local, an address such as tcp://host:8786, or a scheduler file"
        raise RunError(Exit.USAGE, f"expected --scheduler {known}, got {scheduler!r}")


def _settings(
    geometry: str,
    nonfinite: str,
    modality: Sequence[str] | None,
    attack: Sequence[str] | None,
    seed: int,
    bundle: Path,
    trust_bundle: bool,
    weights: Path | None,
    device: str | None,
    override: Sequence[str] | None,
) -> tuple[Policy, Attacks, Recipe]:
    from medrobust.batch.attacked import Attacks
    from medrobust.batch.faults import Exit, RunError
    from medrobust.batch.nifti import MODALITIES, Policy
    from medrobust.batch.recipe import Recipe
    from medrobust.parsing import parse_attacks, parse_overrides

    try:
        named, wishes = parse_attacks(attack or [])
        if wishes:
            raise ValueError(f"expected attacks without a goal here, got {', '.join(wishes)}: use `medrobust evaluate`")
        attacks = Attacks(named=named, seed=seed)
        _ = attacks.text
        recipe = Recipe(
            root=bundle, trusted=trust_bundle, weights=weights, device=device, overrides=parse_overrides(override)
        )
        wanted = modality or [recipe.modality or "any"]
        if unknown := {*wanted} - {*MODALITIES, "any"}:
            raise ValueError(f"expected --modality {', '.join(MODALITIES)} or any, got {', '.join(sorted(unknown))}")
        modalities = () if "any" in wanted else tuple(sorted({*wanted}))
        return Policy(geometry=geometry, nonfinite=nonfinite, modalities=modalities), attacks, recipe
    except (ValueError, TypeError) as error:
        raise RunError(Exit.USAGE, str(error)) from None


def _seg_writer(kind: str, beside: Path, recipe: Recipe) -> SegWriter | None:
    from medrobust.batch.faults import Exit, RunError

    if kind == "none":
        return None
    try:
        from medrobust.batch.dicom_codes import segments_of
        from medrobust.batch.dicom_seg import SegWriter

        segments_of(recipe.root, recipe.class_names)
    except ImportError:
        raise RunError(Exit.USAGE, "expected highdicom for --dicom-seg: pip install 'medrobust[dicom]'") from None
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from None
    return SegWriter(private=beside.absolute(), kind=kind)


def _tell_plan(
    store: Store,
    names: Mapping[str, str],
    found: Mapping[str, Found],
    recipe: Recipe,
    policy: Policy,
    attacks: Attacks,
    workers: int,
) -> None:
    from medrobust.batch import plan

    needs = [plan.need_of(key, found[relative], recipe, policy, attacks) for key, relative in names.items()]
    states = {}
    for key in names:
        done, failed = store.done(key, None, check=False), store.failed(key)
        states[key] = "done" if done else "failed" if failed else "to do"
    typer.echo(plan.told(needs, states, workers))


def _report(store: Store, about: Mapping[str, Any], log: Any) -> dict[str, Any] | None:
    from medrobust.batch import report
    from medrobust.batch.locks import BusyError

    try:
        return report.write(store, about)
    except (OSError, BusyError) as error:
        log("no-report", level="error", reason=type(error).__name__)
        return None


def _tell(summary: Mapping[str, Any], code: Exit, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**summary, "exit": int(code)}))
    elif not quiet:
        counts = ", ".join(f"{count} {status}" for status, count in summary.get("status", {}).items())
        typer.echo(f"{summary.get('cases', 0)} cases in OUTPUT: {counts or 'none'}; see report.html there")


def _about(recipe: Recipe, attacks: Attacks, policy: Policy) -> dict[str, Any]:
    from medrobust.records import versions

    return {
        "bundle": recipe.root.resolve().name,
        "bundle_sha256": recipe.digest,
        "weights_sha256": recipe.weights_sha256,
        "trusted": recipe.trusted,
        "attacks": attacks.text,
        "seed": attacks.seed,
        "geometry": policy.geometry,
        "nonfinite": policy.nonfinite,
        "versions": versions(),
    }


def _note(store: Store, run: str, note: Mapping[str, Any]) -> None:
    try:
        store.publish(f".state/runs/{run}.json", json.dumps(dict(note), indent=1) + "\n")
    except OSError:
        return  # the cases and the exit code tell that the disk is full


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bytes_of(text: str) -> int | None:
    """Bytes from words such as ``6G``; ``None`` from nothing."""
    from medrobust.batch.faults import Exit, RunError

    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise RunError(Exit.USAGE, f"expected --memory such as 800M or 6G, got {text!r}")
    return int(float(match[1]) * (1 << (20 if match[2].upper() == "M" else 30)))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
