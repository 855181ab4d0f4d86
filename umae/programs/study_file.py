"""What a study consists of: its YAML file as a list of tasks, each a run or an evaluation of one."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arguments_umae import PRETRAIN, PROGRAMS, STUDIES, StudyArguments, field_names, nearest, read_shipped
from umae.sharing.comparison import WITHOUT_TERM
from umae.training.folder import RUN_FILE

RUNS = "runs"  # the kind of the tasks that pre-train, and the folder of their runs
REPORTS = {"probe": "linear_probe.json", "finetune": "finetune.json"}  # of the programs that evaluate, when finished
KEYS = ("title", "output_dir", "pretrain", "grid", "baseline", "evaluations")
DATA = ("dataset_name", "dataset_config_name", "train_split", "image_column_name", "label_column_name", "heldout")


@dataclass(frozen=True)
class Task:
    """One process: a run, or one evaluation of a run.

    Args:
        kind: RUNS, or the evaluation's name in the study.
        run: name of the run that is trained or evaluated.
        program: one of `arguments_umae.PROGRAMS`.
        arguments: of the program, by name.
        folder: its `output_dir`.
        is_recorded: whether its results are in the study's results file, so that it needs no folder.
    """

    kind: str
    run: str
    program: str
    arguments: Mapping[str, Any]
    folder: Path
    is_recorded: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.run}"

    @property
    def is_finished(self) -> bool:
        if self.is_recorded:
            return True
        if self.kind != RUNS:
            return (self.folder / REPORTS[self.program]).exists()
        record = self.folder / RUN_FILE
        return record.exists() and json.loads(record.read_text())["finished"]

    @property
    def command_line(self) -> list[str]:
        """The words after `umae`."""
        words = [self.program]
        for name, value in {**self.arguments, "output_dir": str(self.folder)}.items():
            words += [] if value is None else [f"--{name}", _as_word(value)]
        return words


@dataclass(frozen=True)
class Study:
    """A grid of runs that differ in some settings, and the evaluations of each.

    Args:
        title: what is studied, in a line.
        runs: by name, the settings that differ among the runs, `seed` among them.
        tasks: every run, and after each its evaluations.
        baseline: the settings of the runs that the others are compared with.
        earlier: what its results file holds, with the results of the tasks that are recorded.
    """

    title: str
    output_dir: Path
    runs: Mapping[str, Mapping[str, Any]]
    tasks: Sequence[Task]
    baseline: Mapping[str, Any]
    earlier: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(task.kind for task in self.tasks))


def read_study(args: StudyArguments) -> Study:
    """The study of a YAML file, as `docs/studies.md` describes them; every task's arguments are checked.

    Raises:
        ValueError: there is no such file, or a key, name or value in it is not valid.
    """
    path, content = read_shipped(args.study, "study", STUDIES)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no names and values; expected {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    output_dir = Path(args.output_dir or content.get("output_dir") or Path("runs", "studies", path.stem))
    base = _mapping(path, "pretrain", content.get("pretrain"))
    if args.dataset_name is not None:
        base |= {"dataset_name": args.dataset_name}
    evaluations = _mapping(path, "evaluations", content.get("evaluations"))
    runs, tasks = dict[str, Mapping[str, Any]](), list[Task]()
    for settings in _expand(path, content.get("grid")):
        arguments = _local_data({**base, **settings}, args.data_dir)
        data, _, training = _checked(f"{path}: pretrain", "pretrain", arguments)
        settings = _in_order({**settings, "seed": training.seed})
        run = ",".join(f"{name}={_in_a_name(value)}" for name, value in settings.items())
        if runs.get(run) == settings:
            continue
        if run in runs:
            raise ValueError(f"{path}: two runs are named {run!r}; the last parts of paths must differ")
        if not set(run) <= _OF_NAMES:
            raise ValueError(f"{path}: a run named {run!r}; values in grid must be numbers, true, false or short words")
        runs[run] = settings
        folder = output_dir / RUNS / run
        tasks.append(Task(RUNS, run, "pretrain", settings | arguments, folder))
        inherited = {name: getattr(data, name) for name in DATA if getattr(data, name) is not None}
        for kind, evaluation in evaluations.items():
            if (task := _evaluation(path, kind, evaluation, settings, inherited, args.data_dir)) is not None:
                program, of_program = task
                of_program |= {"model_name_or_path": str(folder)}
                _checked(f"{path}: {kind}", program, of_program)
                tasks.append(Task(kind, run, program, of_program, output_dir / kind / run))
    baseline = _mapping(path, "baseline", content.get("baseline")) or WITHOUT_TERM
    if not all(baseline.keys() <= settings.keys() for settings in runs.values()) and baseline is not WITHOUT_TERM:
        raise ValueError(f"{path}: baseline names {', '.join(baseline)}; every run of the grid must say what it has")
    return Study(str(content.get("title", path.stem)), output_dir, runs, tasks, baseline)


_OF_NAMES = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_=,.+-")


def _expand(path: Path, grid: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the values in each entry of the grid, one entry after the other."""
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise ValueError(f"{path}: grid must be a list of settings such as `- {{uniformity_weight: [0, 0.01]}}`")
    for entry in grid:
        values = [value if isinstance(value, list) else [value] for value in entry.values()]
        for combination in itertools.product(*values):
            yield dict(zip(entry, combination, strict=True))


def _in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As the programs name them, so that the name of a run does not depend on how the grid is written."""
    return {name: settings[name] for name in field_names(PRETRAIN) if name in settings}


def _evaluation(
    path: Path,
    kind: str,
    evaluation: Any,
    settings: Mapping[str, Any],
    inherited: Mapping[str, Any],
    data_dir: str | None,
) -> tuple[str, dict[str, Any]] | None:
    """Program and arguments of an evaluation, None if it is not for a run of these settings."""
    arguments = _mapping(path, kind, evaluation)
    program, where = arguments.pop("program", "probe"), _mapping(path, f"{kind}: where", arguments.pop("where", None))
    if program not in REPORTS:
        raise ValueError(f"{path}: {kind}: program {program!r}, expected one of {', '.join(REPORTS)}")
    if kind == RUNS or not set(kind) <= _OF_NAMES:
        raise ValueError(f"{path}: an evaluation named {kind!r}; give it another name, of letters and digits")
    for name, values in where.items():
        if settings.get(name) not in (values if isinstance(values, list) else [values]):
            return None
    if "dataset_name" not in arguments:
        known = field_names(PROGRAMS[program][0])
        arguments = {name: value for name, value in inherited.items() if name in known} | arguments
    return program, _local_data(arguments, data_dir)


def _checked(where: str, program: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        return PROGRAMS[program][1]({**arguments, "output_dir": "."})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r:.80}, expected names and values")
    return dict(value or {})


def _local_data(arguments: Mapping[str, Any], data_dir: str | None) -> dict[str, Any]:
    """With the data set in `data_dir`, by its absolute path, if it is there."""
    name = arguments.get("dataset_name")
    local = Path(data_dir) / str(name).rsplit("/", 1)[-1] if data_dir is not None and name is not None else None
    return (
        {**arguments, "dataset_name": str(local.absolute())}
        if local is not None and local.exists()
        else dict(arguments)
    )


def _in_a_name(value: Any) -> str:
    """As in the name of a run, which is a folder: of a path the last part."""
    return "none" if value is None else Path(value).name if isinstance(value, str) else _as_word(value)


def _as_word(value: Any) -> str:
    """As on a command line."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_as_word(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "true" if value else "false"
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if short == str(value) or float(short) == value else str(value)  # never another number
