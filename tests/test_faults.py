"""Runs that are killed, told to leave, interrupted, out of disk, or without a loss: how they end, and that they go on.

Each is a process of its own with a limit of its own, and leaves none behind.
"""
import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_distributed import train, trained
import torch

from tritoncls.checkpoint import load_checkpoint
from tritoncls.config import load_config
from tritoncls.data import Keys, build_dataloaders, digits_split
from tritoncls.faults import INTERRUPTED, NAN_BATCHES, PREEMPTED
from tritoncls.sharded import tensors_of

# Hooks and losses for the runs: one that says when an iteration is over and waits a little, one that kills a reader.
EXTRA = """
import multiprocessing, os, random, signal, threading, time
import torch
from tritoncls.checkpoint import finish_saving
from tritoncls.hooks import BaseHook, default_hooks
from tritoncls.registry import registers

class Says(BaseHook):
    def after_iter(self):
        print("at", self.trainer.progress.current_iter, flush=True)
        time.sleep(0.02)

class KillsReader(BaseHook):
    "At a moment that depends on the seed."
    def after_iter(self):
        if self.trainer.progress.current_iter != 2: return
        rng, readers = random.Random(self.trainer.cfg.seed), multiprocessing.active_children()
        threading.Timer(rng.choice([0, rng.uniform(0, 0.3)]), os.kill, [rng.choice(readers).pid, signal.SIGKILL]).start()

class Fails(BaseHook):
    "From now on, or from the third iteration on, what is written does not reach the disk."
    def __init__(self):
        number, self.when = os.environ["FAILS"].split(" ", 1)
        self.error = OSError(int(number), os.strerror(int(number)))
    def before_train(self): self.fail() if self.when == "at once" else None
    def after_iter(self): self.fail() if self.trainer.progress.current_iter == 2 else None
    def fail(self):
        def fsync(*_): raise self.error
        finish_saving(self.trainer)
        os.fsync = fsync

class Crashes(BaseHook):
    def after_iter(self): raise ArithmeticError("never seen")

@registers.hooks.register("Failing")
def failing(cfg, test, resume=False): return [Fails(), *default_hooks(cfg, test, resume)]

@registers.hooks.register("Crashing")
def crashing(cfg, test, resume=False): return [*default_hooks(cfg, test, resume), Crashes()]

@registers.hooks.register("Saying")
def saying(cfg, test, resume=False): return [Says(), *default_hooks(cfg, test, resume)]

@registers.hooks.register("Killing")
def killing(cfg, test, resume=False): return [KillsReader(), *default_hooks(cfg, test, resume)]

@registers.losses.register("Exploding")
def exploding(**options):
    calls = 0
    def loss(logits, target):
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(logits, target) * (float("nan") if calls > 6 else 1.0)
    return loss
"""
SMALL = ("imports=[extra]", "device=cpu", "model.args.widths=[8]", "batch_size=128", "solver.max_epoch=3", "log_every_n_iter=4",
         "solver.accumulation_steps=2")


def command(folder, *more):
    (folder.parent / "extra.py").write_text(EXTRA)
    return dict(args=[sys.executable, "-m", "tritoncls.cli", "train", *SMALL, f"output_dir={folder}", *more], cwd=folder.parent,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                env={**os.environ, "PYTHONWARNINGS": "ignore"})


def alive(group: int) -> list[str]:
    "Processes of a group that have not ended."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: fields = stat.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(fields[2]) == group and fields[0] != "Z": found.append(stat.parent.name)
    return found


@contextmanager
def started(folder, *more, limit=100, **options):
    "A run in a process group of its own, which is empty afterwards."
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
    run = subprocess.Popen(**command(folder, *more) | {"preexec_fn": hears} | options)
    try:
        yield run
        run.communicate(timeout=limit) if run.returncode is None else None
        end = time.monotonic() + 10
        while alive(run.pid) and time.monotonic() < end: time.sleep(0.1)
        assert not alive(run.pid), "processes are left"
    finally:
        if alive(run.pid): os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def finished(folder, *more, **options):
    "Exit code, stdout and stderr of a run."
    with started(folder, *more, **options) as run: out, err = run.communicate(timeout=100)
    return run.returncode, out, err


