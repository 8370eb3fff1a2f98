"Evaluation by several processes, each with its own part of the test images."
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
from tritoncls.augment import Preprocess
from tritoncls.config import load_config
from tritoncls.evaluate import evaluate

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1: dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
cfg = load_config()
gen = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (11, 1, 8, 8), dtype=torch.uint8, generator=gen)
labels = {"ids": torch.randint(0, 10, (11,), generator=gen), "rows": torch.rand(11, 10, generator=gen) < 0.3}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def found(target, mine):
    batches = list(zip(images[mine].split(3), target[mine].split(3)))
    confusion = torch.zeros(10, 10, dtype=torch.int64) if target.ndim == 1 else None
    accuracy = evaluate(model, batches, Preprocess(cfg), confusion=confusion)
    return [*accuracy, confusion.tolist() if target.ndim == 1 else None]

every = slice(rank, None, world)
results = {name: found(target, every) for name, target in labels.items()}
results["all on the first"] = found(labels["ids"], slice(0, None if rank == 0 else 0))
results["rows on the first"] = found(labels["rows"], slice(0, None if rank == 0 else 0))
print(json.dumps(results))
"""


def evaluations(world: int, folder) -> list[dict]:
    "What each of the processes found."
    env = dict(os.environ, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", PROGRAM]
    running = [subprocess.Popen([*command, str(rank), str(world), str(folder)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=env) for rank in range(world)]
    done = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), done
    return [json.loads(out) for out, _ in done]


@pytest.mark.slow
def test_processes_share_the_work_and_agree(tmp_path):
    alone, = evaluations(1, tmp_path)
    assert alone["ids"] == alone["all on the first"] and alone["ids"][2] == 11
    for found in evaluations(2, tmp_path):
        for name, (acc1, acc5, count, loss, mean_ap, confusion) in found.items():
            want = alone[name]
            assert (acc1, acc5, count, confusion) == (*want[:3], want[5]), name
            assert loss == pytest.approx(want[3], rel=1e-6), name
            assert mean_ap is want[4] is None or mean_ap == pytest.approx(want[4], rel=1e-12), name
