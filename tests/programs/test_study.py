"""Studies: their files, their processes side by side, and their results."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import processes
import pytest
from PIL import Image

from arguments_umae import StudyArguments
from umae.programs import study, study_clock, study_jobs
from umae.programs.study_clock import Clock
from umae.programs.study_file import read_study
from umae.training.signals import StopRequest

STUDY = """
title: Two weights
pretrain: {dataset_name: digits, recipe: digits, max_train_steps: 1, eval_steps: 1}
grid:
  - uniformity_weight: [0, 0.1]
evaluations:
  linear: {}
"""


def arguments(folder: Path, text: str = STUDY, **given) -> StudyArguments:
    file = folder / "two_weights.yaml"
    file.write_text(text)
    return StudyArguments(**{"study": str(file), "output_dir": str(folder / "out"), **given})


@pytest.fixture
def forked(monkeypatch):
    """The programs as other processes, from this suite's fork servers rather than started by Python."""
    script = str(processes.ROOT / "command_line_umae.py")

    def start(words, environ, log):
        return processes.start(script, *words, stdout=log)

    monkeypatch.setattr(study_jobs, "start_process", start)


# ----------------------------------------------------------------------------------------------------------------------
# The file


def test_the_grid_is_every_combination_and_equal_runs_are_one(tmp_path):
    text = """
    pretrain: {dataset_name: digits, recipe: digits}
    grid:
      - {uniformity_weight: [0, 0.01], seed: [0, 1]}
      - {seed: 1, pooling: mean, uniformity_weight: 0.1}
      - {uniformity_weight: 0.01}
    """
    names = list(read_study(arguments(tmp_path, text)).runs)
    assert names == [
        "uniformity_weight=0,seed=0",
        "uniformity_weight=0,seed=1",
        "uniformity_weight=0.01,seed=0",
        "uniformity_weight=0.01,seed=1",
        "uniformity_weight=0.1,pooling=mean,seed=1",
    ]


