"""The kernels on a GPU: python -m pytest -m cuda tests/test_cuda.py

Needs torch, triton, numpy and pytest alone, so that it runs from a checkout on a machine with nothing else.
"""
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tritoncls.ema import ModelEma, ema_blend_, update_emas
from tritoncls.kernels.multi_tensor import address_table
from tritoncls.kernels.rounding import join_halves_reference, split_halves_reference
from tritoncls.losses import (
    MixedTarget, binary_cross_entropy, binary_cross_entropy_and_grad, cross_entropy, cross_entropy_and_grad, pad_classifier,
    topk_correct)
from tritoncls.runtime import UserError, checked

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(N, C, dtype=torch.float32):
    gen = torch.Generator("cuda").manual_seed(N * C)
    return ((torch.randn(N, C, generator=gen, device="cuda") * 3).to(dtype),
            torch.randint(0, C, (N,), generator=gen, device="cuda"))


def loss_and_grad(function, logits):
    x = logits.clone().requires_grad_()
    loss = function(x)
    loss.backward()
    return loss.detach().double(), x.grad.double()


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (1, 2, 10, 1000, 1001, 21841))
@pytest.mark.parametrize("N", (1, 5, 33, 1024))
def test_loss_gradient_and_counts(N, C, dtype):
    logits, target = draw(N, C, dtype)
    target[::4] = -100
    exact = loss_and_grad(lambda x: F.cross_entropy(x, target, label_smoothing=0.1), logits.double())
    torchs = loss_and_grad(lambda x: F.cross_entropy(x, target, label_smoothing=0.1), logits)
    ours = loss_and_grad(lambda x: cross_entropy(x, target, label_smoothing=0.1).loss, logits)
    if N == 1:
        assert ours[0].isnan() and exact[0].isnan()
        return
    valid = (target >= 0).sum().item()
    for got, his, want, unit, result in zip(ours, torchs, exact, (1.0, 1 / valid), (torch.float32, dtype), strict=True):
        largest = want.abs().max().item()
        rounding = 0.5 * torch.finfo(result).eps * largest
        allowed = (his - want).abs().max().item() + 4 * 2**-23 * max(unit, largest) + rounding
        assert (got - want).abs().max().item() <= allowed
    order = logits.float().sort(dim=1, descending=True, stable=True).indices
    rank = (order == target[:, None]).float().argmax(1)
    counts = [((rank < k) & (target >= 0)).sum().item() for k in (1, 5)]
    assert cross_entropy(logits, target).correct.tolist() == counts == topk_correct(logits, target).tolist()


SHAPES = ((33, 10, 10), (300, 1000, 1000), (300, 1001, 1001), (64, 21841, 21848), (64, 21841, 21841), (2, 131072, 131072),
          (3000, 257, 300))


def targets(N, C):
    (_, y1), (_, y2) = draw(N, C), draw(N + 1, C)
    lam = torch.linspace(0, 1, N, device="cuda")
    return dict(ids=y1, mixed=MixedTarget(y1, y2[:N], lam), dense=draw(N, C)[0].softmax(1))


def written_out(target, C):
    if isinstance(target, torch.Tensor): return target if target.ndim == 2 else F.one_hot(target, C).double()
    lam = target.lam.double()[:, None]
    return lam * F.one_hot(target.y1, C) + (1 - lam) * F.one_hot(target.y2, C)


def check(ours, exact, logits):
    "Loss and gradient beside fp64: fp32 arithmetic, and the gradient's own rounding."
    for got, want, eps in zip(ours, exact, (2**-23, torch.finfo(logits.dtype).eps), strict=True):
        assert (got - want).abs().max() <= 64 * 2**-23 * (1 + want.abs().max()) + eps * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "stride"), SHAPES)