def signalled(folder, number, step, *more, send=os.kill):
    "A run that gets a signal after an iteration, counted from 0: exit code and stderr."
    with started(folder, "hooks_name=Saying", *more) as run:
        for line in run.stdout:
            if line == f"at {step}\n": break
        send(run.pid, number)
        _, err = run.communicate(timeout=60)
    return run.returncode, err


def group_of_one():
    "The environment of a process that torchrun has started alone."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]))


def largest(path):
    "Bytes of a file, or of the largest one in a folder."
    return max(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def weights(folder):
    "Tensors as bytes; the header beside them names the run's own hooks."
    files = [load_file(folder / f"dumped_{name}.safetensors") for name in ("model", "ema_model")]
    return [{name: tensor.numpy().tobytes() for name, tensor in file.items()} for file in files]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("send", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_a_run_that_is_told_to_leave_saves_the_iteration(send, tmp_path):
    "SIGTERM in the second epoch, to the run alone, or to the processes that read for it, too."
    code, err = signalled(tmp_path / "run", signal.SIGTERM, 14, f"data.num_workers={2 * (send is os.killpg)}", send=send)
    assert code == PREEMPTED == 143 and err.startswith("SIGTERM: ") and "Traceback" not in err
    state = load_checkpoint(tmp_path / "run" / "latest.pt")
    assert state["epoch"] == 1 and state["iter"] in (4, 6, 8) and f"{state['iter']} iterations of epoch 2" in err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_told_to_leave_again_and_again(tmp_path):
    """With processes that read, and groups of micro-batches that do not come out even.

    What the run leaves behind has the bytes of a run that nobody has disturbed.
    """
    more = ("solver.accumulation_steps=3", "data.num_workers=2", "solver.lr_per_iter=true", "model_ema.start_epoch=1")
    code, step, resume, places = PREEMPTED, 1, [], []
    while code == PREEMPTED:
        code, err = signalled(tmp_path / "run", signal.SIGTERM, step, *more, *resume)
        state = load_checkpoint(tmp_path / "run" / "latest.pt")
        places.append((state["epoch"], state["iter"]))
        assert code in (0, PREEMPTED) and state["iter"] % 3 == 0 or state["iter"] == 11
        step, resume = max(step + 5, 11 * state["epoch"] + state["iter"] + 2), ["--resume"]
    assert code == 0 and places == sorted(set(places)) and len(places) > 3
    assert finished(tmp_path / "straight", *more)[0] == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


@pytest.mark.timeout(240)
def test_an_interrupted_run_ends_with_one_line(tmp_path):
    code, err = signalled(tmp_path / "run", signal.SIGINT, 5)
    assert code == INTERRUPTED == 130
    assert err == f"interrupted; --resume output_dir={tmp_path}/run goes on from the last checkpoint\n"
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["kind"] == "train" and records[0]["step"] == 3, "the log was not closed"


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLED_READERS", "3"))))
def test_a_reader_that_dies_ends_the_run_with_the_same_line(seed, tmp_path):
    code, _, err = finished(tmp_path / "run", "data.num_workers=2", "hooks_name=Killing", "data.name=FakeData", f"seed={seed}",
                            "data.length=20000", "preprocess.img_size=8")
    assert code == 1
    way = f"--resume output_dir={tmp_path}/run goes on from {tmp_path}/run/latest.pt"
    assert re.fullmatch(r"error: a process that reads images \(pid \d+\) was killed by signal 9 \(Killed\); often memory has "
                        rf"run out, and fewer data.num_workers need less; {re.escape(way)}\n", err), err


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_full_disk_ends_the_run_with_a_line_and_the_checkpoint_stays(strategy, tmp_path):
    "The limit on the size of a file lets the first checkpoint through; the next one holds the optimizer's momentum, too."
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0], sizes[0]))
    def ended(folder, *more, **options): return finished(folder, *more, f"distributed.strategy={strategy}", env=env, **options)
    env = command(tmp_path / "run")["env"] | (group_of_one() if strategy == "fsdp" else {})
    assert ended(tmp_path / "free", "solver.max_epoch=1")[0] == 0
    sizes = [largest(tmp_path / "free" / name) for name in ("latest.previous.pt", "latest.pt")]
    assert sizes[0] < sizes[1]
    code, _, err = ended(tmp_path / "run", preexec_fn=limit)
    assert code == 1 and "Traceback" not in err
    assert f"error: {tmp_path}/run/latest.pt could not be written: " in err and "File too large" in err
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["epoch"] == 0
    assert not list((tmp_path / "run").glob(".*")) and ended(tmp_path / "run", "--resume")[0] == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "when", "strategy"), [
    (errno.ENOSPC, "later", "ddp"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (errno.ENOSPC, "later", "fsdp"), (errno.ENOSPC, "at once", "ddp"), (errno.EDQUOT, "later", "ddp"),
        (errno.EIO, "later", "ddp"), (errno.EIO, "later", "fsdp"), (errno.EIO, "at once", "ddp")))])