@pytest.mark.parametrize("path", sorted((processes.ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_has_runs_to_compare_with_its_baseline(path):
    shipped = read_study(StudyArguments(study=path.stem, dataset_name="digits"))
    ((name, value),) = shipped.baseline.items()
    values = [settings[name] for settings in shipped.runs.values()]
    assert value in values and len(set(values)) > 1
    assert {task.kind for task in shipped.tasks} > {"runs"}


def test_runs_from_weights_and_from_scratch_are_told_apart_by_names_and_command_lines(tmp_path):
    text = """
    pretrain: {dataset_name: digits, recipe: digits}
    grid: [{model_name_or_path: [null, some/where/weights]}]
    baseline: {model_name_or_path: null}
    """
    read = read_study(arguments(tmp_path, text))
    scratch, weights = read.tasks
    assert list(read.runs) == ["model_name_or_path=none,seed=0", "model_name_or_path=weights,seed=0"]
    assert "--model_name_or_path" not in scratch.command_line and "some/where/weights" in weights.command_line
    assert read.baseline == {"model_name_or_path": None}
    with pytest.raises(ValueError, match=r"two runs are named .*the last parts of paths must differ"):
        read_study(arguments(tmp_path, text.replace("null, some", "other/weights, some")))
    with pytest.raises(ValueError, match="baseline names seeds; every run of the grid must say what it has"):
        read_study(arguments(tmp_path, text.replace("baseline: {model_name_or_path: null}", "baseline: {seeds: 1}")))


def test_an_evaluation_has_the_images_of_its_run_unless_it_names_others(tmp_path):
    text = """
    pretrain: {dataset_name: some/images, train_split: "train[:50%]", image_column_name: img, recipe: digits}
    grid: [{uniformity_weight: [0, 0.1]}]
    evaluations:
      linear: {attentive: true}
      elsewhere: {dataset_name: other/images, where: {uniformity_weight: 0.1}}
      finetuned: {program: finetune, where: {uniformity_weight: [0, 1]}}
    """
    tasks = {task.name: task for task in read_study(arguments(tmp_path, text)).tasks}
    assert list(tasks) == [
        "runs/uniformity_weight=0,seed=0",
        "linear/uniformity_weight=0,seed=0",
        "finetuned/uniformity_weight=0,seed=0",
        "runs/uniformity_weight=0.1,seed=0",
        "linear/uniformity_weight=0.1,seed=0",
        "elsewhere/uniformity_weight=0.1,seed=0",
    ]
    run, linear, elsewhere = (tasks[f"{kind}/uniformity_weight=0.1,seed=0"] for kind in ("runs", "linear", "elsewhere"))
    assert linear.arguments == {
        "dataset_name": "some/images",
        "train_split": "train[:50%]",
        "image_column_name": "img",
        "attentive": True,
        "model_name_or_path": str(run.folder),
    }
    assert elsewhere.arguments == {"dataset_name": "other/images", "model_name_or_path": str(run.folder)}


def test_a_number_reaches_its_program_as_it_is(tmp_path):
    text = "pretrain: {recipe: digits, base_learning_rate: 0.0012345678}\n"
    text += "grid: [{uniformity_weight: [0.1234567890, 1.0e-3]}]"
    for task, weight in zip(read_study(arguments(tmp_path, text)).tasks, (0.1234567890, 1e-3), strict=True):
        words = dict(zip(task.command_line[1::2], task.command_line[2::2], strict=True))
        assert float(words["--base_learning_rate"]) == 0.0012345678
        assert float(words["--uniformity_weight"]) == weight


def test_data_sets_are_taken_from_data_dir_by_the_last_part_of_their_names(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    text = """
    pretrain: {dataset_name: some/images, recipe: digits}
    grid: [{seed: 0}]
    evaluations: {elsewhere: {dataset_name: other/birds}}
    """
    run, elsewhere = read_study(arguments(tmp_path, text, data_dir=str(tmp_path / "data"))).tasks
    assert run.arguments["dataset_name"] == str(tmp_path / "data" / "images")
    assert elsewhere.arguments["dataset_name"] == "other/birds"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds no names and values"),
        ("grids: []", "unknown key 'grids'; did you mean grid?"),
        ("pretrain: {recipe: digits}", "grid must be a list"),
        ("grid: [{mask_ration: 0.5}]", "pretrain: unknown argument mask_ration; did you mean mask_ratio"),
        ("grid: [{uniformity_weight: [0, high]}]", "uniformity_weight is 'high', expected a number"),
        ("grid: [{dataset_name: some images}]", "a run named 'dataset_name=some images"),
        ("grid: [{seed: 0}]\nevaluations: {linear: {protocoll: mae}}", "linear: unknown argument protocoll"),
        ("grid: [{seed: 0}]\nevaluations: {linear: {program: train}}", "linear: program 'train', expected one of"),
        ("grid: [{seed: 0}]\nevaluations: {runs: {}}", "an evaluation named 'runs'"),
        ("grid: [{seed: 0}]\nevaluations: {linear: 1}", "linear is 1, expected names and values"),
    ],
)
def test_slips_in_the_file_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match="two_weights") as refusal:
        read_study(arguments(tmp_path, text))
    assert message in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------------------
# Side by side


def processes_that(monkeypatch, do):
    """Start `python -c` with what `do` says of a task's kind and run instead of `umae`; the order of starts."""
    started = []

    def start(words, environ, log):
        folder = Path(words[-1])
        started.append(f"{folder.parent.name}/{folder.name}")
        code = do(folder.parent.name, folder.name)
        return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=log, stderr=log, env={})

    monkeypatch.setattr(study_jobs, "start_process", start)
    return started


def carry_out(tmp_path, slots=1):
    tasks, ended = read_study(arguments(tmp_path)).tasks, []
    with StopRequest() as stop:
        failed = study_jobs.carry_out(
            tasks, [{}] * slots, {}, stop, lambda job, status: ended.append((job.task.name, status)), lambda jobs: None
        )
    return [task.name for task in failed], ended


def test_an_evaluation_waits_for_its_run_and_comes_before_the_next_run(tmp_path, monkeypatch):
    started = processes_that(monkeypatch, lambda kind, run: "")
    assert carry_out(tmp_path)[0] == []
    assert [name.split(",")[0] for name in started] == [
        "runs/uniformity_weight=0",
        "linear/uniformity_weight=0",
        "runs/uniformity_weight=0.1",
        "linear/uniformity_weight=0.1",
    ]


def test_what_fails_takes_its_evaluations_with_it_and_nothing_else(tmp_path, monkeypatch):
    processes_that(monkeypatch, lambda kind, run: "1 / 0" if run == "uniformity_weight=0,seed=0" else "")
    failed, ended = carry_out(tmp_path, slots=2)
    assert failed == ["runs/uniformity_weight=0,seed=0", "linear/uniformity_weight=0,seed=0"]
    assert dict(ended) == {
        "runs/uniformity_weight=0,seed=0": 1,
        "runs/uniformity_weight=0.1,seed=0": 0,
        "linear/uniformity_weight=0.1,seed=0": 0,
    }
    assert "ZeroDivisionError" in (tmp_path / "out/runs/uniformity_weight=0,seed=0.log").read_text()


