"""Ctrl-C and SIGTERM from outside, at moments drawn at random: one line, the signal's exit code, and no process left.

A moment is an offset into one of three parts of a run: what it imports, from the first line of its output on, and its end.
"""
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_faults import alive, group_of_one, started

from tritoncls.checkpoint import read_checkpoint

WORDS = {signal.SIGINT: ("interrupted",), signal.SIGTERM: ("SIGTERM: ", "terminated")}
SECONDS = {"import": 4.0, "train": 2.5, "end": 0.3}  # how late the first signal comes, at most
PATIENCE = 5.0                                      # seconds until no process may be left


@dataclass
class Draw:
    part: str            # of the run: a key of SECONDS
    after: float         # seconds into it
    number: int          # SIGINT or SIGTERM
    gaps: list[float]    # seconds between the signals
    group: bool          # to all processes of the run, or to the first alone
    keys: tuple[str, ...]
    shares: bool         # with a group of processes, and checkpoints that are written in the background

    @classmethod
    def of(cls, seed: int) -> "Draw":
        rng = random.Random(seed)
        part, number = rng.choice(["import", "train", "train", "end"]), rng.choice([signal.SIGINT, signal.SIGTERM])
        gaps = [rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 1)]) for _ in range(rng.choice([0, 0, 1, 2, 4]))]
        shares = rng.random() < 0.2
        keys = (f"data.num_workers={rng.choice([0, 2])}", *(["distributed.strategy=fsdp"] if shares else []))
        return cls(part, rng.uniform(0, SECONDS[part]), number, gaps, rng.random() < 0.5, keys, shares)


def listens(pid: int) -> bool:
    "Whether a process has a handler for SIGTERM, which Python does not have by itself."
    try: caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError: return False
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_for(part: str, run: subprocess.Popen) -> str:
    "Wait until this part of a run begins; what it has printed so far."
    if part == "import":
        while run.poll() is None and not listens(run.pid): time.sleep(0.005)
        return ""
    said = ""
    for line in run.stdout:
        said += line
        if part == "train" or line.startswith("output folder:"): break
    return said


def fate(folder: Path, draw: Draw) -> tuple[int | None, str, str]:
    "Exit code, stdout and stderr of a run that gets the signals; no code if it was over before the first of them."
    send = os.killpg if draw.group else os.kill
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "ignore"}
    with started(folder, "hooks_name=Saying", *draw.keys, env=env | (group_of_one() if draw.shares else {})) as run:
        out = wait_for(draw.part, run)
        time.sleep(draw.after)
        over, began = run.poll() is not None, time.monotonic()
        for gap in [0.0, *draw.gaps]:
            time.sleep(gap)
            if run.poll() is None: send(run.pid, draw.number)
        rest, err = run.communicate(timeout=30)
        if draw.number == signal.SIGINT and not over: assert time.monotonic() - began < PATIENCE + sum(draw.gaps)
        ended = time.monotonic()
        while alive(run.pid) and time.monotonic() < ended + PATIENCE: time.sleep(0.05)
        assert not alive(run.pid), "processes are left"
    return None if over else run.returncode, out + rest, err


def check(folder: Path, draw: Draw) -> bool:
    "Whether the signal came in time; whatever it met, the end is as it should be."
    code, out, err = fate(folder, draw)
    assert "Traceback" not in out + err, (draw, err)
    if code in (None, 0):  # over before the signal, or just about to be
        assert out.splitlines()[-1].startswith("output folder: ") and err == "", (draw, out, err)
        return False
    assert code == 128 + draw.number, (draw, code, err)
    assert len(err.splitlines()) == 1 and err.startswith(WORDS[draw.number]), (draw, err)
    if (folder / "latest.pt").exists(): read_checkpoint(folder / "latest.pt")
    return True


FEW = {"twice while it imports": Draw("import", 1.0, signal.SIGINT, [0.03], False, (), False),
       "all processes": Draw("train", 0.2, signal.SIGINT, [0.0, 0.03, 0.5], True, ("data.num_workers=2",), False),
       "told twice": Draw("train", 0.2, signal.SIGTERM, [0.0, 0.05], True, ("data.num_workers=2",), False),
       "at the end": Draw("end", 0.0, signal.SIGINT, [0.03], False, ("data.num_workers=2",), False)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("draw", FEW.values(), ids=FEW)
def test_signals_end_a_run_with_one_line(draw, tmp_path): assert check(tmp_path / "run", draw)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(60))
def test_signals_at_any_moment_end_a_run_with_one_line(seed, tmp_path): check(tmp_path / "run", Draw.of(seed))
