"Several processes, as torchrun starts them: the numbers of one process, and an end for all when one fails."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode

from tritoncls.checkpoint import read_checkpoint
from tritoncls.config import load_config
from tritoncls.data import Keys, build_dataloaders
from tritoncls.distributed import with_synced_norms
from tritoncls.hooks import read_log
from tritoncls.models import build_model
from tritoncls.runtime import UserError

ROOT = Path(__file__).parent.parent

# A network without batch norm, and hooks that break a run at a certain moment.
PARTS = """
import os, signal, time
from torch import nn
from tritoncls.hooks import BaseHook, default_hooks
from tritoncls.registry import registers

class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.linear, self.dropout = nn.Linear(24, 24), nn.Dropout(dropout)
    def forward(self, x): return x + self.dropout(self.linear(x).relu())

class Net(nn.Module):
    def __init__(self, num_classes, dropout=0.0):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 3, 3, 2, 1), nn.Sequential(Block(dropout), Block(dropout))
        self.flat, self.head = nn.Linear(48, 24), nn.Linear(24, num_classes)
        self.double()  # so that what is left is not rounding
    def forward(self, x):
        x = self.stem(x.to(self.stem.weight.dtype)).relu().flatten(1)
        return self.head(self.blocks(self.flat(x)))

class Saboteur(BaseHook):
    def before_iter(self):
        p, t = self.trainer.progress, self.trainer
        if (p.epoch, p.iter, t.rank) != (2, 2, 1) or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0": return
        if os.environ["SABOTAGE"] == "terminate": return os.kill(os.getpid(), signal.SIGTERM)
        open("failed_at", "w").write(str(time.time()))
        if os.environ["SABOTAGE"] == "kill": os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("rank 1 has had enough")

@registers.hooks.register("Sabotaged")
def sabotaged(cfg, test_loader, resume=False): return [*default_hooks(cfg, test_loader, resume), Saboteur()]
"""

QUICK = ["model.name=parts:Net", "model.args={}", "device=cpu", "batch_size=64", "solver.max_epoch=2", "solver.warmup_epochs=1",
         "model_ema.start_epoch=1"]


def leftovers(token: str) -> list[str]:
    "Processes that were started with this token and still live."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes() and (folder / "stat").read_text().split()[2] != "Z":
                found.append((folder / "cmdline").read_text())
        except OSError: pass
    return found


def launch(folder: Path, processes: int, *program: str, torchrun: tuple = ("--standalone",), limit: int = 120, **env: str):
    "Run a program by torchrun, or, with 0 processes, by itself; it ends in time and leaves no process behind."
    (folder / "parts.py").write_text(PARTS)
    token = uuid.uuid4().hex
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *torchrun] if processes else []
    ended = None
    try:
        ended = subprocess.run(
            [sys.executable, *many, *program], cwd=folder, capture_output=True, text=True, timeout=limit,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKEN": token, **env})
    finally:
        end = time.monotonic() + 10
        while (left := leftovers(token)) and ended and time.monotonic() < end: time.sleep(0.2)
        for process in Path("/proc").glob("[0-9]*") if left else ():
            try:
                if token.encode() in (process / "environ").read_bytes(): os.kill(int(process.name), signal.SIGKILL)
            except (OSError, ProcessLookupError): pass
    assert not left, left
    return ended


def train(folder: Path, processes: int, *keys: str, **options):
    return launch(folder, processes, "-m", "tritoncls.cli", "train", *keys, **options)


def trained(folder: Path, processes: int, *keys: str, **options):
    ended = train(folder, processes, *keys, **options)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return ended


def assert_close(got: dict, want: dict, rtol: float = 1e-6):
    "Each tensor, relative to its norm."
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp(min=1e-12)
        assert error <= rtol, (name, error.item())


STEPS = """
import sys, torch
from tritoncls import cli
from tritoncls.config import load_config, override
from tritoncls.distributed import process_group, whole
from tritoncls.ema import local
from tritoncls.runtime import rank
base = load_config(overrides=sys.argv[2:])

def steps(cfg, name):
    trainer, gradients, clipped, storages = cli.build_trainer(cfg), [], [], []
    trainer.hooks = []
    clip, params = trainer.modify_grad, trainer.solver.params
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    names = [n for group in trainer.solver.optimizer.param_groups for n in group["param_names"]]
    now = lambda: {n: full(p.grad).clone() for n, p in zip(names, params)}
    def modify_grad():
        gradients.append(now())
        storages.append({local(p.grad).untyped_storage().data_ptr() for p in params})
        clip()
        clipped.append(now())
    trainer.modify_grad = modify_grad
    trainer.solver.set_lr(1)
    trainer.train()
    indices = [keys[:, 0].tolist() for keys in trainer.dataloader.keys]
    state = dict(gradients=gradients, clipped=clipped, storages=storages, model=whole(trainer.model).state_dict(),
                 ema=whole(trainer.ema.module).state_dict(), indices=indices, lr=trainer.solver.lr)
    torch.save(state, f"{sys.argv[1]}/{name}-{rank()}.pt")

with process_group(base):
    for strategy in ("ddp", "fsdp"): steps(override(base, f"distributed.strategy={strategy}"), strategy)
    leads = rank() == 0
if leads: steps(override(base, "batch_size=96", "solver.basic_lr=0.04"), "one")
"""


SLOW_STEPS = [(4, "sgd", "norm"), (2, "sgd", "value"), (2, "sgd", "adaptive"),
              *((2, optimizer, "norm") for optimizer in ("adam", "adamw", "lamb", "lars"))]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("world", "optimizer", "clip"), [
    (2, "sgd", "norm"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_STEPS)])