def test_advice_is_given_where_it_helps(number, when, strategy, tmp_path):
    "Room is only wanted where it is lacking, and nobody can go on where there is no checkpoint."
    folder, keys = tmp_path / "run", ("hooks_name=Failing", f"distributed.strategy={strategy}", "eval_every_n_epoch=9")
    env = command(folder)["env"] | {"FAILS": f"{number} {when}"} | (group_of_one() if strategy == "fsdp" else {})
    code, _, err = finished(folder, *keys, env=env)
    assert code == 1 and "Traceback" not in err and err.count("\n") == 1, err
    said = [f"error: {folder}/latest.pt could not be written: [Errno {number}] {os.strerror(number)}"]
    if number != errno.EIO: said.append("make room")
    if when == "later": said.append(f"--resume output_dir={folder} goes on from {folder}/latest.pt")
    assert err == "; ".join(said) + "\n" and (folder / "latest.pt").exists() == (when == "later")


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_crash_says_how_to_go_on_too(tmp_path):
    folder = tmp_path / "run"
    code, _, err = finished(folder, "hooks_name=Crashing")
    assert code == 1 and "Traceback" in err
    assert err.endswith(f"ArithmeticError: never seen\n--resume output_dir={folder} goes on from {folder}/latest.pt\n")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_loss_that_is_nan_for_too_long_ends_the_run(tmp_path):
    code, _, err = finished(tmp_path / "run", "loss.name=Exploding", "max_nan_iters=3", "seed=7")
    path = tmp_path / "run" / NAN_BATCHES
    assert code == 1 and "Traceback" not in err and str(path) in err and "3 times in a row" in err
    rows = json.loads(path.read_text())
    assert [(row["epoch"], row["iter"], row["loss"]) for row in rows] == [(1, i, "nan") for i in (7, 8, 9)]
    order = list(Keys(len(digits_split()[0]), 128, 7, True))
    assert [row["images"] for row in rows] == [order[i][:, 0].tolist() for i in (6, 7, 8)]
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["epoch"] == 0


LOSES_NUMBERS = {  # the loss is NaN from iteration 6 on; what is configured -> epochs in the last good checkpoint
    ("batch_size=400",): 2, ("max_nan_iters=100",): 0, ("max_nan_iters=0", "batch_size=250"): 1,
    ("batch_size=400", "distributed.strategy=fsdp"): 2}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("keys", [
    ("batch_size=400",), *(pytest.param(keys, marks=pytest.mark.slow) for keys in [*LOSES_NUMBERS][1:])])