@pytest.mark.parametrize("kind", ("ids", "mixed", "dense"))
def test_every_target_layout_and_plan(kind, N, C, stride, dtype):
    logits, target = draw(N, stride, dtype)[0][:, :C], targets(N, C)[kind]
    dense = written_out(target, C).double()
    weight = torch.linspace(0.5, 1.5, C, device="cuda")
    smooth = dense * 0.9 + 0.1 / C

    def exact_ce(x):
        loss = -(smooth * weight.double() * x.log_softmax(1)).sum(1)
        return (loss.sum() / (weight.double()[target].sum() if kind == "ids" else N)) + 1e-3 * x.logsumexp(1).square().mean()
    options = dict(weight=weight, label_smoothing=0.1, z_loss=1e-3)
    ours = loss_and_grad(lambda x: cross_entropy(x, target, **options).loss, logits)
    check(ours, loss_and_grad(exact_ce, logits.double()), logits)
    out, dx = cross_entropy_and_grad(logits, target, grad_scale=torch.tensor(8.0, device="cuda"), **options)
    torch.testing.assert_close(out.loss.double(), ours[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dx.double() / 8, ours[1], rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-7)

    ours = loss_and_grad(lambda x: binary_cross_entropy(x, target, label_smoothing=0.1, pos_weight=weight).loss, logits)
    check(ours, loss_and_grad(lambda x: F.binary_cross_entropy_with_logits(
        x, smooth, pos_weight=weight.double()), logits.double()), logits)
    both, dx = binary_cross_entropy_and_grad(logits, target, label_smoothing=0.1, pos_weight=weight)
    torch.testing.assert_close(both.loss.double(), ours[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dx.double(), ours[1], rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-7)
    counts = topk_correct(logits, target, backend="torch")
    for got in (topk_correct(logits, target), out.correct, both.correct): torch.testing.assert_close(got, counts)


def test_bit_equal_over_runs():
    for N, C in ((8192, 1000), (4, 50257)):
        logits, target = draw(N, C, torch.bfloat16)
        loss = partial(cross_entropy, target=target, label_smoothing=0.1)
        runs = [loss_and_grad(lambda x, loss=loss: loss(x).loss, logits) for _ in range(20)]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_padded_classifier():
    linear = torch.nn.Linear(64, 21841, device="cuda", dtype=torch.bfloat16)
    x, (_, y) = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16), draw(32, 21841)
    padded = pad_classifier(linear)
    loss = cross_entropy(padded(x), y).loss
    loss.backward()
    exact = F.cross_entropy(x.double() @ linear.weight.double().T + linear.bias.double(), y)
    assert padded(x).stride(0) == 21848 and abs(loss.item() - exact.item()) < 1e-2 and linear.weight.grad.isfinite().all()


def test_bad_class_id_is_nan_and_checked_mode_raises():
    logits, target = draw(64, 1000)
    target[3], target[5] = 1000, -7
    x = logits.clone().requires_grad_()
    out = cross_entropy(x, target, reduction="none", return_rank=True)
    assert out.loss.isnan().nonzero().flatten().tolist() == [3, 5] and out.rank[[3, 5]].tolist() == [1000, 1000]
    out.loss.nan_to_num().sum().backward()
    assert x.grad.isnan().any(1).nonzero().flatten().tolist() == [3, 5]
    with checked(), pytest.raises(UserError, match=r"target\[3\] = 1000"): cross_entropy(logits, target)


@pytest.mark.parametrize("alpha", (1e-5, 0.1, 0.49, 0.5, 0.9, 1.0))
def test_ema_is_bit_equal_to_foreach_lerp(alpha):
    gen = torch.Generator("cuda").manual_seed(0)
    sizes = ((7,), (3, 5), (64, 65), (4096,), (100_003,), (), (0, 3))
    shadows, params = ([torch.randn(size, generator=gen, device="cuda") for size in sizes] for _ in range(2))
    torchs = [e.clone() for e in shadows]
    torch._foreach_lerp_(torchs, params, alpha)
    ema_blend_(shadows, params, alpha)
    assert all(torch.equal(a, b) for a, b in zip(shadows, torchs, strict=True))


def test_ema_of_16_bit_parameters_and_integers():
    gen = torch.Generator("cuda").manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        e, p = (torch.randn(9000, generator=gen, device="cuda") for _ in range(2))
        p = p.to(dtype)
        count, counted = (torch.tensor(n, dtype=torch.int64, device="cuda") for n in (0, 2**40 + 7))
        want = e.lerp(p.float(), 0.1)
        ema_blend_([e, count], [p, counted], torch.tensor([0.1], device="cuda"))
        assert torch.equal(e, want) and count.item() == 2**40 + 7


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("K", (1, 3))
def test_16_bit_shadows_are_rounded_as_the_reference_rounds(dtype, K):
    gen = torch.Generator("cuda").manual_seed(0)
    draws = lambda dtype: [torch.randn(n, generator=gen, device="cuda").to(dtype) for n in (7, 4096, 100_003)]
    shadows, params = [draws(dtype) for _ in range(K)], draws(torch.float32)
    got, want = ([[e.clone() for e in es] for es in shadows] for _ in range(2))
    ema_blend_(got, params, 0.3, backend="triton", seed=5)
    ema_blend_(want, params, 0.3, backend="torch", seed=5)
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


def test_two_halves_are_an_fp32_average_in_every_bit():
    gen = torch.Generator("cuda").manual_seed(0)
    draws = lambda: [torch.randn(n, generator=gen, device="cuda") for n in (7, 4096, 100_003)]
    whole = [draws() for _ in range(3)]
    high, low = zip(*[zip(*map(split_halves_reference, es), strict=True) for es in whole], strict=True)
    for dtype in DTYPES:
        params = [p.to(dtype) for p in draws()]
        for alpha in (0.3, 1e-4, torch.tensor([0.0, 0.7, 1.0], device="cuda")):
            ema_blend_(whole, params, alpha)
            ema_blend_(high, params, alpha, low=low)
            for es, hs, ls in zip(whole, high, low, strict=True):
                assert all(torch.equal(e, join_halves_reference(h, half)) for e, h, half in zip(es, hs, ls, strict=True))


def test_a_replayed_schedule_equals_eager_over_1000_steps():
    model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.BatchNorm1d(65)).cuda()
    schedule = torch.linspace(0, 0.999, 700).tolist()
    options = dict(schedule=schedule, update_period=2, start=50)
    eager, captured = ModelEma(model, **options), ModelEma(model, capturable=True, **options)
    noise, found_inf = torch.zeros(64, device="cuda"), torch.zeros(1, device="cuda")

    def step():
        with torch.no_grad():
            model[0].weight.add_(noise)
            model[1].num_batches_tracked.add_(1)
        captured.update(found_inf=found_inf)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): captured.update(found_inf=torch.ones_like(found_inf))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): step()
    for n in range(1000):
        noise.normal_()
        found_inf.fill_(float(n % 100 == 7))
        graph.replay()
        if n % 100 != 7: eager.update()
    assert captured.steps == eager.steps == 990
    states = captured.module.state_dict().values(), eager.module.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_captured_average_follows_a_loaded_state():
    model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.BatchNorm1d(65)).cuda()
    for options in ({}, dict(dtype=torch.bfloat16, rounding="split")):
        averages = [ModelEma(model, schedule=[0.5] * 9, capturable=True, **options) for _ in range(2)]
        captured, eager = averages
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream): captured.update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): captured.update()
        graph.replay()
        state = ModelEma(model, schedule=[0.1 * n for n in range(9)], capturable=True, **options).state_dict()
        for ema in averages: ema.load_state_dict(state)
        torch.cuda.empty_cache()
        noise = [torch.full((n,), float("nan"), device="cuda") for n in (10, 64, 4225) * 20]  # over all that was freed
        for _ in range(12):
            with torch.no_grad(): model[0].weight.mul_(1.1)
            graph.replay()
            eager.update()
        assert captured.steps == eager.steps == 12 and noise
        for a, b in zip(captured.weights().values(), eager.weights().values(), strict=True): assert torch.equal(a, b)


