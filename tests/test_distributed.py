"Several processes, as torchrun starts them: the numbers of one process, and an end for all when one fails."
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tritoncls.checkpoint import read_checkpoint
from tritoncls.config import load_config
from tritoncls.data import Keys

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


def launch(folder: Path, processes: int, *program: str, torchrun: tuple = (), limit: int = 120, **env: str):
    "Run a program by torchrun, or, with 0 processes, by itself; it ends in time and leaves no process behind."
    (folder / "parts.py").write_text(PARTS)
    token = uuid.uuid4().hex
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *torchrun] if processes else []
    ended = None
    try:
        ended = subprocess.run(
            [sys.executable, *many, *program], cwd=folder, capture_output=True, text=True, timeout=limit,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKEN": token, **env})
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
from tritoncls.runtime import rank
base = load_config(overrides=sys.argv[2:])

def steps(cfg, name):
    trainer, gradients = cli.build_trainer(cfg), []
    trainer.hooks = []
    clip = trainer.modify_grad
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    names = [n for group in trainer.solver.optimizer.param_groups for n in group["param_names"]]
    def modify_grad():
        gradients.append({n: full(p.grad).clone() for n, p in zip(names, trainer.solver.params)})
        clip()
    trainer.modify_grad = modify_grad
    trainer.solver.set_lr(1)
    trainer.train()
    indices = [keys[:, 0].tolist() for keys in trainer.dataloader.keys]
    state = dict(gradients=gradients, model=whole(trainer.model).state_dict(), ema=whole(trainer.ema.module).state_dict(),
                 indices=indices, lr=trainer.solver.lr)
    torch.save(state, f"{sys.argv[1]}/{name}-{rank()}.pt")

with process_group(base):
    for strategy in ("ddp", "fsdp"): steps(override(base, f"distributed.strategy={strategy}"), strategy)
    leads = rank() == 0
if leads: steps(override(base, "batch_size=96", "solver.basic_lr=0.4"), "one")
"""


@pytest.mark.timeout(150)
def test_two_processes_take_the_steps_of_one(tmp_path):
    "Gradients, weights, average and the order of the images, DDP and FSDP, with accumulation and a short last group."
    (tmp_path / "steps.py").write_text(STEPS)
    keys = [*QUICK, "solver.max_epoch=1", "solver.accumulation_steps=2", "output_dir=run", "model_ema.start_epoch=0",
            "solver.grad_clip.name=norm", "solver.grad_clip.max_norm=1.0"]
    ended = launch(tmp_path, 2, "steps.py", ".", *keys, "batch_size=48")
    assert ended.returncode == 0, ended.stderr
    want = torch.load(tmp_path / "one-0.pt")
    assert len(want["indices"]) == 14 and len(want["gradients"]) == 7 and want["lr"] == 0.4
    for strategy in ("ddp", "fsdp"):
        first, second = (torch.load(tmp_path / f"{strategy}-{rank}.pt") for rank in range(2))
        joined = [sorted(a + b) for a, b in zip(first["indices"], second["indices"], strict=True)]
        assert joined == [sorted(batch) for batch in want["indices"]] and first["lr"] == 0.4
        for step, gradient in enumerate(want["gradients"]):
            assert_close(first["gradients"][step], gradient)
        for part in ("model", "ema"):
            assert_close(first[part], want[part])
            assert all(torch.equal(first[part][name], second[part][name]) for name in want[part])


def test_every_number_of_processes_has_the_same_batches():
    n, seed = 103, 5
    for world in (1, 2, 4):
        parts = [list(Keys(n, 8 // world, seed, True, rank, world, epoch=3)) for rank in range(world)]
        joined = [sorted(sum((batch.tolist() for batch in batches), [])) for batches in zip(*parts, strict=True)]
        if world == 1: want = joined
        assert joined == want and len(joined) == 12
        tests = [key for rank in range(world) for batch in Keys(n, 8, seed, False, rank, world) for key in batch[:, 0].tolist()]
        assert sorted(tests) == list(range(n))


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
            torchrun=("--max-restarts", "1"))
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
import sys, time, torch, torch.distributed as dist
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
    saving = save_sharded(paths, {"model": model.state_dict(), "ema": ema.module.state_dict()})
    step()  # changes every tensor while they are written
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