def test_processes_take_the_steps_of_one(world, optimizer, clip, tmp_path):
    "Gradients, weights, average and the order of the images, DDP and FSDP, with accumulation and a short last group."
    (tmp_path / "steps.py").write_text(STEPS)
    keys = [*QUICK, "solver.max_epoch=1", "solver.accumulation_steps=2", "output_dir=run", "model_ema.start_epoch=0",
            f"solver.optimizer={optimizer}", f"solver.grad_clip.name={clip}", "solver.grad_clip.max_norm=0.1",
            "solver.grad_clip.lower=-0.001", "solver.grad_clip.upper=0.002"]
    ended = launch(tmp_path, world, "steps.py", ".", *keys, f"batch_size={96 // world}", f"solver.basic_lr={0.04 / world}")
    assert ended.returncode == 0, ended.stderr
    want = torch.load(tmp_path / "one-0.pt")
    assert len(want["indices"]) == 14 and len(want["gradients"]) == 7 and want["lr"] == 0.04
    for whole, clipped in zip(want["gradients"], want["clipped"], strict=True):
        assert not torch.equal(whole["flat.weight"], clipped["flat.weight"])
    for strategy in ("ddp", "fsdp"):
        found = [torch.load(tmp_path / f"{strategy}-{rank}.pt") for rank in range(world)]
        assert interleaved(*(f["indices"] for f in found)) == want["indices"] and found[0]["lr"] == 0.04
        for part in ("gradients", "clipped"):
            for got, gradient in zip(found[0][part], want[part], strict=True): assert_close(got, gradient)
        for part in ("model", "ema"):
            assert_close(found[0][part], want[part])
            assert all(torch.equal(found[0][part][name], f[part][name]) for f in found for name in want[part])
        if strategy == "ddp":
            assert len(set.union(*found[0]["storages"][1:])) == 1, "gradients are not views of the one bucket"
    assert len(want["storages"][0]) == len(want["gradients"][0])


def interleaved(*parts: list[list]) -> list[list]:
    "Batches of all processes, from those of each: one image of each in turn."
    return [[x for row in zip(*batches, strict=True) for x in row] for batches in zip(*parts, strict=True)]


