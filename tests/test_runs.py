"Runs and processes that want the same folder or file: one has it, the others are told who, and a killed one keeps nothing."
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tritoncls.files import Locked, locked

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


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