def test_the_progress_goes_on_being_shown_after_the_first_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("umae.progress_bar.SECONDS", 0.0)
    monkeypatch.setattr(study_jobs, "WATCH", 0.0)
    processes_that(monkeypatch, lambda kind, run: "" if kind == "runs" else "import time; time.sleep(1.5)")
    read = read_study(arguments(tmp_path))
    with StopRequest() as stop:
        assert study.carry_out(read, read.tasks[:2], [{}], Clock(read, 1), stop, lambda: None) == []
    lines = [line for line in capsys.readouterr().err.split("\n") if "linear/uniformity_weight=0" in line]
    assert len(lines) >= 4, "one for each look at the processes"


def test_a_signal_reaches_every_process_once_and_all_are_waited_for(tmp_path, monkeypatch):
    code = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(3)))"
    processes_that(monkeypatch, lambda kind, run: f"{code}; print('ready', flush=True); time.sleep(60)")
    logs = [tmp_path / f"out/runs/uniformity_weight={weight},seed=0.log" for weight in ("0", "0.1")]

    def interrupt():
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    _, ended = carry_out(tmp_path, slots=2)
    thread.join()
    assert [log.read_text() for log in logs] == ["ready\nsaved\n"] * 2
    assert sorted(status for _, status in ended) == [3, 3]


def test_gpus_are_handed_out_one_each_and_cores_in_shares(monkeypatch):
    monkeypatch.setattr(study_jobs, "usable_cores", lambda: 8)
    assert study_jobs.slots({}, None) == [{"OMP_NUM_THREADS": "8"}]
    assert study_jobs.slots({}, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert study_jobs.slots({"OMP_NUM_THREADS": "1"}, 2) == [{"OMP_NUM_THREADS": "1"}] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    of_gpu = [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "6")]
    assert study_jobs.slots({"CUDA_VISIBLE_DEVICES": "4,6"}, None) == of_gpu
    assert study_jobs.slots({"CUDA_VISIBLE_DEVICES": "4,6"}, 3) == [*of_gpu, of_gpu[0]]


# ----------------------------------------------------------------------------------------------------------------------
# The whole


PROTOCOL = {"model": "run", "linear_protocol": "cached", "test": {"data": "digits (test)"}, "seeds": [0]}


@pytest.fixture
def at_once(finished, monkeypatch):
    """Every run ends with the folder of a finished one, and every evaluation with a report of its own; what starts."""
    started = []

    def start(words, environ, log):
        folder = Path(words[-1])
        started.append(f"{folder.parent.name}/{folder.name}")
        if words[0] == "pretrain":
            return subprocess.Popen(["cp", "-r", str(finished[0]), str(folder)], stdout=log, stderr=log)
        top1 = 50 + 2.5 * sum(name.startswith("linear/") for name in started[:-1])
        numbers = {"top1": top1, "top5": None, "knn20_top1": 40.0, "effective_rank": 3.0}
        folder.mkdir(parents=True)
        (folder / "linear_probe.json").write_text(json.dumps({"cls": numbers, "mean": numbers, "protocol": PROTOCOL}))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(study_jobs, "start_process", start)
    return started


