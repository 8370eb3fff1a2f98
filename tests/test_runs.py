"Runs and processes that want the same folder or file: one has it, the others are told who, and a killed one keeps nothing."
import errno
import fcntl
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from test_distributed import QUICK, train, trained
from test_faults import command, finished, group_of_one, started

from tritoncls.cli import LOCK, own_folder
from tritoncls.config import load_config
from tritoncls.files import Locked, locked
from tritoncls.runtime import UserError

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def python(code: str, *args, **options) -> subprocess.Popen:
    "Start a program; its output is piped."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


# Files

HOLDS = """
import os, sys, time
from pathlib import Path
from tritoncls.files import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child: print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(100)
def test_a_killed_process_gives_its_lock_back_although_its_children_live_on(tmp_path):
    lock = tmp_path / "run.lock"
    owner = python(HOLDS, lock)
    pid, child = map(int, owner.stdout.readline().split())
    try:
        with pytest.raises(Locked, match=f"^process {pid} on .*, since 20"), locked(lock, patience=0.2): pass
        os.kill(pid, signal.SIGKILL)
        owner.wait(10)
        assert Path(f"/proc/{child}").exists() and lock.exists()
        with locked(lock, patience=0.2) as ours: assert ours and f"process {os.getpid()} on" in lock.read_text()
        assert not lock.exists() and Path(f"/proc/{child}").exists()
    finally: os.kill(child, signal.SIGKILL)
    owner.communicate()


TURNS = """
import os, sys, time
from pathlib import Path
from tritoncls.files import write_atomically
path, letters = Path(sys.argv[1]), "abcdefghijklmnopqrst"

def write(letter):
    def slowly(temporary):
        for part in range(4):
            with temporary.open("a") as file: file.write(50 * letter)
            time.sleep(0.005)
    for _ in range(5):
        write_atomically(path, slowly)
        if len(set(text := path.read_text())) != 1 or len(text) != 200: os._exit(1)
    os._exit(0)

children = []
for letter in letters:
    if (child := os.fork()) == 0:
        try: write(letter)
        finally: os._exit(2)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.mark.timeout(100)
def test_processes_that_write_one_file_take_turns(tmp_path):
    out, err = python(TURNS, tmp_path / "state").communicate(timeout=90)
    assert out == f"{[0] * 20}\n", err
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# Runs that begin together

MANY = """
import os, sys, time
from datetime import datetime
from pathlib import Path
from tritoncls import cli

class Noon(datetime):
    @classmethod
    def now(cls, tz=None): return cls(2026, 1, 2, 12, 0, 0)

def wait_for_go(cfg, resume):
    "Leave a mark in the run's folder, and stay."
    Path(cfg.output_dir, f"mark{os.getpid()}").touch()
    while not Path("go").exists(): time.sleep(0.1)

def begin(*keys):
    if (child := os.fork()): return child
    cli.datetime, cli.train_in_folder = Noon, wait_for_go
    sys.argv, sys.stderr = ["tritoncls", "train", *keys], open(f"said{os.getpid()}", "w")
    try: cli.main()
    except SystemExit as end:
        sys.stderr.close()
        os._exit(end.code or 0)
    finally: os._exit(99)

count, *keys = sys.argv[1:]
children, codes = [begin(*keys) for _ in range(int(count))], {}
while len(list(Path().glob("**/mark*"))) + len(codes) < int(count):
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid: codes[pid] = os.waitstatus_to_exitcode(status)
    time.sleep(0.1)
Path("go").touch()
for child in set(children) - codes.keys(): codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for child in children: print(child, codes[child])
"""


def many(folder: Path, count: int, *keys: str) -> tuple[dict[int, int], dict[int, str], dict[int, Path]]:
    "By process: its exit code, what it said, and the folder in which it left its mark."
    out, err = python(MANY, count, *keys, cwd=folder).communicate(timeout=100)
    codes = dict(map(int, line.split()) for line in out.splitlines())
    assert len(codes) == count, err
    marks = {int(path.name.removeprefix("mark")): path.parent for path in folder.glob("**/mark*")}
    return codes, {pid: (folder / f"said{pid}").read_text() for pid in codes}, marks


@pytest.mark.timeout(120)
def test_20_runs_that_begin_in_one_second_have_a_folder_each(tmp_path):
    codes, said, marks = many(tmp_path, 20)
    assert set(codes.values()) == {0}, said
    assert marks.keys() == codes.keys() and len({*marks.values()}) == 20
    assert {path.name for path in (tmp_path / "outputs/digits").iterdir()} == {
        "20260102-120000", *(f"20260102-120000-{n}" for n in range(2, 21))}


