"""Loss + gradient + top-1/5 on the CPU, beside PyTorch's own: python benchmarks/cpu_loss.py

Prints the median time of each, interleaved in one run, and the ratio.
"""
import statistics
import time

import torch
import torch.nn.functional as F

from tritoncls.losses import cross_entropy

SHAPES, ROUNDS, TOPK = ((256, 1000), (256, 21841)), 25, (1, 5)


def torchs(x: torch.Tensor, y: torch.Tensor) -> None:
    loss = F.cross_entropy(x, y, label_smoothing=0.1)
    with torch.no_grad():
        hit = x.topk(max(TOPK), 1).indices == y[:, None]
        [hit[:, :k].sum() for k in TOPK]
    loss.backward()


def ours(x: torch.Tensor, y: torch.Tensor) -> None:
    cross_entropy(x, y, label_smoothing=0.1, topk=TOPK).loss.backward()


def seconds(step, x: torch.Tensor, y: torch.Tensor) -> float:
    x.grad = None
    began = time.perf_counter()
    step(x, y)
    return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, median of {ROUNDS}")
    for N, C in SHAPES:
        x, y = torch.randn(N, C).mul_(3).requires_grad_(), torch.randint(0, C, (N,))
        for step in (torchs, ours): seconds(step, x, y)
        times = [(seconds(torchs, x, y), seconds(ours, x, y)) for _ in range(ROUNDS)]
        theirs, mine = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"({N}, {C}): torch {theirs:.2f} ms, tritoncls {mine:.2f} ms, ratio {mine / theirs:.2f}")


if __name__ == "__main__": main()