def test_the_results_are_those_of_the_folders_and_nothing_finished_is_done_again(tmp_path, finished, at_once, capsys):
    args = arguments(tmp_path)
    content = study.run(args)
    out = tmp_path / "out"
    assert content == json.loads((out / "study.json").read_text())
    last = json.loads((finished[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert [run["values"]["linear/top1/mean"] for run in content["runs"]] == [50.0, 52.5]
    for run in content["runs"]:
        assert run["values"]["pretraining/reconstruction_loss"] == last["reconstruction_loss"]
        assert [command.split()[:2] for command in run["commands"]] == [["umae", "pretrain"], ["umae", "probe"]]
    assert content["groups"][1]["metrics"]["linear/top1/cls"]["difference"] == 2.5
    assert content["protocols"]["linear"] == {key: value for key, value in PROTOCOL.items() if key != "model"}
    assert content["protocols"]["pretraining"]["total_steps"] == 12
    assert str(tmp_path) not in (out / "study.json").read_text() + (out / "study.html").read_text()
    assert "| linear, class token | 50.0 | 52.5 +2.5 |" in (out / "study.md").read_text()
    with Image.open(out / "study.png") as figure:
        assert figure.width == 800
    capsys.readouterr()
    at_once.clear()
    assert study.run(args) == content
    assert "2 of 2 finished" in capsys.readouterr().out and at_once == []


def test_a_results_file_is_enough_to_continue_and_keeps_what_would_be_lost(tmp_path, at_once):
    content = study.run(arguments(tmp_path))
    file = tmp_path / "out/study.json"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "out").mkdir(parents=True)
    (elsewhere / "out/study.json").write_bytes(file.read_bytes())
    at_once.clear()
    assert study.run(arguments(elsewhere)) == content and at_once == []
    assert (elsewhere / "out/study.json").read_bytes() == file.read_bytes()

    grown = study.run(arguments(elsewhere, STUDY.replace("[0, 0.1]", "[0, 0.1, 1]")))
    assert at_once == ["runs/uniformity_weight=1,seed=0", "linear/uniformity_weight=1,seed=0"]
    assert grown["runs"][:2] == content["runs"] and len(grown["runs"]) == 3

    # With another evaluation the first two runs, whose folders are gone, are done again; until then the file keeps them
    more = arguments(elsewhere, STUDY.replace("[0, 0.1]", "[0, 0.1, 1]") + "  again: {}\n")
    assert study.run(dataclasses.replace(more, plan=True))["runs"] == grown["runs"]
    study.run(more)
    assert at_once[2:4] == ["runs/uniformity_weight=0,seed=0", "linear/uniformity_weight=0,seed=0"]
    assert "runs/uniformity_weight=1,seed=0" not in at_once[2:]

    (tmp_path / "third/out").mkdir(parents=True)
    third = tmp_path / "third/out/study.json"
    third.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"results of uniformity_weight=0,seed=0 by a command .*--max_train_steps 1 "):
        study.run(arguments(tmp_path / "third", STUDY.replace("max_train_steps: 1,", "max_train_steps: 2,")))
    with pytest.raises(ValueError, match=r"results of uniformity_weight=0.1,seed=0 by a command"):
        study.run(arguments(tmp_path / "third", STUDY.replace("[0, 0.1]", "[0]")))
    assert third.read_bytes() == file.read_bytes()
    third.write_text("[]")
    with pytest.raises(ValueError, match="does not hold the results of a study"):
        study.run(arguments(tmp_path / "third"))


@pytest.mark.slow
def test_a_study_ends_with_every_figure_and_its_origin(tmp_path, forked, capsys):
    args = arguments(tmp_path)
    content = study.run(args)
    out = tmp_path / "out"
    assert content == json.loads((out / "study.json").read_text())
    reports = [
        json.loads((out / f"linear/uniformity_weight={weight},seed=0/linear_probe.json").read_text())
        for weight in ("0", "0.1")
    ]
    for run, report in zip(content["runs"], reports, strict=True):
        last = json.loads((out / "runs" / run["run"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert run["values"]["linear/top1/mean"] == report["mean"]["top1"]
        assert run["values"]["linear/knn20_top1/cls"] == report["cls"]["knn20_top1"]
        assert run["values"]["pretraining/reconstruction_loss"] == last["reconstruction_loss"]
        assert [command.split()[:2] for command in run["commands"]] == [["umae", "pretrain"], ["umae", "probe"]]
    difference = content["groups"][1]["metrics"]["linear/top1/cls"]["difference"]
    assert difference == pytest.approx(reports[1]["cls"]["top1"] - reports[0]["cls"]["top1"])
    assert content["protocols"]["linear"]["linear"]["epochs"] == 100
    assert content["protocols"]["pretraining"]["total_steps"] == 1
    assert str(tmp_path) not in (out / "study.json").read_text() + (out / "study.html").read_text()
    assert f"{reports[1]['mean']['top1']:.1f}" in (out / "study.md").read_text()
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("run.json", "linear_probe.json")
    }
    capsys.readouterr()
    assert study.run(args) == content  # all is finished, so nothing is done again
    assert "2 of 2 finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_images_without_labels_are_compared_without_accuracies(tmp_path, forked):
    for index in range(64):
        path = tmp_path / "images" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((8, 8), 10 + index).convert("RGB").save(path)
    args = arguments(tmp_path, STUDY.replace("digits,", f"{tmp_path / 'images'},", 1), plan=True)
    content = study.run(args)
    assert content["runs"] == [] and "no labels" in content["notes"][0]
    assert not (tmp_path / "out").exists()


def test_a_study_that_another_process_works_on_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with study.FileLock(tmp_path / "out" / study.LOCK), pytest.raises(ValueError, match="in use by another study"):
        study.run(arguments(tmp_path))


def test_the_time_to_the_end_follows_the_pace_of_the_runs_and_what_evaluations_took(tmp_path):
    read = read_study(arguments(tmp_path, STUDY.replace("max_train_steps: 1,", "max_train_steps: 1200,")))
    run, evaluation, *_ = read.tasks
    clock = Clock(read, 1)
    assert "time not known before the first is finished" in clock.plan()
    assert clock.left().startswith("more than")
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(
        json.dumps({"finished": False, "identity": {"total_steps": 1200, "pictures_per_step": 128}})
    )
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 600, "pictures_per_second": 256.0}) + "\n")
    evaluation.folder.mkdir(parents=True)
    (evaluation.folder / "linear_probe.json").write_text("{}")
    clock.add(evaluation, 60.0)
    clock.add(evaluation, 240.0)  # continued
    # Half of a run of 600 seconds, a whole one of the same size, and one evaluation of 300 seconds
    assert Clock(read, 1).left() == "about 20.0 minutes to the end"
    assert Clock(read, 2).left() == "about 10.0 minutes to the end"


