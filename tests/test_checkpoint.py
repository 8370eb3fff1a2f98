"Checkpoints through kills, full disks and damage: there is always a good one, and what is read is what was written."
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tritoncls import checkpoint
from tritoncls.checkpoint import load_checkpoint, previous, read_checkpoint, save_checkpoint
from tritoncls.runtime import UserError

STEPS = ((os, "link"), (os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "chmod"), (torch, "save"))


RNG = checkpoint.rng_state()


def state_of(epoch: int) -> dict:
    return dict(version=checkpoint.VERSION, epoch=epoch, model={"w": torch.full((5000,), float(epoch))}, solver={}, ema=None,
                rng=RNG, seconds=0.0, cfg="seed: 1")


def in_child(work) -> int:
    "Do it in a forked process; its exit code, or minus the signal that ended it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_and_die(file: Path, epoch: int, step: int) -> None:
    "Save, and stop dead before system call number `step`."
    calls = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step: os._exit(9)
            return function(*args, **kwargs)
        return call
    for owner, name in STEPS: setattr(owner, name, deadly(getattr(owner, name)))
    save_checkpoint(file, state_of(epoch))


def damage(file: Path) -> None: file.write_bytes(file.read_bytes()[:700])


def loaded(file: Path) -> int:
    "The epoch of the checkpoint that a resumed run would take."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        state = load_checkpoint(file)
    assert torch.equal(state["model"]["w"], state_of(state["epoch"])["model"]["w"])
    return state["epoch"]


@pytest.mark.parametrize("before", ["nothing", "one", "two", "damaged latest", "damaged previous"])
def test_a_crash_at_any_step_leaves_a_good_checkpoint(before, tmp_path):
    outcomes = []
    for step in range(1, 40):
        folder = tmp_path / str(step)
        folder.mkdir()
        file = folder / "latest.pt"
        for epoch in {"nothing": (), "one": (1,)}.get(before, (0, 1)): save_checkpoint(file, state_of(epoch))
        if before == "damaged latest": damage(file)
        if before == "damaged previous": damage(previous(file))
        code = in_child(lambda file=file, step=step: save_and_die(file, 2, step))
        assert code in (0, 9)
        if before == "nothing" and not file.exists(): outcomes.append(None)
        else: outcomes.append(loaded(file))
        save_checkpoint(file, state_of(3))
        assert loaded(file) == 3 and {path.name for path in folder.iterdir()} <= {"latest.pt", "latest.previous.pt"}
        if code == 0: break
    assert code == 0 and step > 7, "the deaths came before every step"
    old = {"nothing": None, "damaged latest": 0}.get(before, 1)
    switched = outcomes.index(2)
    assert outcomes == [old] * switched + [2] * (len(outcomes) - switched) and 2 < switched < len(outcomes) - 1


def test_a_kill_at_any_time_leaves_a_good_checkpoint(tmp_path):
    file, rng = tmp_path / "latest.pt", random.Random(0)
    save_checkpoint(file, state_of(0))

    def save_forever():
        epoch = loaded(file)
        while True: save_checkpoint(file, state_of(epoch := epoch + 1))
    reached = [0]
    while len(reached) <= 12 or reached[-1] <= 12:  # on a busy machine, many are killed before they have saved
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0: save_forever()
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(loaded(file))
        assert reached == sorted(reached)


def test_a_copy_stands_in_where_a_disk_has_no_second_names(tmp_path, monkeypatch):
    def no_links(*args): raise PermissionError("not supported")
    monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "latest.pt"
    for epoch in (1, 2): save_checkpoint(file, state_of(epoch))
    assert [read_checkpoint(path)["epoch"] for path in (file, previous(file))] == [2, 1]


