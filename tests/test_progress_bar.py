"""Bars where stderr is no terminal, as under pytest."""

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from umae import progress_bar as module
from umae.progress_bar import progress_bar


def test_a_log_file_gets_a_line_now_and_then_and_no_carriage_returns(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    for step in progress_bar(range(3), desc="training"):
        tqdm.write(f"message {step}")
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split("\n") if line]
    assert "\r" not in captured.err + captured.out
    assert all(line.startswith("training:") for line in lines) and "3/3" in lines[-1]
    assert captured.out == "message 0\nmessage 1\nmessage 2\n"


def test_many_quick_steps_are_few_lines(capsys):
    for _ in progress_bar(range(10_000)):
        pass
    assert len([line for line in capsys.readouterr().err.split("\n") if line]) == 2, "the first and the last"


def test_a_notebook_keeps_its_widget(monkeypatch):
    """Where tqdm.auto chooses it, stderr is no terminal either."""

    class Widget(tqdm_notebook):
        pass

    monkeypatch.setattr(module, "tqdm", Widget)
    assert isinstance(progress_bar(range(3), disable=True), Widget)
