"""Compare settings: a grid of runs, the evaluations of each, and what differs."""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arguments_umae import STUDY, StudyArguments, arguments_of
from umae.data.images import load_images
from umae.files import write_text
from umae.programs import study_jobs
from umae.programs.keywords import keywords
from umae.programs.study_clock import Clock, progress_of
from umae.programs.study_file import DATA, REPORTS, RUNS, Study, Task, read_study
from umae.programs.study_jobs import Job
from umae.progress_bar import progress_bar
from umae.sharing.cards import duration
from umae.sharing.comparison import Group, Result, compare, metrics_of_evaluation, metrics_of_run, summary
from umae.sharing.study_page import markdown, study_figure, study_page
from umae.training.folder import RUN_FILE
from umae.training.signals import StopRequest

RESULTS, TABLE, FIGURE, PAGE, LOCK = "study.json", "study.md", "study.png", "study.html", "study.lock"


@keywords("study")
def study(**given: Any) -> dict[str, Any]:
    """Compare settings: `umae study` from Python, with the same names as keywords.

    Called again with the same arguments, it continues.

    Returns:
        The results, as in `study.json`.

    Raises:
        ValueError: the study, an argument or the images are not valid, or a run or an evaluation has failed.
    """
    return run(*arguments_of(STUDY, given))


def run(args: StudyArguments) -> dict[str, Any]:
    study, notes = without_labels(read_study(args))
    study = with_recorded(study)
    slots = study_jobs.slots(os.environ, args.jobs)
    clock = Clock(study, len(slots))
    missing = [task for task in study.tasks if not task.is_finished]
    print("\n".join([study.title, *notes, clock.plan()]))
    if args.plan:
        return results(args, study, notes)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.output_dir / LOCK, timeout=0), StopRequest() as stop:
            write = partial(write_results, args, study, notes)
            failed = carry_out(study, missing, slots, clock, stop, write)
            content = write()
    except Timeout as error:
        raise ValueError(f"{study.output_dir} is in use by another study; wait for it") from error
    if stop.signal:
        print(f"stopped; the same command continues. What there is so far: {study.output_dir / PAGE}")
        raise SystemExit(128 + stop.signal)
    if failed:
        raise ValueError(f"{len(failed)} of {len(missing)} tasks failed: {', '.join(task.name for task in failed)}")
    print((study.output_dir / TABLE).read_text())
    print(f"{study.output_dir / PAGE}, and all numbers in {study.output_dir / RESULTS}")
    return content


def without_labels(study: Study) -> tuple[Study, list[str]]:
    """The study without the evaluations whose images have no labels, and what to say of that."""
    labelled: dict[str, bool] = {}
    tasks, left_out = [], dict[str, None]()
    for task in study.tasks:
        if task.kind != RUNS:
            name, config_name, split, *columns, _ = data = [task.arguments.get(argument) for argument in DATA]
            key = json.dumps(data)
            if key not in labelled:
                labelled[key] = load_images(str(name), config_name, split or "train", *columns).has_labels
            if not labelled[key]:
                left_out[task.kind] = None
                continue
        tasks.append(task)
    notes = []
    if left_out:
        notes.append(
            f"The images have no labels, so there are no accuracies (left out: {', '.join(left_out)}). Losses, ranks "
            f"and alignment tell the runs apart, but a higher rank alone does not make better features."
        )
    return dataclasses.replace(study, tasks=tasks), notes


def with_recorded(study: Study) -> Study:
    """The study with those runs finished whose folder is not there, but whose results, with those of all their
    evaluations, are in `study.json`.

    Raises:
        ValueError: the file holds other results without a folder, which would be lost.
    """
    file, tasks = study.output_dir / RESULTS, list(study.tasks)
    if not file.exists():
        return study
    try:
        earlier = json.loads(file.read_text())
        commands = {entry["run"]: set(entry["commands"]) for entry in earlier["runs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold the results of a study ({error!r:.80}); move it away") from error
    for run, recorded in commands.items():
        if (study.output_dir / RUNS / run).exists():
            continue
        expected = {command(study, task) for task in tasks if task.run == run}
        if not recorded <= expected:
            other = min(recorded - expected)
            raise ValueError(
                f"{file} holds results of {run} by a command that the study does not have: {other}. Its folder is not "
                f"there, so they would be lost; change the study back, or move the file away"
            )
        if recorded == expected:
            tasks = [dataclasses.replace(task, is_recorded=task.is_recorded or task.run == run) for task in tasks]
    return dataclasses.replace(study, tasks=tasks, earlier=earlier)


def carry_out(
    study: Study,
    missing: Sequence[Task],
    slots: Sequence[Mapping[str, str]],
    clock: Clock,
    stop: StopRequest,
    write: Callable[[], object],
) -> list[Task]:
    """Do what is missing, and show how far it is; the tasks that failed or were left out because of them.

    Args:
        write: called whenever there are new results.
    """
    bar = progress_bar(
        total=len(study.tasks),
        initial=len(study.tasks) - len(missing),
        bar_format="{n}/{total} [{elapsed}{postfix}]",
        miniters=0,  # or tqdm would wait for the next task that ends
    )

    def ended(job: Job, status: int) -> None:
        clock.add(job.task, job.seconds)
        if status == 0:
            bar.write(f"{job.task.name}: finished in {duration(clock.seconds[job.task.name])}")
            bar.update()
            write()
        elif not stop.signal:
            log = study_jobs.log_of(job.task)
            bar.write(f"{job.task.name}: failed, {_last_line(log)} ({log})")

    def watch(running: Collection[Job]) -> None:
        words = [" ".join(filter(None, (job.task.name, progress_of(job.task)))) for job in running]
        bar.set_postfix_str("; ".join([clock.left(), *words]), refresh=False)
        bar.update(0)

    with bar:
        return study_jobs.carry_out(missing, slots, os.environ, stop, ended, watch)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "without a word")