@pytest.mark.timeout(120)
def test_of_20_runs_that_want_one_folder_one_gets_it_and_the_others_are_told_who(tmp_path):
    codes, said, marks = many(tmp_path, 20, "output_dir=a/run")
    (winner,) = marks
    assert codes.pop(winner) == 0 and set(codes.values()) == {2}
    for pid in codes:
        assert said[pid].count("\n") == 1 and said[pid].startswith("error: output_dir = 'a/run': ")
        assert f"process {winner} on " in said[pid] and ", since 20" in said[pid]
    assert not (tmp_path / "a/run/run.lock").exists()


# One run and its folder

def until(run: subprocess.Popen, line: str) -> None:
    "Read what a run prints, until it prints this."
    assert any(said == f"{line}\n" for said in run.stdout), run.communicate()[1]


def children(pid: int) -> list[int]: return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_has_its_folder_alone_until_it_is_killed(tmp_path):
    "Meanwhile its weights can be read; afterwards it goes on at once, although processes that read images for it live on."
    folder = tmp_path / "run"
    cfg = load_config(overrides=[f"output_dir={folder}"])
    with started(folder, "hooks_name=Saying", "solver.max_epoch=500", "data.num_workers=2") as run:
        until(run, "at 14")
        refused = f"output_dir = '{folder}': a run writes there at present, process {run.pid} on "
        code, out, err = finished(folder)
        assert code == 2 and not out and err.count("\n") == 1 and err.startswith(f"error: {refused}")
        assert f", since {datetime.now():%Y-%m-%d} " in err and "name another folder" in err
        with pytest.raises(UserError, match=refused), own_folder(cfg, resume=True): pass
        test = command(folder) | {"args": [sys.executable, "-m", "tritoncls.cli", "test", "-w", f"{folder}/latest.pt"]}
        tested = subprocess.run(**test, timeout=100)
        assert tested.returncode == 0 and "360 test images" in tested.stdout, tested.stderr

        for reader in (readers := children(run.pid)): os.kill(reader, signal.SIGSTOP)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(10)
        assert readers and all(Path(f"/proc/{reader}").exists() for reader in readers)
        with own_folder(cfg, resume=True): pass
        for reader in readers: os.kill(reader, signal.SIGKILL)
        run.communicate()
    code, out, err = finished(folder, "--resume", "solver.max_epoch=3")
    assert code == 0 and out.startswith(f"resuming {folder}\n") and not (folder / LOCK).exists(), err


@pytest.mark.timeout(100)
def test_a_process_that_torchrun_has_started_has_its_folder_alone_too(tmp_path):
    env = command(tmp_path / "run")["env"] | group_of_one()
    with own_folder(load_config(overrides=[f"output_dir={tmp_path}/run"])):
        code, _, err = finished(tmp_path / "run", env=env)
    assert code == 2 and err.count(f"process {os.getpid()} on ") == 1 and "Traceback" not in err


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_a_run_says_so_and_goes_on(number, tmp_path, monkeypatch):
    def no_locks(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    cfg = load_config(overrides=[f"output_dir={tmp_path}/run"])
    with pytest.warns(UserWarning, match=f"{tmp_path}/run: no locks on this file system; no other run may write there"):
        with own_folder(cfg) as own: assert own == cfg and (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_takes_away_only_what_it_has_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/empty").mkdir(parents=True)
    for name in (None, "mine/empty", "mine/new/run"):
        with pytest.raises(ZeroDivisionError), own_folder(load_config().model_copy(update={"output_dir": name})):
            assert len(list(Path().glob("**/run.lock"))) == 1
            raise ZeroDivisionError
    assert [str(path) for path in Path().glob("**/*")] == ["mine", "mine/empty"]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_processes_of_one_run_share_the_folder_and_are_refused_together(tmp_path):
    folder = tmp_path / "run"
    with own_folder(load_config(overrides=[f"output_dir={folder}"])):
        ended = train(tmp_path, 2, *QUICK, f"output_dir={folder}")
        assert ended.returncode and f"at present, process {os.getpid()} on " in ended.stderr, ended.stderr
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert trained(tmp_path, 2, *QUICK, f"output_dir={folder}").returncode == 0 and not (folder / LOCK).exists()