def test_before_the_first_evaluation_no_time_is_made_up(tmp_path):
    read = read_study(arguments(tmp_path))
    for task in read.tasks:
        if task.kind == "runs":
            task.folder.mkdir(parents=True)
            (task.folder / "run.json").write_text('{"finished": true}')
    assert Clock(read, 1).left() == "time to the end not known yet"


def test_a_run_of_one_step_says_nothing_of_how_long_others_take(tmp_path):
    """Its step is mostly compilation."""
    text = STUDY.replace("max_train_steps: 1,", "max_train_steps: 1200,").replace("[0, 0.1]", "[0, 0.1, 0.2, 0.3]")
    read = read_study(arguments(tmp_path, text))
    runs = [task for task in read.tasks if task.kind == "runs"]
    for run, (steps, pace) in zip(runs, ((1, 0.01), (1200, 256.0), (1200, 256.0)), strict=False):
        run.folder.mkdir(parents=True)
        identity = {"total_steps": steps, "pictures_per_step": 128}
        (run.folder / "run.json").write_text(json.dumps({"finished": True, "identity": identity}))
        (run.folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "pictures_per_second": pace}) + "\n")
    without_evaluations = dataclasses.replace(read, tasks=runs)
    assert Clock(without_evaluations, 1).left() == "about 10.0 minutes to the end"  # of the fourth


def test_to_estimate_the_time_reads_every_run_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    """It is asked for every few seconds, and must not take the time of the runs."""
    read = read_study(arguments(tmp_path, STUDY.replace("[0, 0.1]", f"[{', '.join(str(n / 20) for n in range(20))}]")))
    asked = {"_progress": [], "_work": []}
    for name, tasks in asked.items():
        real = getattr(study_clock, name)
        monkeypatch.setattr(study_clock, name, lambda task, real=real, tasks=tasks: tasks.append(task) or real(task))
    clock, runs = Clock(read, 1), [task for task in read.tasks if task.kind == "runs"]
    assert len({clock.left() for _ in range(3)}) == 1 and len(runs) >= 20
    assert len(asked["_work"]) == len(runs), "once for all"
    assert len(asked["_progress"]) <= 3 * 2 * len(runs)


@pytest.mark.slow
def test_an_interrupted_study_continues_to_the_same_results(tmp_path):
    """By the real command and real signals: the results of one that was killed twice are those of one that was not."""
    text = STUDY.replace("max_train_steps: 1,", "max_train_steps: 40, checkpointing_steps: 5,")
    file = Path(arguments(tmp_path, text).study)

    def start(folder: str):
        return processes.start(
            processes.ROOT / "command_line_umae.py", "study", file, "--output_dir", tmp_path / folder, "--jobs", "2"
        )

    assert start("whole").wait(600) == 0
    interrupted = start("interrupted")
    first = tmp_path / "interrupted/runs/uniformity_weight=0,seed=0"
    while not (first / "step-5").exists():
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGTERM)
    assert interrupted.wait(120) == 128 + signal.SIGTERM
    assert not json.loads((first / "run.json").read_text())["finished"]
    assert start("interrupted").wait(600) == 0
    names = ("study.json", "study.md", "study.png", "study.html")
    whole, continued = (
        [(tmp_path / folder / name).read_bytes() for name in names] for folder in ("whole", "interrupted")
    )
    assert whole == continued