def test_nothing_good_is_overwritten_by_nan(keys, tmp_path):
    "The run ends when it would save NaN, and says what to go on from, which works."
    folder, env = tmp_path / "run", command(tmp_path / "run")["env"]
    if "distributed.strategy=fsdp" in keys: env |= group_of_one()
    code, _, err = finished(folder, "loss.name=Exploding", "solver.max_epoch=9", "save_every_n_epoch=1", *keys, env=env)
    assert code == 1 and "Traceback" not in err and err.count("\n") == 1
    assert f"--resume output_dir={folder} goes on from {folder}/latest.pt" in err
    for name in ("latest.pt", "latest.previous.pt"):
        if not (folder / name).exists() and not LOSES_NUMBERS[keys]: continue
        state = load_checkpoint(folder / name)
        assert all(t.isfinite().all() for t in tensors_of(state).values())
        assert state["epoch"] == LOSES_NUMBERS[keys] - (name != "latest.pt")
    assert not (folder / f"epoch{LOSES_NUMBERS[keys] + 1}.pt").exists()
    more = ("--resume", f"output_dir={folder}", "loss.name=CrossEntropy", "solver.max_epoch=3")
    code, _, err = finished(folder, *more, *keys, env=env)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_end_where_nan_would_be_saved(strategy, tmp_path):
    command(tmp_path / "run")
    began, keys = time.monotonic(), ("batch_size=200", "loss.name=Exploding", f"distributed.strategy={strategy}")
    ended = train(tmp_path, 2, *SMALL, *keys, "output_dir=run")
    assert ended.returncode == 1 and time.monotonic() - began < 100
    assert "which is not saved; --resume output_dir=run goes on from run/latest.pt; " in ended.stderr, ended.stderr
    state = load_checkpoint(tmp_path / "run/latest.pt")
    assert state["epoch"] == 2 and all(t.isfinite().all() for t in tensors_of(state).values())
    trained(tmp_path, 2, "--resume", "output_dir=run", "loss.name=CrossEntropy")


# The loader's part


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_are_left_out_are_not_read(num_workers, tmp_path):
    cfg = load_config(overrides=["batch_size=64", f"data.num_workers={num_workers}"])
    loader = build_dataloaders(cfg)[0]
    loader.set_epoch(2)
    whole = list(loader)
    read = []

    class Watched(type(loader.data)):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)
    loader.data.__class__ = Watched if num_workers == 0 else type(loader.data)
    for done in (0, 1, 5, len(loader)):
        read.clear()
        rest = list(loader.after(done))
        assert len(rest) == len(whole) - done and (num_workers or len(read) == 64 * len(rest))
        for (a, x), (b, y) in zip(rest, whole[done:], strict=True): assert torch.equal(a, b) and torch.equal(x, y)
    assert len(list(loader)) == len(loader) == len(whole)


# Several processes


def leaving(rank, folder):
    "One of two processes is told to leave; both do, after the same iteration."
    import torch.distributed as dist

    from tritoncls.faults import Preempted, PreemptionHook
    from tritoncls.models import build_model
    from tritoncls.runtime import seed_everything
    from tritoncls.solver import build_solver
    from tritoncls.trainer import ClsTrainer
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        cfg = load_config(overrides=["batch_size=64", "model.args.widths=[4]", "solver.max_epoch=9", "log_every_n_iter=3",
                                     "solver.accumulation_steps=2", "device=cpu", f"output_dir={folder}"])
        seed_everything(0)
        model, loader = build_model(cfg), build_dataloaders(cfg, rank=rank, world_size=2)[0]
        trainer = ClsTrainer(cfg, model, loader, build_solver(cfg, model), [hook := PreemptionHook(cfg)], rank, 2)
        step = trainer.train_one_iter

        def train_one_iter():
            if rank == 1 and trainer.progress.current_iter == 4: os.kill(os.getpid(), signal.SIGTERM)
            step()
        trainer.train_one_iter = train_one_iter
        with pytest.raises(Preempted): trainer.train()
        assert hook.asked == (rank == 1) and (trainer.progress.epoch, trainer.progress.iter) == (1, 10)
        dist.barrier()
        state = load_checkpoint(Path(folder) / "latest.pt")
        assert (state["epoch"], state["iter"], state["images"]) == (0, 10, 1280)
    finally: dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_processes_that_share_a_step_leave_after_the_same_one(tmp_path):
    torch.multiprocessing.spawn(leaving, (str(tmp_path),), nprocs=2)