def test_a_graph_takes_no_average_that_counts_on_the_host():
    ema = ModelEma(torch.nn.Linear(8, 8).cuda())
    ema.update()
    with pytest.raises(UserError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()): ema.update()
    ema.update()
    assert ema.steps == 2


def test_a_captured_blend_keeps_its_table():
    shadows, params = [torch.zeros(5000, device="cuda")], [torch.ones(5000, device="cuda")]
    graph, others = torch.cuda.CUDAGraph(), torch.zeros(40, 5000, device="cuda")
    ema_blend_(shadows, params, 0.5)
    with torch.cuda.graph(graph): ema_blend_(shadows, params, 0.5)
    for other in others: ema_blend_([other], params, 0.5)
    address_table.cache_clear()
    graph.replay()
    assert (shadows[0] == 0.75).all() and (others == 0.5).all()


def test_the_average_in_host_memory():
    model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.BatchNorm1d(65)).cuda()
    here, there = ModelEma(model, momentum=0.9), ModelEma(model, momentum=0.9, device="cpu")
    for _ in range(5):
        with torch.no_grad(): model[0].weight.mul_(1.5)
        here.update()
        there.update()
    for a, b in zip(here.module.state_dict().values(), there.module.state_dict().values(), strict=True):
        assert b.device.type == "cpu"
        torch.testing.assert_close(a.cpu(), b)
    with there.swap(): assert torch.equal(model[0].weight.cpu(), there.module[0].weight)