# ----------------------------------------------------------------------------------------------------------------------
# Writing the results


def write_results(args: StudyArguments, study: Study, notes: Sequence[str]) -> dict[str, Any]:
    """Write `study.json`, the table, the figure and the page, as far as there are results."""
    content = results(args, study, notes)
    groups = groups_of(content["runs"], study.baseline)
    write_text(study.output_dir / RESULTS, json.dumps(content, indent=2) + "\n")
    write_text(study.output_dir / TABLE, markdown(groups))
    if figure := study_figure(groups):
        figure.save(study.output_dir / FIGURE)
    write_text(study.output_dir / PAGE, study_page(content, groups, figure))
    return content


def groups_of(runs: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> list[Group]:
    """The runs in `study.json`, by settings."""
    return compare([Result(run["run"], run["settings"], run["seed"], run["values"]) for run in runs], baseline)


def results(args: StudyArguments, study: Study, notes: Sequence[str]) -> dict[str, Any]:
    """What `study.json` holds. No time and no path is in it, so that the same study gives the same file."""
    earlier = {entry["run"]: entry for entry in study.earlier.get("runs", [])}
    runs: list[dict[str, Any]] = []
    for name in study.runs:
        training, *evaluations = [task for task in study.tasks if task.run == name]
        if training.is_finished and not training.is_recorded:
            runs.append(_entry(study, training, [task for task in evaluations if task.is_finished]))
        elif name in earlier:  # also while it is done again
            runs.append(earlier[name])
    finished = sum(task.is_finished for task in study.tasks)
    state = "All runs and evaluations are finished."
    if finished < len(study.tasks):
        state = f"{finished} of {len(study.tasks)} runs and evaluations are finished."
    return {
        "title": study.title,
        "command": f"umae study {Path(args.study).name}",
        "state": state,
        "notes": list(notes),
        "baseline": dict(study.baseline),
        "groups": [summary(group) for group in groups_of(runs, study.baseline)],
        "runs": runs,
        "protocols": _protocols(study),
    }


def _entry(study: Study, training: Task, evaluations: Sequence[Task]) -> dict[str, Any]:
    """What `study.json` holds of a finished run and its finished evaluations."""
    record = json.loads((training.folder / RUN_FILE).read_text())
    values = metrics_of_run(training.folder)
    for task in evaluations:
        values |= metrics_of_evaluation(task.kind, _report(task))
    settings = study.runs[training.run]
    return {
        "run": training.run,
        "settings": {name: value for name, value in settings.items() if name != "seed"},
        "seed": settings["seed"],
        "hardware": record["hardware"],
        "versions": record["versions"],
        "commands": [command(study, task) for task in (training, *evaluations)],
        "values": values,
    }


def _protocols(study: Study) -> dict[str, Any]:
    """By kind of task: of the first that is finished in its folder, or else as it was recorded."""
    protocols: dict[str, Any] = {}
    for task in study.tasks:
        kind = "pretraining" if task.kind == RUNS else task.kind
        if kind in protocols or task.is_recorded or not task.is_finished:
            continue
        if task.kind == RUNS:
            protocol = json.loads((task.folder / RUN_FILE).read_text())["identity"]
        else:
            protocol = _report(task)["protocol"]
        protocols[kind] = {name: protocol[name] for name in protocol if name not in ("seed", "model", "base_model")}
    protocols = study.earlier.get("protocols", {}) | protocols
    return {kind: protocols[kind] for kind in ("pretraining", *study.kinds) if kind in protocols}


def _report(task: Task) -> dict[str, Any]:
    return json.loads((task.folder / REPORTS[task.program]).read_text())


def command(study: Study, task: Task) -> str:
    """As one would type it in the study's folder, with nothing that is only so on one machine: of data sets in
    `data_dir` and of absolute paths the last part."""
    words = []
    for word in task.command_line:
        path = Path(word)
        if path.is_relative_to(study.output_dir):
            word = path.relative_to(study.output_dir).as_posix()
        elif path.is_absolute() or path.parts[:1] == ("..",):
            word = path.name
        words.append(word)
    return " ".join(["umae", *words])
