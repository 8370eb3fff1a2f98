"""An EMA update of a ResNet-50 on the CPU, beside what people write: python benchmarks/cpu_ema.py

Prints the median time of each, interleaved in one run, and the ratios. The 53 integer buffers are copied, too, except by
torch._foreach_lerp_, which gets the 267 floating tensors alone.
"""
import copy
import statistics
import time

import torch
import torchvision

from tritoncls.ema import ModelEma

MOMENTUM, ROUNDS = 0.9999, 15


def per_tensor(shadows: list[torch.Tensor], params: list[torch.Tensor]) -> None:
    for e, p in zip(shadows, params, strict=True):
        if e.is_floating_point(): e.copy_(e * MOMENTUM + p * (1 - MOMENTUM))
        else: e.copy_(p)


def foreach(shadows: list[torch.Tensor], params: list[torch.Tensor]) -> None:
    torch._foreach_lerp_(shadows, params, 1 - MOMENTUM)


def seconds(step, *args) -> float:
    began = time.perf_counter()
    step(*args)
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    tensors = lambda model: list(model.state_dict().values())
    floating = lambda model: [t for t in tensors(model) if t.is_floating_point()]
    ema = ModelEma(model, momentum=MOMENTUM)
    loop, lerp = copy.deepcopy(model), copy.deepcopy(model)
    steps = {"per-tensor loop": (per_tensor, tensors(loop), tensors(model)),
             "torch._foreach_lerp_": (foreach, floating(lerp), floating(model)), "tritoncls": (ema.update,)}
    for step in steps.values(): seconds(*step)
    times = [[seconds(*step) for step in steps.values()] for _ in range(ROUNDS)]
    medians = dict(zip(steps, (statistics.median(column) for column in zip(*times, strict=True)), strict=True))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, median of {ROUNDS}")
    for name, median in medians.items():
        print(f"{name:22} {1e3 * median:7.2f} ms, ours is {medians['tritoncls'] / median:.2f} of it")


if __name__ == "__main__": main()