def test_a_full_disk_is_an_error_and_the_old_files_stay(tmp_path):
    "The limit on the size of a file makes the system refuse to write in the middle of it."
    code = f"""
import resource
from pathlib import Path
import torch
from tritoncls.checkpoint import rng_state, save_checkpoint, save_weights
folder = Path({str(tmp_path)!r})
small, large = torch.nn.Linear(4, 4), torch.nn.Linear(200, 200)
state = dict(version=2, epoch=1, model=small.state_dict(), solver=dict(), ema=None, rng=rng_state(), seconds=0.0, cfg="seed: 1")
for epoch in (1, 2): save_checkpoint(folder / "latest.pt", state | dict(epoch=epoch))
save_weights(folder / "best.safetensors", small)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
for save in (lambda: save_checkpoint(folder / "latest.pt", state | dict(epoch=3, model=large.state_dict())),
             lambda: save_weights(folder / "best.safetensors", large)):
    try: save()
    except OSError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("could not be written" in line and "File too large" in line for line in lines)
    assert "latest.pt" in lines[0] and "best.safetensors" in lines[1]
    latest = tmp_path / "latest.pt"
    assert [read_checkpoint(path)["epoch"] for path in (latest, previous(latest))] == [2, 1]
    checkpoint.load_weights(tmp_path / "best.safetensors", torch.nn.Linear(4, 4))
    assert {path.name for path in tmp_path.iterdir()} == {"latest.pt", "latest.previous.pt", "best.safetensors"}


def test_damage_anywhere_is_found(tmp_path):
    "Cut anywhere, or with any byte changed, a checkpoint is an error or what it was."
    file, rng = tmp_path / "latest.pt", random.Random(1)
    save_checkpoint(file, state_of(7))
    content, found = file.read_bytes(), 0
    places = [rng.randrange(len(content)) for _ in range(150)] + list(range(0, 400, 3)) + \
        [len(content) - n for n in range(1, 400, 3)]
    for place in places:
        changed = content[place] ^ (1 << rng.randrange(8))
        for broken in (content[:place], content[:place] + bytes([changed]) + content[place + 1:]):
            file.write_bytes(broken)
            try: assert loaded(file) == 7
            except UserError as error:
                assert "latest.pt" in str(error) and "latest.previous.pt" in str(error)
                found += 1
    assert found > len(places) * 1.5


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused(zipped, tmp_path, monkeypatch):
    class Code:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "this ran"),)
    file = tmp_path / "latest.pt"
    torch.save({"version": 2, "epoch": Code()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused|damaged"): load_checkpoint(file)
    assert not (tmp_path / "this ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "this ran").exists(), "the pickle was harmless"


def test_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for file in (Path("latest.pt"), Path("runs/latest.pt"), Path("runs/../other.pt")):
        for epoch in (1, 2): save_checkpoint(file, state_of(epoch))
        assert loaded(file) == 2 and read_checkpoint(previous(file))["epoch"] == 1


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from tritoncls.checkpoint import resumable
from tritoncls.cli import run, run_config
torch.set_num_threads(1)
KEYS = ["solver.max_epoch=4", "model.args.widths=[8]", "batch_size=128", "device=cpu", "log_every_n_iter=2"]

def begin(folder):
    "Train in a process of its own; the modules are loaded already."
    child = os.fork()
    if child: return child
    sys.stdout = open(os.devnull, "w")
    try: run(run_config(None, resumable(folder), [*KEYS, f"output_dir={folder}"]), resumable(folder))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def weights(folder): return [(folder / f"dumped_{name}.safetensors").read_bytes() for name in ("model", "ema_model")]

here, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
began = time.perf_counter()
assert os.waitpid(begin(here / "straight"), 0)[1] == 0
whole, want, killed = time.perf_counter() - began, weights(here / "straight"), 0
for n in range(20):
    folder = here / f"killed{n}"
    child = begin(folder)
    time.sleep(draw.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if not resumable(folder): shutil.rmtree(folder, ignore_errors=True)
    assert os.waitpid(begin(folder), 0)[1] == 0, folder
    assert weights(folder) == want, folder
print(f"{killed} of 20 were killed while they ran")
assert killed >= 10
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_20_random_moments_and_resumed_to_the_same_bytes(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "0"], capture_output=True, text=True,
                          timeout=800)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]
