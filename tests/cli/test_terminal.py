"""What the terminal shows: markup in paths, narrow and closed terminals, foreign encodings."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from lrd import console
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import RunDir, read_status

RECIPE = """
data: {dataset: digits, batch_size: 64}
model: {arch: resnet18, width: 4}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 500, device: cpu}
checkpoint: {every_steps: 2}
"""
LRD = [sys.executable, "-m", "lrd"]


def make_run(path: Path) -> Path:
    """A run directory that `lrd runs` lists."""
    run_dir = RunDir(path)
    run_dir.write_status("finished", step=3, total_steps=3, best_accuracy=0.5)
    run_dir.close()
    return path


def make_console(width: int, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    output = io.BytesIO()
    stream = io.TextIOWrapper(output, encoding=encoding, write_through=True)
    return Console(file=stream, width=width, force_terminal=True), output


@pytest.mark.parametrize("text", ["runs/lr[a]0.1", "[/x]", "[bold]", "a [link=x]b"])
def test_text_in_brackets_is_shown_as_it_is(monkeypatch, text):
    terminal, output = make_console(width=120)
    monkeypatch.setattr(console, "stdout", terminal)
    monkeypatch.setattr(console, "stderr", terminal)
    console.info(text)
    console.error(text)
    console.table(text, [text], [[text]])
    with console.ProgressMeter(text, total=3) as meter:
        meter.update(1, figures=text)

    plain = Text.from_ansi(output.getvalue().decode()).plain
    assert plain.count(text) >= 7


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_step_counter_is_never_cut(monkeypatch, width):
    terminal, output = make_console(width)
    monkeypatch.setattr(console, "stdout", terminal)
    with console.ProgressMeter("epoch 12/90 step", total=450_000) as meter:
        meter.update(123_456, "loss 0.1234 acc 0.9876 lr 0.0123 123456 images/s 3 skipped")

    plain = Text.from_ansi(output.getvalue().decode()).plain
    assert "epoch 12/90 step" in plain
    assert "123456/450000" in plain
    assert "loss 0.1234" in plain


def test_a_character_that_the_encoding_lacks_is_escaped(monkeypatch):
    output = io.BytesIO()
    stream = io.TextIOWrapper(output, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.info("runs/größe and \udcff")
    assert output.getvalue() == b"runs/gr\\xf6\\xdfe and \\udcff\n"


def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path):
    for i in range(200):
        make_run(tmp_path / "runs" / f"run-{i}")
    command = " ".join([*LRD, "runs", str(tmp_path / "runs")])
    script = f"set -o pipefail; {command} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


# Slow, because a reader that leaves is the same to a command.
@pytest.mark.slow
def test_a_closed_output_is_no_error(tmp_path):
    make_run(tmp_path / "runs" / "a")
    script = " ".join([*LRD, "runs", str(tmp_path / "runs"), ">&-"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_run_whose_terminal_is_closed_is_saved(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    run_dir = tmp_path / "[/x]"

    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.chdir(tmp_path)
        os.execv(sys.executable, [*LRD, "train", recipe.name, f"run_dir={run_dir}"])

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 100
    while not store.list_steps(run_dir):
        assert time.monotonic() < deadline
        try:
            os.read(terminal, 1 << 16)  # a terminal that nobody reads fills up
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)

    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    saved = read_status(run_dir)
    assert saved["state"] == "stopped"
    assert store.list_steps(run_dir)[-1] == saved["step"]