def test_every_number_of_processes_has_the_same_batches():
    n, seed = 103, 5
    want = [batch.tolist() for batch in Keys(n, 8, seed, True, epoch=3)]
    assert len(want) == 12
    for world in (1, 2, 4):
        keys = [Keys(n, 8 // world, seed, True, rank, world, epoch=3) for rank in range(world)]
        assert interleaved(*([batch.tolist() for batch in mine] for mine in keys)) == want
        keys = [Keys(n, 8, seed, False, rank, world) for rank in range(world)]
        tests = [[index for batch in mine for index in batch[:, 0].tolist()] for mine in keys]
        assert [index for row in zip_longest(*tests) for index in row if index is not None] == list(range(n))


TOGETHER = """
import sys, torch
from torch.nn.functional import cross_entropy
from tritoncls import cli, hooks
from tritoncls.config import load_config, override
from tritoncls.distributed import process_group
from tritoncls.evaluate import evaluate
from tritoncls.runtime import rank, unwrapped
base = load_config(overrides=sys.argv[1:])

class Notes(hooks.BaseHook):
    "Of this process: loss and accuracy of each iteration, buffers after each epoch's last one, and what is evaluated."
    def __init__(self, trainer):
        self.trainer, self.loss, self.measured, self.before, self.evaluated = trainer, trainer.loss, [], [], []
        trainer.loss, hooks.evaluate = self, self.evaluate

    def evaluate(self, module, *args, **options):
        self.evaluated.append({name: t.clone() for name, t in module.state_dict().items()})
        return evaluate(module, *args, **options)

    def with_accuracy(self, logits, target):
        loss = cross_entropy(logits.detach().double(), target, label_smoothing=base.loss.label_smooth)
        self.measured.append([loss.item(), 100 * (logits.argmax(1) == target).double().mean().item()])
        return self.loss.with_accuracy(logits, target)

    def before_epoch(self):
        for name, buffer in self.trainer.model.named_buffers():
            if name.endswith("num_batches_tracked"): buffer += 7 * rank()

    def after_iter(self):
        p = self.trainer.progress
        if p.iter == p.max_iter: self.before += [{name: b.clone() for name, b in unwrapped(module).named_buffers()}
                                                 for module in (self.trainer.model, self.trainer.ema.module)]

with process_group(base):
    for strategy in ("ddp", "fsdp"):
        cfg = override(base, f"distributed.strategy={strategy}", f"output_dir={strategy}")
        trainer = cli.build_trainer(cfg)
        if rank() == 0: cli.open_folder(cfg)
        trainer.hooks.insert(0, notes := Notes(trainer))
        trainer.train()
        found = dict(measured=notes.measured, before=notes.before, evaluated=notes.evaluated)
        torch.save(found, f"{strategy}-{rank()}.pt")
"""
TOGETHER_KEYS = ["model.args.widths=[4,8]", "device=cpu", "batch_size=64", "solver.max_epoch=2", "solver.warmup_epochs=1",
                 "model_ema.start_epoch=0", "log_every_n_iter=4"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    "Two processes, DDP and FSDP: the log of each run, and what each process has noted."
    folder = tmp_path_factory.mktemp("together")
    (folder / "together.py").write_text(TOGETHER)
    ended = launch(folder, 2, "together.py", *TOGETHER_KEYS)
    assert ended.returncode == 0, ended.stderr
    return {strategy: (folder / strategy / "log.jsonl", *(torch.load(folder / f"{strategy}-{rank}.pt") for rank in range(2)))
            for strategy in ("ddp", "fsdp")}


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_process_evaluates_with_the_mean_of_their_statistics(strategy, together):
    "Of model and average, after both epochs; counts of batches are those of process 0."
    log, first, second = together[strategy]
    assert len(first["evaluated"]) == len(second["evaluated"]) == 4
    parts = (found[part] for part in ("before", "evaluated") for found in (first, second))
    for mine, others, *evaluated in zip(*parts, strict=True):
        assert len(mine) == 18 and not any(torch.equal(mine[name], others[name]) for name in mine)
        want = {name: (t.double() + others[name].double()) / 2 if t.is_floating_point() else t for name, t in mine.items()}
        for got in evaluated: assert_close({name: got[name] for name in want}, want, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_log_speaks_of_all_processes(strategy, together):
    "Loss and accuracy of every interval beside PyTorch's; the evaluations' epochs, and accuracies as one process finds them."
    log, first, second = together[strategy]
    measured, since = torch.tensor([first["measured"], second["measured"]], dtype=torch.float64), 0
    assert [record["step"] + 1 for record in read_log(log, "train")] == [4, 8, 11, 15, 19, 22]
    for record in read_log(log, "train"):
        interval, since = measured[:, since:record["step"] + 1].mean(1), record["step"] + 1
        assert (interval[0] - interval[1]).abs().min() > 1e-3
        assert (record["loss"], record["acc1"]) == pytest.approx(interval.mean(0).tolist(), rel=1e-6)

    records = read_log(log, "eval")
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 11), (2, 22)]
    model, test = build_model(cfg := load_config(overrides=TOGETHER_KEYS)).double().eval(), build_dataloaders(cfg)[1]
    images, target = (torch.cat(parts) for parts in zip(*test, strict=True))
    samples = (images.double() - cfg.preprocess.img_mean[0]) / cfg.preprocess.img_std[0]
    accuracies = [record[name] for record in records for name in ("model", "ema")]
    for state, accuracy in zip(first["evaluated"], accuracies, strict=True):
        model.load_state_dict(state)
        with torch.no_grad(): hits = (model(samples).argmax(1) == target).sum().item()
        assert accuracy["count"] == 360 and accuracy["acc1"] == pytest.approx(100 * hits / 360, rel=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_machines_train_as_one_with_two_processes(tmp_path):
    "Two agents with a process each, which meet at an address."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--local-addr", "localhost")

    def machine(name):
        (tmp_path / name).mkdir()
        return trained(tmp_path / name, 1, *QUICK, f"output_dir={tmp_path}/two", torchrun=meet, limit=60)
    with ThreadPoolExecutor() as pool: outputs = [ended.stdout for ended in pool.map(machine, ("here", "there"))]
    assert sum("360 test images" in output for output in outputs) == 1
    trained(tmp_path, 2, *QUICK, "output_dir=one")
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2
    for name in ("dumped_model.safetensors", "dumped_ema_model.safetensors"):
        two, one = (load_file(tmp_path / folder / name) for folder in ("two", "one"))
        assert all(torch.equal(two[key], one[key]) for key in one)


@pytest.mark.timeout(150)
@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_process_that_fails_ends_all(how, tmp_path):
    ended = train(tmp_path, 2, *QUICK, "output_dir=run", "imports=[parts]", "hooks_name=Sabotaged", SABOTAGE=how)
    assert ended.returncode != 0
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 30
    if how == "raise": assert "ArithmeticError: rank 1 has had enough" in ended.stderr
    else: assert "SIGKILL" in ended.stderr and "rank      : 1" in ended.stderr
    assert read_checkpoint(tmp_path / "run/latest.pt")["epoch"] == 1
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_restarts_from_the_last_checkpoint(strategy, tmp_path):
    keys = [*QUICK, f"distributed.strategy={strategy}", "model.args.dropout=0.2"]
    trained(tmp_path, 2, *keys, "output_dir=straight")
    trained(tmp_path, 2, *keys, "output_dir=run", "imports=[parts]", "hooks_name=Sabotaged", SABOTAGE="kill",
            torchrun=("--standalone", "--max-restarts", "1"))
    assert (tmp_path / "failed_at").exists()
    for name in ("dumped_model.safetensors", "dumped_ema_model.safetensors"):
        straight, run = (load_file(tmp_path / folder / name) for folder in ("straight", "run"))
        assert all(torch.equal(straight[key], run[key]) for key in straight)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_that_were_told_to_leave_go_on_where_they_were(strategy, tmp_path):
    "The signal reaches one process, in the middle of an epoch."
    keys = [*QUICK, f"distributed.strategy={strategy}"]
    trained(tmp_path, 2, *keys, "output_dir=straight")
    ended = train(tmp_path, 2, *keys, "output_dir=run", "imports=[parts]", "hooks_name=Sabotaged", SABOTAGE="terminate")
    assert ended.returncode == 1 and "SIGTERM: run/latest.pt holds the run up to 10 iterations of epoch 2" in ended.stderr
    state = read_checkpoint(tmp_path / "run/latest.pt")
    assert (state["epoch"], state["iter"], state["images"]) == (1, 10, 1280)
    trained(tmp_path, 2, "--resume", "output_dir=run", "hooks_name=DefaultHooks")
    for name in ("dumped_model.safetensors", "dumped_ema_model.safetensors"):
        straight, run = (load_file(tmp_path / folder / name) for folder in ("straight", "run"))
        assert all(torch.equal(straight[key], run[key]) for key in straight)


@pytest.mark.timeout(60)
def test_a_restart_needs_a_folder(monkeypatch, capsys):
    from tritoncls import cli

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(sys, "argv", ["tritoncls", "train"])
    with pytest.raises(SystemExit): cli.main()
    assert "output_dir" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_with_two_then_one_then_four_processes(strategy, tmp_path):
    "The joined batch stays 64; each part of the way equals the run of one process."
    keys = ["distributed.strategy=" + strategy, "output_dir=run"]
    scaled = lambda world: [f"batch_size={64 // world}", f"solver.basic_lr={0.2 / world}"]
    plain = [*QUICK, "solver.max_epoch=3", "model_ema.start_epoch=1"]
    trained(tmp_path, 0, *plain, *scaled(1), "output_dir=straight")
    (tmp_path / "stop.py").write_text("""
import os
from tritoncls.hooks import BaseHook, default_hooks
from tritoncls.registry import registers

class Stop(BaseHook):
    def after_epoch(self):
        if self.trainer.progress.epoch == int(os.environ["STOP"]): raise SystemExit(7)

@registers.hooks.register("Stops")
def stops(cfg, test_loader, resume=False): return [*default_hooks(cfg, test_loader, resume), Stop()]
""")
    stops = ["imports=[stop]", "hooks_name=Stops"]
    for world, stop, resume in ((2, "1", ()), (0, "2", ("--resume",)), (4, "9", ("--resume",))):
        given = plain if not resume else []
        ended = train(tmp_path, world, *resume, *given, *keys, *stops, *scaled(max(1, world)), STOP=stop, limit=200)
        assert (ended.returncode == 0) == (stop == "9"), ended.stderr[-4000:]
        sharded = (tmp_path / "run/latest.pt").is_dir()
        assert sharded == (strategy == "fsdp" and world > 0)
    for name in ("dumped_model.safetensors", "dumped_ema_model.safetensors"):
        assert_close(*(load_file(tmp_path / folder / name) for folder in ("run", "straight")), rtol=1e-6)
    summaries = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("run", "straight")]
    assert [s["test_size"] for s in summaries] == [360, 360] and summaries[0]["world_size"] == 4
    assert abs(summaries[0]["acc1"] - summaries[1]["acc1"]) <= 100 / 360 + 1e-9

    for ema, part in (((), "model"), (("--ema",), "ema_model")):
        merge = launch(tmp_path, 0, "-m", "tritoncls.cli", "weights", "run/latest.pt", f"{part}.safetensors", *ema)
        assert merge.returncode == 0, merge.stderr
        got, want = load_file(tmp_path / f"{part}.safetensors"), load_file(tmp_path / f"run/dumped_{part}.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_training_equals_data_parallel_with_batch_norm(tmp_path):
    "A residual network: weights, average, buffers and accuracies; the precise statistics of both; each test image once."
    keys = ["model.args.widths=[8,16]", "device=cpu", "batch_size=64", "solver.max_epoch=2", "solver.warmup_epochs=1",
            "model_ema.start_epoch=1", "save_every_n_epoch=1", "bn.precise_every_n_epoch=2", "bn.num_samples_precise=256"]
    for strategy in ("ddp", "fsdp"):
        trained(tmp_path, 2, *keys, f"distributed.strategy={strategy}", f"output_dir={strategy}")
    for name in ("dumped_model.safetensors", "dumped_ema_model.safetensors"):
        assert_close(*(load_file(tmp_path / strategy / name) for strategy in ("fsdp", "ddp")), rtol=1e-4)
    files = {path.name for path in (tmp_path / "fsdp").iterdir()}
    assert {"latest.pt", "latest.previous.pt", "epoch1.pt", "epoch2.pt", "best_model.safetensors"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    names = ("latest.previous", "epoch1", "latest", "epoch2")
    assert [read_checkpoint(tmp_path / f"fsdp/{name}.pt")["epoch"] for name in names] == [1, 1, 2, 2]
    for name, tensor in read_checkpoint(tmp_path / "fsdp/latest.pt")["model"].items():
        want = read_checkpoint(tmp_path / "ddp/latest.pt")["model"][name]
        assert tensor.shape == want.shape and tensor.dtype == want.dtype

    lines = []
    for world in (0, 4):
        ended = launch(tmp_path, world, "-m", "tritoncls.cli", "test", "-w", "fsdp/dumped_model.safetensors", "--per-class")
        assert ended.returncode == 0, ended.stderr
        lines.append(ended.stdout)
    assert lines[0] == lines[1] and "on 360 test images" in lines[0]


SHARDS = """
import threading, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from concurrent.futures import TimeoutError
from pathlib import Path
from torch import nn
from torch.distributed.tensor import DTensor
from tritoncls.config import load_config
from tritoncls.distributed import process_group, shard
from tritoncls.ema import ModelEma
from tritoncls.runtime import rank
from tritoncls.sharded import read_sharded, save_sharded

with process_group(load_config(overrides=["device=cpu"])):
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Linear(30, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)))
    ema = ModelEma(model, momentum=0.5)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]
    def step():
        model(torch.ones(4, 30) * torch.arange(4)[:, None]).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        ema.update()
    step()
    one = lambda t: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone()
    full = lambda module: {n: one(t) for n, t in module.state_dict().items()}
    before = {"model": full(model), "ema": full(ema.module)}
    paths = [(Path("latest.pt"), Path("latest.previous.pt"))]
    gate, write = threading.Event(), dcp.FileSystemWriter.write_data
    def held_up(*args):
        assert gate.wait(30), "training waits for the writer"
        return write(*args)
    dcp.FileSystemWriter.write_data = held_up
    saving = save_sharded(paths, {"model": model.state_dict(), "ema": ema.module.state_dict()})
    step()  # changes every tensor before it is written
    try: saving.result(timeout=0.5)
    except TimeoutError: gate.set()
    else: raise AssertionError("result() does not wait for the writer")
    assert not Path("latest.pt").exists()
    saving.result()
    dist.barrier()
    assert not torch.equal(full(model)["0.weight"], before["model"]["0.weight"])
    got = read_sharded(Path("latest.pt"))
    for part in before:
        for name in before[part]: assert torch.equal(got[part][name], before[part][name]), (part, name)
    place = lambda path, like: torch.empty_like(dict(model=model, ema=ema.module)[path[0]].state_dict()[path[1]])
    got = read_sharded(Path("latest.pt"), place)
    for name, tensor in got["model"].items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, before["model"][name])
    if rank() == 0:
        stored = sum(f.stat().st_size for f in Path("latest.pt").glob("*.distcp"))
        assert len(list(Path("latest.pt").glob("*.distcp"))) == dist.get_world_size()
        print("bytes", stored)
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_checkpoints_hold_what_was_there_when_they_began(processes, tmp_path):
    (tmp_path / "shards.py").write_text(SHARDS)
    ended = launch(tmp_path, processes, "shards.py")
    assert ended.returncode == 0, ended.stderr[-5000:]


def test_mistakes_are_told_before_anything_starts():
    assert load_config(overrides=["distributed.strategy=fsdp"]).distributed.strategy == "fsdp"
    for wrong in ("distributed.strategy=dp", "distributed.timeout=0", "distributed.backend=mpi"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]): load_config(overrides=[wrong])


def normalised(device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model[1].running_mean.normal_()
    return model


def test_synced_norms_are_for_gpus_and_have_a_name_of_their_own():
    with pytest.raises(UserError, match="distributed.sync_bn: PyTorch has it for GPUs only"):
        with_synced_norms(normalised("cpu"), load_config())
    with FakeTensorMode():
        for known in ("SyncBatchNorm", "_BatchNorm"):
            cfg = load_config(overrides=[f"solver.weight_decay=[[0.0, [BatchNorm2d, {known}]], 0.1]"])
            assert type(with_synced_norms(normalised("cuda"), cfg)[1]) is nn.SyncBatchNorm
        with pytest.raises(UserError, match="BatchNorm2d: with distributed.sync_bn they are called SyncBatchNorm"):
            with_synced_norms(normalised("cuda"), load_config(overrides=["solver.weight_decay=[[0.0, [BatchNorm2d]], 0.1]"]))


@pytest.mark.cuda
def test_synced_norms_of_one_process_are_plain_norms(tmp_path):
    plain, x = normalised("cuda"), torch.randn(5, 3, 8, 8, device="cuda")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        synced = with_synced_norms(normalised("cuda"), load_config())
        assert type(synced[1]) is nn.SyncBatchNorm and synced.state_dict().keys() == plain.state_dict().keys()
        for model in (synced.train(), plain.train()): model(x).square().sum().backward()
    finally: torch.distributed.destroy_process_group()
    for got, want in zip(synced.state_dict().values(), plain.state_dict().values(), strict=True): assert torch.equal(got, want)
    torch.testing.assert_close([p.grad for p in synced.parameters()], [p.grad for p in plain.parameters()])
    torch.testing.assert_close(synced(x), plain(x))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(200)
def test_an_epoch_takes_no_longer_than_by_hand(tmp_path):
    ended = launch(tmp_path, 0, str(ROOT / "benchmarks/cpu_trainer.py"), limit=180)
    assert ended.returncode == 0, ended.stderr
    assert float(re.search(r"ratio (\S+)", ended.stdout)[1]) <= 1.15, ended.stdout
