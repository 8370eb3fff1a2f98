"""What has gone wrong in other moving averages, and what several implementations agree on."""
import copy
import gc
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tritoncls.ema import ModelEma, alpha_at, ema_blend_, send, update_emas
from tritoncls.kernels.ema_blend import make_plan
from tritoncls.kernels.multi_tensor import address_table
from tritoncls.kernels.rounding import split_halves_reference
from tritoncls.runtime import INTERPRETER, UserError, backends_on
from tritoncls.schedules import momentum_schedule

BACKENDS = backends_on("cpu")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))


def stepper(model, lr=0.1):
    "A function that makes one optimizer step on new data."
    optimizer, gen = torch.optim.SGD(model.parameters(), lr=lr), torch.Generator().manual_seed(1)

    def step():
        dtype = next(model.parameters()).dtype
        model(torch.rand(4, 1, 8, 8, generator=gen).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def assert_equal(a, b, **tolerance):
    a, b = ({name: t for name, t in x.items() if not name.startswith("initted") and name != "step"} for x in (a, b))
    assert a.keys() == b.keys()
    tolerance = dict(rtol=0, atol=0) | tolerance
    for name in a: torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_as_timm_and_torch(backend):
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = network()
    ours = ModelEma(model, momentum=0.9, backend=backend)
    timms, torchs = ModelEmaV3(model, decay=0.9, foreach=True), AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    torchs.n_averaged.fill_(1)  # its first update would be a copy
    step = stepper(model)
    for _ in range(6):
        step()
        ours.update()
        timms.update(model)
        torchs.update_parameters(model)
    assert_equal(ours.module.state_dict(), timms.module.state_dict(), rtol=1e-6, atol=1e-7)
    averaged = {n: t for n, t in torchs.module.state_dict().items() if t.is_floating_point()}
    assert_equal({n: ours.module.state_dict()[n] for n in averaged}, averaged, rtol=1e-6, atol=1e-7)


def test_the_warm_up_of_timm():
    from timm.utils import ModelEmaV3

    model = network()
    schedule = momentum_schedule("inverse_gamma", 30, momentum=0.9999, gamma=1.0, power=2 / 3)
    ours, timms = ModelEma(model, schedule=schedule), ModelEmaV3(model, decay=0.9999, use_warmup=True)
    step = stepper(model)
    for n in range(30):
        step()
        ours.update()
        timms.update(model, step=n + 1)
    assert_equal(ours.module.state_dict(), timms.module.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_options_of_timm():
    timm = pytest.importorskip("timm.utils")
    model = network()
    ours = ModelEma(model, momentum=0.9, start=3 + 1, exclude=["running_", "num_batches"])
    theirs, step = timm.ModelEmaV3(model, decay=0.9, update_after_step=3, exclude_buffers=True), stepper(model)
    for n in range(9):
        step()
        ours.update()
        theirs.update(model, step=n + 1)
    assert_equal(ours.module.state_dict(), theirs.module.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_same_as_ema_pytorch():
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = network()
    ours = ModelEma(model, momentum=0.9, start=1)
    theirs = ema_pytorch.EMA(model, beta=0.9, update_after_step=0, update_every=1, inv_gamma=1e-9, power=1.0, min_value=0.9)
    step = stepper(model)
    for _ in range(6):
        step()
        ours.update()
        theirs.update()
    want = {n: t for n, t in theirs.ema_model.state_dict().items() if t.is_floating_point()}
    assert_equal({n: ours.module.state_dict()[n] for n in want}, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_foreach_lerp(backend):
    fused = backend == "torch" or tuple(map(int, __import__("triton").__version__.split(".")[:2])) >= (3, 9)
    if not fused: pytest.skip("the interpreter's fma rounds twice before Triton 3.9")
    for momentum in (0.9999, 0.9, 0.51, 0.5, 0.3):
        model = network()
        ours, shadow = ModelEma(model, momentum=momentum, backend=backend), copy.deepcopy(model)
        stepper(model)()
        ours.update()
        es = [t for t in shadow.state_dict().values() if t.is_floating_point()]
        torch._foreach_lerp_(es, [t for t in model.state_dict().values() if t.is_floating_point()], 1 - momentum)
        got = [t for t in ours.module.state_dict().values() if t.is_floating_point()]
        assert all(torch.equal(a, b) for a, b in zip(got, es, strict=True))


@pytest.mark.parametrize("momentum", (0.0, 0.3, 0.9999, 1.0))
def test_a_model_at_rest_is_fixed_in_every_bit(momentum):
    model = network()
    ema, before = ModelEma(model, momentum=momentum), copy.deepcopy(model.state_dict())
    for _ in range(100): ema.update()
    assert_equal(ema.module.state_dict(), before)


def test_integer_buffers_follow_and_keep_their_type():
    model = network()
    ema, step = ModelEma(model, momentum=0.999), stepper(model)
    for _ in range(3):
        step()
        ema.update()
    count = ema.module[1].num_batches_tracked
    assert count.dtype == torch.int64 and count == 3


@pytest.mark.parametrize("capturable", (False, True))
@pytest.mark.parametrize("rounding", ("nearest", "stochastic", "split"))
def test_resume_is_bit_equal(rounding, capturable, tmp_path):
    options = dict(schedule=momentum_schedule("cosine", 30, start_momentum=0.5, end_momentum=0.99), update_period=2, start=3,
                   rounding=rounding, dtype=torch.float32 if rounding == "nearest" else torch.bfloat16, capturable=capturable)
    straight, other = network(), network()
    a, b = ModelEma(straight, **options), ModelEma(other, **options)
    step = stepper(straight)
    for n in range(12):
        step()
        a.update()
        if n == 6:
            other.load_state_dict(straight.state_dict())
            torch.save(a.state_dict(), tmp_path / "ema.pt")
            b.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        if n > 6:
            other.load_state_dict(straight.state_dict())
            b.update()
    assert a.steps == b.steps == 12
    assert_equal(a.module.state_dict(), b.module.state_dict())
    assert_equal(a.low, b.low)


@pytest.mark.parametrize(("dtype", "rounding", "tolerance"), (
    (torch.float64, "nearest", 1e-4), (torch.float32, "nearest", 0.002), (torch.bfloat16, "split", 0.002),
    (torch.bfloat16, "stochastic", 0.036), (torch.float16, "stochastic", 0.0134),  # 4 standard deviations of the mean
    (torch.bfloat16, "nearest", None), (torch.float16, "nearest", None)))  # stand still
def test_how_far_an_average_travels(dtype, rounding, tolerance):
    "A step is smaller than half the distance of two 16-bit numbers, as it is for almost every weight of a real model."
    model, steps = nn.Linear(1024, 1, bias=False), 5000
    model.weight.data.fill_(1.0)
    ema = ModelEma(model, momentum=0.9999, dtype=dtype, rounding=rounding)
    model.weight.data.fill_(0.99)
    for _ in range(steps): ema.update()
    share = (1 - ema.weights()["weight"].double().mean().item()) / 0.01
    assert ema.module.weight.dtype == dtype
    if tolerance is None: assert share == 0
    else: assert abs(share - (1 - 0.9999**steps)) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_are_an_fp32_average_in_every_bit(backend):
    model = network().to(memory_format=torch.channels_last)
    options = dict(momentum=0.999, start=2, backend=backend)
    whole, halves = ModelEma(model, **options), ModelEma(model, dtype=torch.bfloat16, rounding="split", **options)
    step = stepper(model)
    for n in range(12):
        assert_equal(halves.weights(), whole.module.state_dict())
        if n == 7: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        step()
        update_emas([halves])
        whole.update()
    for name, e in halves.module.state_dict().items():
        want = whole.module.state_dict()[name]
        assert torch.equal(e, split_halves_reference(want)[0] if want.is_floating_point() else want)
    with halves.swap(): assert_equal(model.state_dict(), whole.module.state_dict())
    model.bfloat16()
    with halves.swap(): assert_equal(model.state_dict(), halves.module.state_dict())


def test_two_halves_of_several_averages_and_of_tied_weights():
    tied = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)).bfloat16()
    tied[1].weight = tied[0].weight
    for backend in BACKENDS:
        options = [dict(momentum=m, backend=backend) for m in (0.9, 0.999)]
        whole = [ModelEma(tied, **o) for o in options]
        halves = [ModelEma(tied, dtype=torch.bfloat16, rounding="split", **o) for o in options]
        for _ in range(5):
            tied[0].weight.data.mul_(1.1)
            update_emas(whole)
            update_emas(halves)
        for a, b in zip(whole, halves, strict=True):
            assert_equal(a.module.state_dict(), b.weights())
            for target, options in ((a, {}), (b, dict(dtype=torch.bfloat16, rounding="split"))):
                for source in (a, b):
                    new = ModelEma(tied, **options)
                    new.load_state_dict(copy.deepcopy(source.state_dict()))
                    assert_equal(new.weights(), target.weights())


def test_states_that_were_saved_with_compensation_are_put_together():
    model = network()
    e = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    c = {name: (t - e[name].float()).bfloat16() for name, t in model.state_dict().items() if t.is_floating_point()}
    want = {name: t.float() + c[name].float() if name in c else t for name, t in e.items()}
    for options in ({}, dict(rounding="split", dtype=torch.bfloat16)):
        ema = ModelEma(network(seed=1), **options)
        ema.load_state_dict(dict(module=e, steps=7, compensation=c, settings=ema.settings))
        assert ema.steps == 7
        assert_equal(ema.weights(), want)
    for options in (dict(rounding="compensated", dtype=torch.bfloat16), dict(rounding="split")):
        with pytest.raises(UserError, match="split"): ModelEma(model, **options)
    with pytest.raises(UserError, match="of torch.bfloat16; allowed for torch.float16: nearest, stochastic"):
        ModelEma(model, rounding="split", dtype=torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counting_on_the_device_is_the_same(backend):
    model, steps = network(), 1000 if backend == "torch" else 15
    schedule = momentum_schedule("tf_ratio", steps // 2, momentum=0.9)
    options = dict(schedule=schedule, update_period=3, start=4, backend=backend)
    host, device = ModelEma(model, **options), ModelEma(model, capturable=True, **options)
    step, overflow = stepper(model), torch.zeros(1)
    for n in range(steps):
        overflow.fill_(float(n % 5 == 2))
        if not overflow:
            step()
            host.update()
        device.update(found_inf=overflow)
        if overflow: model[0].weight.data.add_(0)
    assert host.steps == device.steps == steps * 4 // 5
    assert_equal(host.module.state_dict(), device.module.state_dict(), rtol=1e-6, atol=1e-7)


def test_an_overflow_neither_blends_nor_counts():
    model = network()
    ema, before = ModelEma(model, momentum=0.5, capturable=True), copy.deepcopy(model.state_dict())
    model[4].weight.data.fill_(float("nan"))
    ema.update(found_inf=torch.ones(1))
    assert ema.steps == 0
    assert_equal(ema.module.state_dict(), before)
    with pytest.raises(UserError, match="capturable"): ModelEma(network()).update(found_inf=torch.ones(1))


@pytest.mark.parametrize("capturable", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_averages_in_one_pass(backend, capturable):
    model, schedules = network(), [None, momentum_schedule("tf_ratio", 9, momentum=0.9), momentum_schedule("swa", 9)]
    options = [dict(schedule=s, momentum=0.9, update_period=p, start=1, backend=backend, capturable=capturable)
               for s, p in zip(schedules, (1, 2, 3), strict=True)]
    apart, together = ([ModelEma(model, **o) for o in options] for _ in range(2))
    step = stepper(model)
    for _ in range(4):
        step()
        for ema in apart: ema.update()
        update_emas(together)
    for a, b in zip(apart, together, strict=True):
        assert a.steps == b.steps == 4
        assert_equal(a.module.state_dict(), b.module.state_dict(), rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match="different models"): update_emas([together[0], ModelEma(network())])


@contextmanager
def recording():
    "As inside of torch.cuda.graph, where there is a GPU."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def test_a_graph_takes_no_average_that_counts_on_the_host():
    ema = ModelEma(model := network(), momentum=0.5)
    ema.update()
    before = copy.deepcopy(ema.module.state_dict())
    model[4].weight.data.add_(1)
    with recording(), pytest.raises(UserError, match=r"ModelEma\(model, capturable=True\)"): ema.update()
    with recording(), pytest.raises(UserError, match="capturable=True"): update_emas([ema])
    assert ema.steps == 1
    assert_equal(ema.module.state_dict(), before)


def alive(references): return [reference() is not None for reference in references]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_graph_reads_lives_as_long_as_the_average(backend):
    model = network()
    options = dict(schedule=[0.1, 0.2, 0.3], capturable=True, dtype=torch.bfloat16, rounding="split", backend=backend)
    ema, other = ModelEma(model, **options), ModelEma(network(seed=1), **options | dict(schedule=[0.4, 0.5, 0.6]))
    ema.update()
    with recording(): ema.update()
    [ready] = ema.plans.values()
    read = [*ready.plan.shadows[0], *ready.plan.low[0], ready.alphas.alphas, ready.alphas.step]
    if backend == "triton": read.append(ready.plan.table)
    references, places = [weakref.ref(t) for t in read], [t.data_ptr() for t in read]
    ema.load_state_dict(copy.deepcopy(other.state_dict()))
    torch.testing.assert_close(ready.alphas.alphas.flatten()[:4], torch.tensor([0.6, 0.5, 0.4, 0.4]))
    assert ready.alphas.step is ema.count and ema.steps == 0 and places == [t.data_ptr() for t in read]
    assert_equal(ema.weights(), other.weights())
    model[1].running_mean = model[1].running_mean + 1
    ema.update()
    assert all(ready is not other for other in ema.plans.values())
    address_table.cache_clear()
    del ready, read
    gc.collect()
    assert all(alive(references))
    del ema
    gc.collect()
    assert not any(alive(references))


def test_a_longer_schedule_is_refused_where_a_graph_reads_one():
    model = network()
    pair = [ModelEma(model, momentum=m, capturable=True) for m in (0.9, 0.8)]
    update_emas(pair)
    longer = ModelEma(network(seed=1), momentum=0.5, start=50, capturable=True).state_dict()
    pair[1].load_state_dict(longer)
    assert pair[1].momentum_at(50) == 0 and pair[1].steps == 0
    with pytest.raises(UserError, match="equally many steps"): update_emas(pair)
    pair[0].load_state_dict(longer)
    update_emas(pair)
    with recording(): update_emas(pair)
    before = copy.deepcopy(pair[1].state_dict())
    for options in (dict(start=99), dict(update_period=2)):
        with pytest.raises(UserError, match="a graph has captured this average with a shorter schedule, or another"):
            pair[1].load_state_dict(ModelEma(model, **options).state_dict())
    assert pair[1].settings == before["settings"] and pair[1].steps == 2
    assert_equal(pair[1].module.state_dict(), before["module"])
    [ready] = pair[0].captured
    alphas = ready.alphas.alphas
    pair[1].load_state_dict(ModelEma(model, momentum=0.25, start=3).state_dict())
    want = [[1, 1]] * 3 + [[1, 0.75]] * 47 + [[0.5, 0.75]] * (len(alphas) - 50)
    assert len(alphas) > 51 and alphas is ready.alphas.alphas and alphas.tolist() == want


@pytest.mark.skipif(not INTERPRETER, reason="uses the kernel on a CPU")
def test_the_table_of_a_captured_blend_is_kept():
    params, tables = [torch.ones(9)], []
    for captured in (True, False):
        shadows = [torch.zeros(9)]
        with recording(), pytest.raises(UserError, match="once before"): ema_blend_(shadows, params, 0.5, backend="triton")
        ema_blend_(shadows, params, 0.5, backend="triton")
        tables.append(weakref.ref(make_plan([shadows], params, "triton").table))
        with recording() if captured else nullcontext(): ema_blend_(shadows, params, 0.5, backend="triton")
    for shadow in torch.zeros(40, 9): ema_blend_([shadow], params, 0.5, backend="triton")
    gc.collect()
    assert alive(tables) == [True, False]


class OnGpu(torch.Tensor):
    "A tensor in host memory that says that it is not."
    is_cuda = True


def test_an_average_on_another_gpu_is_not_pinned(monkeypatch):
    empty_like = torch.empty_like

    def as_torch_does(tensor, *, device=None, pin_memory=False, **options):
        if pin_memory and torch.device(device).type != "cpu": raise RuntimeError("Only dense CPU tensors can be pinned")
        return empty_like(tensor, device=device, **options)
    monkeypatch.setattr(torch, "empty_like", as_torch_does)
    ema = ModelEma(model := nn.Linear(3, 2), device="meta", backend="torch")  # meta: the other GPU
    for name, p in [*model.named_parameters()]: setattr(model, name, nn.Parameter(p.detach().as_subclass(OnGpu)))
    for _ in range(2): ema.update()
    assert ema.steps == 2
    [ready] = ema.plans.values()
    assert [copy.device.type for _, copy in ready.staged] == ["meta", "meta"]


def test_parameters_are_sent_without_waiting(monkeypatch):
    log = []

    class Event:
        def record(self, stream): log.append(("record", stream))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")  # that cannot be waited for
    monkeypatch.setattr(OnGpu, "__torch_function__", torch._C._disabled_torch_function_impl)
    here, gpu = torch.zeros(3), torch.arange(3.0).as_subclass(OnGpu)
    assert isinstance(send([(gpu, here)]), Event) and log == [("record", "stream")] and here.tolist() == [0, 1, 2]
    other = torch.zeros(3).as_subclass(OnGpu)
    monkeypatch.setattr(OnGpu, "device", torch.device("cuda:1"))
    assert send([(gpu, other)]) is None and send([]) is None and send([(here, other)]) is None and len(log) == 1
    assert other.tolist() == [0, 1, 2]


class Link:
    "Copies that arrive when somebody waits for them; until then there is nothing."
    def __init__(self): self.log = []

    def send(self, staged):
        if not staged: return None
        sent, n = [(there, p.clone()) for p, there in staged], sum(word == "send" for word, _ in self.log) + 1
        for there, p in sent: there.fill_(float("nan") if p.is_floating_point() else -1)
        self.log.append(("send", n))

        class Arrival:
            def synchronize(_):
                self.log.append(("wait", n))
                for there, p in sent: there.copy_(p)
        return Arrival()


READS = {
    "module": lambda ema: ema.module.state_dict(), "weights": lambda ema: ema.weights(),
    "state_dict": lambda ema: ema.state_dict()["module"], "tensors": lambda ema: ema.tensors()}


@pytest.mark.parametrize("K", (1, 2))
@pytest.mark.parametrize("read", READS)
def test_an_average_in_host_memory_waits_for_the_last_copy_alone(read, K, monkeypatch):
    link, model = Link(), network()
    here = [ModelEma(model, momentum=m, start=2) for m in (0.9, 0.5)[:K]]
    update_emas(here)
    monkeypatch.setattr("tritoncls.ema.staging", lambda ps, es: [(p, torch.empty_like(p)) for p in ps])
    monkeypatch.setattr("tritoncls.ema.send", link.send)
    there = [ModelEma(model, momentum=m, start=2) for m in (0.9, 0.5)[:K]]
    step = stepper(model)
    update_emas(there)
    for n in range(2, 8):
        step()
        update_emas(here)
        update_emas(there)
        assert link.log[-2:] == [("wait", n - 1), ("send", n)]
        if n % 3: continue
        for a, b in zip(here, there, strict=True): assert_equal(READS[read](a), READS[read](b))
        assert link.log[-1] == ("wait", n)
    with there[-1].swap(): assert_equal(model.state_dict(), here[-1].module.state_dict())
    step()
    update_emas(there)
    there[0].load_state_dict(here[0].state_dict())
    assert_equal(there[0].module.state_dict(), here[0].module.state_dict())
    assert link.log == [(word, n) for n in range(1, 9) for word in ("send", "wait")]


def test_a_graph_cannot_average_in_host_memory(monkeypatch):
    monkeypatch.setattr("tritoncls.ema.staging", lambda ps, es: [(p, torch.empty_like(p)) for p in ps])
    with pytest.raises(UserError, match="capturable.*the model's device"): ModelEma(network(), capturable=True).update()


def test_include_and_exclude():
    model = network().bfloat16()
    ema = ModelEma(model, momentum=0.5, exclude=[r"running_"], include=[r"^1\.", r"weight$"])
    assert ema.module[1].running_mean.dtype == ema.module[0].bias.dtype == torch.bfloat16
    assert ema.module[0].weight.dtype == ema.module[1].bias.dtype == torch.float32
    before = copy.deepcopy(ema.module.state_dict())
    for t in model.state_dict().values(): t.add_(1)
    ema.update()
    after, now = ema.module.state_dict(), model.state_dict()
    for name in ("1.running_mean", "1.running_var", "0.bias", "4.bias", "1.num_batches_tracked"):
        assert torch.equal(after[name], now[name])
    for name in ("0.weight", "1.weight", "1.bias", "4.weight"):
        torch.testing.assert_close(after[name], before[name].lerp(now[name].float(), 0.5))
    with pytest.raises(UserError, match="'runing_'.*none.*0.weight"): ModelEma(model, exclude=["runing_"])


def moved(model):
    "Ways in which a model's tensors get a new place."
    yield "assigned", lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    yield "channels_last", lambda: model.to(memory_format=torch.channels_last)
    yield "bfloat16 and back", lambda: model.bfloat16().float()
    yield "replaced buffer", lambda: setattr(model[1], "running_mean", model[1].running_mean + 1)
    yield "new data", lambda: setattr(model[4].weight, "data", model[4].weight.data * 2)
    yield "new parameter", lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.data + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_move_are_found(backend):
    for name, move in moved(model := network()):
        ema = ModelEma(model, momentum=0.5, backend=backend)
        ema.update()
        move()
        want = {n: e.lerp(p, 0.5) if e.is_floating_point() else p
                for (n, e), p in zip(ema.module.state_dict().items(), model.state_dict().values(), strict=True)}
        ema.update()
        got = ema.module.state_dict()
        assert all(torch.allclose(got[n], want[n], rtol=1e-6, atol=1e-7) for n in want), name
        ema.module.load_state_dict(copy.deepcopy(ema.module.state_dict()), assign=True)
        pairs = zip(ema.module.state_dict().items(), model.state_dict().values(), strict=True)
        want = {n: e.lerp(p, 0.5) for (n, e), p in pairs if e.is_floating_point()}
        ema.update()
        assert all(torch.allclose(ema.module.state_dict()[n], want[n], rtol=1e-6, atol=1e-7) for n in want), name


def test_names_and_shapes_that_do_not_match_are_named():
    model = network()
    ema = ModelEma(model)
    ema.update()
    model[0].extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="only the model has '0.extra'"): ema.update()
    del model[0].extra
    model[4] = nn.Linear(72, 11)
    with pytest.raises(UserError, match=r"4.weight: the average is \(10, 72\), the model \(11, 72\)"): ema.update()
    model[4] = nn.Linear(72, 10, device="meta")
    with pytest.raises(UserError, match="4.weight is on the meta device"): ema.update()


def other_averages(model):
    "States that people have, with the number of steps that they tell."
    timm = pytest.importorskip("timm.utils")
    from torch.optim.swa_utils import AveragedModel

    averaged, wrapped, v1 = AveragedModel(model), AveragedModel(nn.DataParallel(model)), timm.ModelEma(model, decay=0.9)
    for _ in range(3): averaged.update_parameters(model)
    yield "a model", model.state_dict(), None
    yield "a compiled model", torch.compile(model, backend="eager").state_dict(), None
    yield "a wrapped model", nn.DataParallel(model).state_dict(), None
    yield "timm, first version", v1.ema.state_dict(), None
    yield "timm, second version", timm.ModelEmaV2(model, decay=0.9).state_dict(), None
    yield "timm, third version", timm.ModelEmaV3(model, decay=0.9).state_dict(), None
    yield "torch", averaged.state_dict(), 3
    yield "torch, of a wrapped model", wrapped.state_dict(), 0
    yield "ours, without the rest", {"module": model.state_dict()}, None


@pytest.mark.parametrize("capturable", (False, True))
def test_states_of_models_and_of_other_averages(capturable, tmp_path):
    source = network(seed=1)
    source[1].num_batches_tracked += 9
    for name, state, steps in other_averages(source):
        for options in (dict(capturable=capturable), dict(dtype=torch.bfloat16, rounding="split")):
            ema = ModelEma(network(), momentum=0.9, start=1, **options)
            for _ in range(5): ema.update()
            torch.save(state, tmp_path / "state.pt")
            ema.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            assert_equal(ema.weights(), source.state_dict())
            assert ema.steps == (5 if steps is None else steps) and ema.settings["momentum"] == 0.9, name


def test_an_average_of_torch_goes_on_here():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    for function, options in ((get_ema_multi_avg_fn(0.9), dict(momentum=0.9, start=1)),
                              (get_swa_multi_avg_fn(), dict(schedule=momentum_schedule("swa", 6)))):
        model = network()
        theirs, step = AveragedModel(model, multi_avg_fn=function), stepper(model)
        ours = ModelEma(model, **options)
        for n in range(6):
            step()
            if n == 3: ours.load_state_dict(theirs.state_dict())
            theirs.update_parameters(model)
            if n >= 3: ours.update()
        assert ours.steps == theirs.n_averaged == 6
        assert_equal(*(dict(a.module.named_parameters()) for a in (ours, theirs)), rtol=1e-6, atol=1e-7)


def test_an_extra_state_is_loaded_as_it_is():
    class Extra(nn.Linear):
        note = None

        def get_extra_state(self): return self.note

        def set_extra_state(self, state): self.note = state
    source, ema = nn.Sequential(Extra(2, 2), Extra(2, 2)), ModelEma(nn.Sequential(Extra(2, 2), Extra(2, 2)))
    source[0].note, source[1].note = torch.arange(3), "words"
    ema.load_state_dict(source.state_dict())
    assert ema.module[0].note.tolist() == [0, 1, 2] and ema.module[1].note == "words"
    assert_equal(dict(ema.module.named_parameters()), dict(source.named_parameters()))


def test_states_that_do_not_fit_are_refused_with_names():
    ema, state = ModelEma(network()), network(seed=1).state_dict()
    before = copy.deepcopy(ema.state_dict())
    lacks = {name: t for name, t in state.items() if not name.startswith("1.running")}
    cases = {
        r"missing: 1.running_mean, 1.running_var; states of ModelEma, a model, timm's": lacks,
        r"unexpected: 4.extra;": state | {"4.extra": torch.zeros(1)},
        r"missing: 0.bias, 0.weight, 1.bias and 6 more; unexpected: arch, epoch, state_dict and 1 more; perhaps you mean its "
        r"entry 'state_dict', 'state_dict_ema'": dict(epoch=3, arch="x", state_dict=state, state_dict_ema=state),
        r"missing: 0.bias.*; unexpected: decay, num_updates, shadow_params": dict(decay=0.9, num_updates=3, shadow_params=[]),
        r"4.weight is \(11, 72\) in the state, \(10, 72\) in the average": state | {"4.weight": torch.zeros(11, 72)},
        r"4.bias is int in the state, \(10,\) in the average": state | {"4.bias": 1},
        r"unexpected: 9.weight": before | dict(low={"9.weight": torch.zeros(1)}),
        "a state is a dictionary, not a Sequential": network()}
    for message, wrong in cases.items():
        with pytest.raises(UserError, match=message): ema.load_state_dict(wrong)
    assert_equal(ema.state_dict()["module"], before["module"])


def test_what_users_of_other_libraries_write_first():
    model = network()
    ema = ModelEma(model, momentum=0.5)
    with pytest.raises(UserError, match=r"update takes no model.*write ema.update\(\)"): ema.update(model)
    with pytest.raises(UserError, match=r"write ema.update\(\)"): ema.update(model, 7)
    with pytest.raises(UserError, match=r"write ema.update\(found_inf=found_inf\)"): ema.update(torch.ones(1))
    assert ema.steps == 0
    with pytest.raises(AttributeError, match=r"no 'set'.*write ema.load_state_dict\(model.state_dict\(\)\)"): ema.set(model)
    with pytest.raises(AttributeError, match=r"no 'ema_model'.*write ema.module"): _ = ema.ema_model
    with pytest.raises(AttributeError, match="no 'sett'"): _ = ema.sett
    assert not hasattr(ema, "update_parameters")
    for options, message in (
            (dict(decay=0.9), "'decay'.*write momentum=0.9"), (dict(beta=0.9), "'beta'.*write momentum=0.9"),
            (dict(update_after_step=3), r"'update_after_step'.*write start=3 \+ 1"), (dict(use_warmup=True), "inverse_gamma"),
            (dict(exclude_buffers=True), r"exclude=\['running_', 'num_batches'\]"), (dict(avg_fn=min), "schedule="),
            (dict(momentun=0.9), r"'momentun'; allowed: momentum, schedule, update_period, .*, backend$")):
        with pytest.raises(UserError, match=message): ModelEma(model, **options)
    with pytest.raises(UserError, match="write momentum=0.9"): ModelEma(model, 0.9)
    ema.load_state_dict(network(seed=1).state_dict())
    assert_equal(ema.module.state_dict(), network(seed=1).state_dict())


def test_compiled_and_wrapped_models():
    model = network()
    compiled = torch.compile(model, backend="eager")
    ema, plain = ModelEma(compiled, momentum=0.5), ModelEma(model, momentum=0.5)
    step = stepper(compiled)
    for _ in range(3):
        step()
        ema.update()
        plain.update()
    assert_equal(ema.module.state_dict(), plain.module.state_dict())
    with ema.swap(compiled): assert_equal(model.state_dict(), ema.module.state_dict())


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from tritoncls.ema import ModelEma
from tritoncls.runtime import backends_on
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
ddp = nn.parallel.DistributedDataParallel(plain)
ema = ModelEma(ddp, momentum=0.5)
before = ema.module[0].weight.clone()
optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
ddp(torch.rand(4, 6) + rank).square().mean().backward()
optimizer.step()
ema.update()
torch.testing.assert_close(ema.module[0].weight, before.lerp(plain[0].weight, 0.5))
assert list(ema.module.state_dict()) == list(plain.state_dict())
every = [torch.empty_like(before) for _ in range(world)]
dist.all_gather(every, ema.module[0].weight.detach())
assert all(torch.equal(every[0], e) for e in every)

mesh = torch.distributed.init_device_mesh("cpu", (world,))
sharded = nn.Linear(6, 8)
full = {n: p.detach().clone() for n, p in sharded.named_parameters()}
for n in full: setattr(sharded, n, nn.Parameter(distribute_tensor(full[n], mesh, [Shard(0)])))
for backend in backends_on("cpu"):
    ema = ModelEma(sharded, momentum=0.75, backend=backend)
    with torch.no_grad():
        for p in sharded.parameters(): p.add_(1)
    was = {n: e.full_tensor().clone() for n, e in ema.module.named_parameters()}
    ema.update()
    for n, p in sharded.named_parameters():
        e = dict(ema.module.named_parameters())[n]
        assert e.to_local().shape[0] == 8 // world
        torch.testing.assert_close(e.full_tensor(), was[n].lerp(p.detach().full_tensor(), 0.25))
    halves = ModelEma(sharded, momentum=0.75, backend=backend, dtype=torch.bfloat16, rounding="split")
    whole, again = ModelEma(sharded, momentum=0.75, backend=backend), ModelEma(sharded, dtype=torch.bfloat16, rounding="split")
    with torch.no_grad():
        for p in sharded.parameters(): p.mul_(1.01)
    whole.update()
    halves.update()
    again.load_state_dict(halves.state_dict())
    for average in (halves, again):
        for n, e in average.weights().items():
            assert torch.equal(e.full_tensor(), whole.module.state_dict()[n].full_tensor())
            assert average.low[n].shape == e.shape and average.low[n].to_local().shape[0] == 8 // world
    narrow = nn.Linear(6, 8)
    for n in full: setattr(narrow, n, nn.Parameter(distribute_tensor(full[n].bfloat16(), mesh, [Shard(0)])))
    wide, plain = ModelEma(narrow, momentum=0.9999, backend=backend), ModelEma(nn.Linear(6, 8).bfloat16(), momentum=0.9999)
    for n, p in narrow.named_parameters():
        e, q = (dict(average.module.named_parameters())[n] for average in (wide, plain))
        dict(plain.model.named_parameters())[n].data.copy_(full[n] * 1.5)
        q.copy_(full[n].bfloat16())
        p.data.mul_(1.5)
        assert e.dtype == e.to_local().dtype == torch.float32
    wide.update()
    plain.update()
    for n, e in wide.module.named_parameters():
        torch.testing.assert_close(e.full_tensor(), dict(plain.module.named_parameters())[n])
    own = {n: p.detach().full_tensor().clone() for n, p in sharded.named_parameters()}
    with ema.swap():
        for p, e in zip(sharded.parameters(), ema.module.parameters()): assert torch.equal(p.full_tensor(), e.full_tensor())
    for n, p in sharded.named_parameters(): assert torch.equal(p.detach().full_tensor(), own[n])
dist.destroy_process_group()
print("all well", flush=True)
"""


@pytest.mark.timeout(120)
def test_data_parallel_and_sharded_parameters(tmp_path):
    (tmp_path / "program.py").write_text(DISTRIBUTED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "program.py"],
        capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("all well") == 2, done.stderr[-3000:]


def test_an_array_for_device_and_plot():
    schedule = momentum_schedule("exp_ramp", 200, momentum=0.99, time_constant=50)
    ema = ModelEma(network(), schedule=schedule, start=10)
    np.testing.assert_array_equal(ema.table[10:200], 1 - schedule[10:])
    assert (ema.table[:10] == 1).all() and alpha_at(ema.table, 10_000, 1) == 1 - schedule[-1]
