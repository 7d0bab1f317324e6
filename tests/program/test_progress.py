"""What a user sees of long work: a bar that redraws on a terminal, lines in a log."""

import io
import sys

import pytest

from program.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_for_a_short_phase(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Bar(range(1000), desc="Judging", unit="batches")) == list(range(1000))
    with Bar(total=1, desc="Graph") as bar:
        bar.update()
    assert capsys.readouterr().err == "Judging: 1,000 batches in 00:00\nGraph: 00:00\n"


def test_a_log_gets_a_line_now_and_then_of_a_long_one(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    bar = Bar(total=110, initial=10, desc="Training", unit="steps")
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for step in range(100):
        now[0] += 1.0
        assert bar.is_due == (now[0] % 30 == 0)
        if bar.is_due:
            bar.set_postfix_str(f"loss {step}", refresh=False)
        bar.update()
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "Training: 40 of 110 steps in 00:30, about 01:10 left, loss 29",
        "Training: 70 of 110 steps in 01:00, about 00:40 left, loss 59",
        "Training: 100 of 110 steps in 01:30, about 00:10 left, loss 89",
        "Training: 110 steps in 01:40, loss 89",
    ]


def test_the_time_of_a_bar_inside_another_is_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Bar(total=10, desc="Training", unit="steps") as training:
        for step in range(10):
            now[0] += 10.0
            if step == 1:
                with Bar(total=2, desc="Pruning", unit="layers") as pruning:
                    for seconds in (100.0, 10.0):
                        now[0] += seconds
                        pruning.update()
            training.update()
    assert capsys.readouterr().err.splitlines() == [
        "Pruning: 1 of 2 layers in 01:40, about 01:40 left",
        "Pruning: 2 layers in 01:50",
        "Training: 3 of 10 steps in 00:30, about 01:10 left",
        "Training: 6 of 10 steps in 01:00, about 00:40 left",
        "Training: 9 of 10 steps in 01:30, about 00:10 left",
        "Training: 10 steps in 01:40",
    ]


def test_work_that_failed_before_its_first_step_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="refused"), Bar(total=3, desc="Graph"):
        raise ValueError("refused")
    assert capsys.readouterr().err == ""


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Bar(total=2, desc="Training", mininterval=0, ncols=120) as bar:
        bar.update()
        bar.update()
    frames = screen.getvalue().split("\r")
    assert "1/2" in frames[-2] and "left" in frames[-2]
    assert "2/2" in frames[-1] and "left" not in frames[-1]
    assert screen.getvalue().count("\n") == 1


def test_other_processes_of_a_run_show_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(Bar(range(3), desc="Judging")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