def test_an_average_in_host_memory_waits_for_the_copy_before_alone():
    model = torch.nn.Linear(512, 512).cuda()
    here, there = ModelEma(model, momentum=0.5), ModelEma(model, momentum=0.5, device="cpu")
    for ema in (here, there): ema.update()
    torch.cuda.synchronize()
    for _ in range(3):
        torch.cuda._sleep(500_000_000)  # cycles, a quarter of a second
        with torch.no_grad(): model.weight.mul_(1.5)
        busy = torch.cuda.Event()
        busy.record()
        there.update()
        assert not busy.query()
        here.update()
        torch.cuda.synchronize()
    torch.testing.assert_close(there.module.weight, here.module.weight.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_average_on_another_gpu():
    model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.BatchNorm1d(65)).cuda(0)
    here, there = ModelEma(model, momentum=0.9), ModelEma(model, momentum=0.9, device="cuda:1")
    for _ in range(5):
        with torch.no_grad(): model[0].weight.mul_(1.5)
        here.update()
        there.update()
    for a, b in zip(here.module.state_dict().values(), there.module.state_dict().values(), strict=True):
        assert b.device == torch.device("cuda:1") and torch.equal(a.cpu(), b.cpu())


def test_a_model_that_moves_to_the_gpu_takes_its_average_along():
    model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.BatchNorm1d(65))
    ema = ModelEma(model, momentum=0.5)
    ema.update()
    model.cuda()
    with torch.no_grad(): model[0].weight.add_(1)
    want = ema.module[0].weight.cuda().lerp(model[0].weight, 0.5)
    ema.update()
    torch.testing.assert_close(ema.module[0].weight, want)


def test_no_host_sync():
    logits, target = draw(256, 1000, torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).cuda()
    ema = ModelEma(model, momentum=0.9)
    counting = [ModelEma(model, momentum=m, capturable=True) for m in (0.9, 0.99)]
    ema.update()
    update_emas(counting)
    with waiting_is_an_error():
        for kind in (target, MixedTarget(target, target.flip(0), 0.3), F.one_hot(target, 1000).float()):
            cross_entropy(logits.requires_grad_(), kind, label_smoothing=0.1).loss.backward()
            binary_cross_entropy(logits, kind, label_smoothing=0.1).loss.backward()
            cross_entropy_and_grad(logits, kind, grad_scale=1024.0)
            topk_correct(logits, kind)
        ema.update()
        update_emas(counting, found_inf=torch.zeros(1, device="cuda"))


def test_captured_in_a_graph():
    logits, target = draw(64, 1000, torch.bfloat16)
    static = logits.clone().requires_grad_()

    def step():
        out = cross_entropy(static, target, label_smoothing=0.1)
        return out.loss.detach(), out.correct, torch.autograd.grad(out.loss, static)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = step()
    with torch.no_grad(): static.copy_(draw(64, 1000, torch.bfloat16)[0].flip(0))
    graph.replay()
    for a, b in zip(captured, step(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("loss", (cross_entropy, binary_cross_entropy))
def test_compiled_with_graphs(loss):
    "What a kernel keeps from launch to launch must not lie in the memory of a graph, or the second warm-up refuses it."
    from torch._inductor import config

    model = torch.nn.Linear(64, 1000, device="cuda", dtype=torch.bfloat16)
    x, (_, y) = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16), draw(256, 1000)
    step = lambda x, y: loss(model(x), y, label_smoothing=0.1).loss
    want = [torch.autograd.grad(step(x, y), model.weight)[0] for y in (y, y.flip(0))]
    torch._dynamo.reset()
    with config.patch({"triton.slow_path_cudagraph_asserts": True, "triton.fast_path_cudagraph_asserts": True}):
        compiled = torch.compile(step, mode="reduce-overhead")
        for n in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            got = torch.autograd.grad(compiled(x, (y, y.flip(0))[n % 2]), model.weight)[0]
            torch.testing.assert_close(got.float(), want[n % 2].float(), rtol=0.02, atol=1e-5)
