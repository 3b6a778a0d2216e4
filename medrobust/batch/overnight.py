"""One run of ``medrobust batch``, from its options to its exit code: find, name, lock, do, report."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from medrobust.batch import naming, plan, report
from medrobust.batch.commit import Store, digest_of
from medrobust.batch.discovery import Found, discover
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.locks import BusyError, membership
from medrobust.batch.logs import Log, new_run
from medrobust.batch.night import Night
from medrobust.batch.options import Options
from medrobust.batch.segment import Segmenter, Task
from medrobust.batch.signals import TerminatedError, terminable
from medrobust.batch.workers import Here, Pool, Runner, cores
from medrobust.records import versions

PRELOAD = ("medrobust.batch.segment", "SimpleITK")


def run(options: Options) -> tuple[Mapping[str, Any] | str, Exit]:
    """Do it.

    Returns:
        The summary of OUTPUT, empty where none could be written, or the plan in words of a dry run; the exit code.

    Raises:
        RunError: nothing can be done.
    """
    found = {one.relative: one for one in discover(options.source, options.search)}
    mine = plan.share(found, options.num_parts, options.part_id)
    if not found:
        raise RunError(Exit.NOTHING_FOUND, "no .nii, .nii.gz or DICOM file was found in INPUT")
    recipe = options.recipe
    recipe.check()
    _ = options.writer
    store = Store(options.output)
    if options.dry_run:
        return _plan(options, store, mine), Exit.DONE
    store.prepare()
    secret = naming.secret_of(naming.private_folder(options.output, options.private))
    naming.bind(store.state, secret)
    names = naming.name_all(secret, mine)
    naming.keep_names(options.beside, names)
    settings = _settings(options)
    about = _about(options)
    name = new_run()
    note: dict[str, Any] = {
        **about,
        "run": name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "device": str(recipe.torch_device),
        "part": f"{options.part_id} of {options.num_parts}",
        "cases": len(names),
        "cases_sha256": digest_of(sorted(names)),
        "begin": _now(),
    }
    with membership(store.state, {"bundle": recipe.digest, "settings": settings}):
        _note(store, name, note)
        with Log(store.state / "runs" / f"{name}.jsonl", quiet=options.quiet) as log, terminable():
            log("begin", cases=len(names), part=note["part"], workers=options.workers)
            log.expect(len(names))
            code = Exit.INTERNAL
            try:
                code = _night(options, store, settings, {key: mine[path] for key, path in names.items()}, name, log)
            except KeyboardInterrupt:
                code = Exit.INTERRUPTED
            except TerminatedError:
                code = Exit.TERMINATED
            summary = _report(store, about, log)
            log("end", exit=int(code))
            _note(store, name, {**note, "end": _now(), "exit": int(code)})
    return (summary, code) if summary is not None else ({}, Exit.OUTPUT)


def _plan(options: Options, store: Store, mine: Mapping[str, Found]) -> str:
    known = (options.beside / naming.SECRET).is_file()
    secret = naming.secret_of(options.beside) if known else secrets.token_bytes(16)
    names = naming.name_all(secret, mine)
    needs, states = [], {}
    for key, relative in names.items():
        needs.append(plan.need_of(key, mine[relative], options.recipe, options.policy, options.attacks))
        done, failed = store.done(key, None, check=False), store.failed(key)
        states[key] = "done" if done else "failed" if failed else "to do"
    return plan.told(needs, states, max(options.workers, 1))


def _settings(options: Options) -> str:
    """What else than scan and bundle decides what a case becomes, as a digest."""
    settled: dict[str, Any] = {"attacks": options.attacks.text, "seed": options.seed, "policy": vars(options.policy)}
    return digest_of({**settled, **({"dicom_seg": options.dicom_seg} if options.writer else {})})


def _night(options: Options, store: Store, settings: str, cases: Mapping[str, Found], name: str, log: Log) -> Exit:
    details = options.beside / naming.DETAILS
    segmenter = Segmenter(
        store=store,
        recipe=options.recipe,
        settings=settings,
        policy=options.policy,
        attacks=options.attacks,
        details=details,
        dicom=options.writer,
        threads=max(1, cores() // options.workers) if options.workers else 0,
    )
    tasks = []
    for key, one in cases.items():
        before = (store.done(key, None, check=False), store.failed(key))
        tasks.append(
            Task(
                key=key,
                path=one.path,
                files=one.files,
                label=one.label,
                problem=one.problem,
                seen=tuple(record["attempt"] for record in before if record),
                overwrite=not options.resume,
            )
        )
    runner = _runner(options, segmenter, tasks, name, log)
    night = Night(work=segmenter, runner=runner, log=log, on_error=options.on_error, max_failures=options.max_failures)
    try:
        return night.run(tasks)
    finally:
        runner.close()
        store.sweep()


def _runner(options: Options, segmenter: Segmenter, tasks: list[Task], name: str, log: Log) -> Runner:
    if not (options.scheduler or options.workers):
        return Here(work=segmenter)
    details = options.beside / naming.DETAILS
    limits: dict[str, Any] = {"timeout": options.timeout_per_case or None, "memory": options.largest}
    limits |= {"log": details / "workers.log", "preload": PRELOAD, "workers": options.workers}
    if not options.scheduler:
        return Pool(work=segmenter, **limits)
    from medrobust.batch.cluster import Cluster
    from medrobust.batch.sight import Sight

    sight = Sight(
        recipe=options.recipe,
        store=segmenter.store,
        note=segmenter.store.state / "runs" / f"{name}.json",
        example=tasks[0].path if tasks else None,
        details=details,
    )
    return Cluster(
        work=segmenter, scheduler=options.scheduler, threads=segmenter.threads, view=sight, tell=log, **limits
    )


def _report(store: Store, about: Mapping[str, Any], log: Log) -> dict[str, Any] | None:
    try:
        return report.write(store, about)
    except (OSError, BusyError) as error:
        log("no-report", level="error", reason=type(error).__name__)
        return None


def _about(options: Options) -> dict[str, Any]:
    return {
        "bundle": options.recipe.root.resolve().name,
        "bundle_sha256": options.recipe.digest,
        "weights_sha256": options.recipe.weights_sha256,
        "trusted": options.recipe.trusted,
        "attacks": options.attacks.text,
        "seed": options.seed,
        "geometry": options.policy.geometry,
        "nonfinite": options.policy.nonfinite,
        "modalities": list(options.policy.modalities),
        "versions": versions(),
    }


def _note(store: Store, run: str, note: Mapping[str, Any]) -> None:
    try:
        store.publish(f".state/runs/{run}.json", json.dumps(dict(note), indent=1) + "\n")
    except OSError:
        return  # the cases and the exit code tell that the disk is full


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
