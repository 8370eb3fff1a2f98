"Meters, logs and batch-norm statistics of two processes that train together."
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tritoncls.config import load_config
from tritoncls.logs import LoggerHook
from tritoncls.meters import MeterBuffer
from tritoncls.precise_bn import precise_batch_norm

WORLD = 2


def check_meters(rank):
    "A reading is the mean over the processes; looking is each one's own, and may be done by one alone."
    meter = MeterBuffer()
    for k in (1, 2, 3):
        meter.update({"acc": torch.tensor(100.0 * rank)}, loss=torch.tensor(k + 10.0 * rank))
        if rank == 0: assert meter["loss"].latest == k
    reading = meter.start_read()
    meter.reset()
    assert reading.result()["loss"].values == (6, 7, 8) and reading.result()["acc"].global_avg == 50


def check_precise(rank):
    "The statistics are those of the samples of all processes, whatever the batches; here the shares differ in size, too."
    torch.manual_seed(0)
    model, samples = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(20, 4) * 5 + 100
    part = samples[:13] if rank == 0 else samples[13:]
    assert precise_batch_norm(model, part.split(5), 1000) == len(part)
    x = model[0](samples).detach().double()
    torch.testing.assert_close(model[1].running_mean.double(), x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(model[1].running_var.double(), x.var(0), rtol=1e-5, atol=0)
    assert precise_batch_norm(model, samples.split(2), 8) == 8 // WORLD


def check_log(rank, folder):
    "The log has the mean of both processes, once."
    hook = LoggerHook(load_config(overrides=[f"output_dir={folder}", "log_every_n_iter=1", "batch_size=8"]))
    hook.trainer = trainer = SimpleNamespace(
        rank=rank, world_size=WORLD, device=torch.device("cpu"), meter=MeterBuffer(),
        solver=SimpleNamespace(lr=0.1, scaler=None),
        progress=SimpleNamespace(epoch=1, iter=1, max_epoch=1, max_iter=1, current_iter=0))
    hook.before_train()
    hook.before_iter()
    trainer.meter.update({"stat_acc@1": torch.tensor(100.0 * rank)}, loss=torch.tensor(1.0 + rank))
    hook.after_iter()
    hook.after_epoch()
    hook.close()
    dist.barrier()
    record, = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert (record["loss"], record["acc1"]) == (1.5, 50)
    assert record["images_per_second"] * record["seconds_per_iter"] == pytest.approx(8 * WORLD)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        check_meters(rank)
        check_precise(rank)
        check_log(rank, folder)
    finally: dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=WORLD)
