"""Traced training beside plain training: the same numbers.

The tests marked `cuda` import the trainer, and so need all that the package needs.
"""
import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("pydantic", reason="the trainer needs the configuration")

from tritoncls.checkpoint import restore, trainer_state
from tritoncls.config import load_config, override
from tritoncls.ema import ModelEma
from tritoncls.losses import LossOutput
from tritoncls.models import build_model
from tritoncls.runtime import UserError, seed_everything
from tritoncls.schedules import lr_schedule
from tritoncls.solver import build_solver
from tritoncls.trace import Compiled, CudaRecorder, DeviceSolver, Replay, replay, traced
from tritoncls.trainer import ClsTrainer

ROUNDING = 5e-6  # fused optimizers and kernels round at other places: up to 1.7e-6 after 33 iterations
# The average is a copy for 11 steps and blends from then on; the learning rate changes before every iteration.
CFG = load_config(overrides=[
    "device=cpu", "model.args.widths=[4, 8]", "batch_size=16", "solver.max_epoch=3", "solver.basic_lr=0.1",
    "solver.warmup_epochs=1", "model_ema.start_epoch=1", "model_ema.momentum=0.9"])


def batches(n, short=0, device="cpu"):
    gen = torch.Generator().manual_seed(5)
    sizes = [16] * n + [short] * bool(short)
    return [(torch.randint(0, 256, (size, 1, 8, 8), generator=gen, dtype=torch.uint8).to(device),
             torch.randint(0, 10, (size,), generator=gen).to(device)) for size in sizes]


class Evaluates:
    "Sets the learning rate before an iteration, and looks at model and average after an epoch."
    def __init__(self, epochs, data): self.rates, self.data, self.losses = None, data, []

    def __getattr__(self, event): return lambda: None

    def before_iter(self):
        t = self.trainer
        if self.rates is None:
            self.rates = lr_schedule("cosine", t.progress.max_epoch, steps_per_epoch=t.progress.max_iter, warmup_epochs=1)
        t.solver.set_lr(self.rates[t.progress.current_iter])

    def after_iter(self): self.losses.append(self.trainer.meter["loss"].latest)

    def after_epoch(self):
        t = self.trainer
        for module in (t.model.eval(), *([t.ema.module] if t.ema else [])):
            with torch.no_grad(): module(t.preprocess(*self.data[0])[0])


class PlainLoss:
    "Loss and counts in PyTorch, without looks at values: on a CPU ours looks, because nobody has to wait there."
    def with_accuracy(self, logits, target):
        y1, y2, lam = (target, target, 1.0) if isinstance(target, torch.Tensor) else target
        ce = partial(nn.functional.cross_entropy, logits.float(), reduction="none")
        hits = logits.topk(5).indices == y1[:, None]
        return LossOutput((lam * ce(y1) + (1 - lam) * ce(y2)).mean(), torch.stack([hits[:, 0].sum(), hits.sum()]),
                          None, None, None, None)


def train(data, *overrides, model=None, loss=None, prepare=lambda trainer: None, state=None):
    cfg = override(CFG, *overrides)
    seed_everything(cfg.seed)
    model = (build_model(cfg) if model is None else model()).to(data[0][0].device)
    trainer = ClsTrainer(cfg, model, data, build_solver(cfg, model), [hook := Evaluates(cfg.solver.max_epoch, data)])
    if loss: trainer.loss = loss
    prepare(trainer)
    if state: restore_at = partial(restore, trainer, state)
    if state: hook.before_train = restore_at
    trainer.train()
    return trainer


def gap(a, b):
    "The largest relative distance of model, average and loss curve; steps and learning rates are the same."
    assert a.solver.lr == pytest.approx(b.solver.lr, rel=1e-12) and a.progress == b.progress
    pairs = [(a.model, b.model)]
    if a.ema:
        assert a.ema.steps == b.ema.steps
        pairs.append((a.ema.module, b.ema.module))
    gaps = []
    for x, y in pairs:
        states = zip(x.state_dict().values(), y.state_dict().values(), strict=True)
        gaps += [((m.double() - n.double()).norm() / n.double().norm()).item() for m, n in states]
    losses = [torch.tensor(t.hooks[0].losses, dtype=torch.float64) for t in (a, b)]
    losses = [x[losses[1].isfinite()] for x in losses]
    return max(*gaps, ((losses[0] - losses[1]).abs().max() / losses[1].abs().max()).item())


# A graph without a GPU


class Tape(TorchDispatchMode):
    """What a CUDA graph is on a GPU: the operations, with their tensors, and the host's numbers as they were.

    A replay does them again and writes the results to where the first ones went. An operation that gives a value to the host
    cannot be recorded. The average is one entry, because on a CPU its update reads its own table.
    """
    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default: raise RuntimeError("this operation waits for the device")
        out = func(*args, **kwargs)
        mine = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        fresh = [isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in mine for t in tree_leaves(out)]
        self.entries.append((func, args, kwargs, [t if new else None for t, new in zip(tree_leaves(out), fresh, strict=True)]))
        return out

    def replay(self):
        for func, args, kwargs, outs in self.entries:
            for old, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if old is not None: old.copy_(new)


class TapeRecorder:
    "Records on a tape, and counts. A recording executes here, so its first replay does nothing."
    def __init__(self): self.recorded = self.replayed = self.plain = 0

    def run(self, work):
        self.plain += 1
        return work()

    def record(self, work):
        self.recorded += 1
        tape, update = Tape(), ModelEma.update

        def one_entry(ema, *, found_inf):
            call = lambda: update(ema, found_inf=found_inf)
            tape.entries.append((call, (), {}, [None]))
            with torch.utils._python_dispatch._disable_current_modes(): call()
        ModelEma.update = one_entry
        try:
            with tape, patch("tritoncls.ema.capturing", lambda: True): result = work()
        finally: ModelEma.update = update
        done = [True]

        def again():
            self.replayed += 1
            with torch.no_grad():
                if not done: tape.replay()
            done.clear()
            return result
        return again


def recorded(data, *overrides, recorder=None, **options):
    recorder = recorder or TapeRecorder()
    trainer = train(data, "trace=graph", *overrides, loss=PlainLoss(), prepare=lambda t: replay(t, recorder), **options)
    return trainer, recorder


FP16 = ("amp.enabled=true", "amp.dtype=float16")
CLIP = ("solver.grad_clip.name=norm", "solver.grad_clip.max_norm=0.5")


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


CASES = {
    "plain": (), "accumulation": ("solver.accumulation_steps=2",), "clip": CLIP,
    "adam": ("solver.optimizer=adam", "solver.basic_lr=0.01"),
    "adamw": ("solver.optimizer=adamw", "solver.basic_lr=0.01", "solver.accumulation_steps=2", *CLIP),
    "mixup": ("augments.mixup.mixup_alpha=0.8", "augments.mixup.cutmix_alpha=1.0"),
    "bfloat16": ("amp.enabled=true",), "period": ("model_ema.update_period=3", "solver.accumulation_steps=2")}


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_iteration_is_the_plain_one(case):
    "Through the start of the average, changes of the learning rate, groups of micro-batches and evaluations in between."
    data = batches(11)
    plain = train(data, *CASES[case], loss=PlainLoss())
    replayed, recorder = recorded(data, *CASES[case])
    kinds = 3 if "solver.accumulation_steps=2" in CASES[case] else 1
    assert recorder.recorded == kinds - (kinds == 3)  # the smaller group comes once in an epoch: it is not recorded yet
    assert recorder.replayed == 33 - 3 * kinds and recorder.plain == 3 * kinds
    assert gap(replayed, plain) < ROUNDING


def test_a_tape_keeps_the_hosts_numbers():
    "What the tests above rely on: a learning rate on the host would be noticed, and so would a look at a value."
    x, rate, tape = torch.ones(()), 1.0, Tape()
    with tape: x.add_(x * rate)
    rate = 5.0
    tape.replay()
    assert x.item() == 4
    with pytest.raises(RuntimeError, match="waits"), Tape(): x.item()


def test_a_short_batch_runs_as_it_is_and_is_mentioned_once():
    data = batches(6, short=5)
    plain = train(data, loss=PlainLoss())
    with pytest.warns(UserWarning, match=r"\(5, 1, 8, 8\) is not like the first one, \(16, 1, 8, 8\)") as said:
        replayed, recorder = recorded(data)
    assert len(said) == 1 and recorder.plain == 3 + 3 and recorder.replayed == 18 - 3
    assert gap(replayed, plain) < ROUNDING


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_overflow_skips_the_replayed_step_too(dynamic):
    data, bad = batches(9), 3
    sums = [target.sum().item() for _, target in data]
    assert sums.count(sums[bad]) == 1

    class Overflow(PlainLoss):
        "Infinite for one batch of the epoch."
        def with_accuracy(self, logits, target):
            out = super().with_accuracy(logits, target)
            return out._replace(loss=out.loss * torch.where(target.sum() == sums[bad], float("inf"), 1.0))
    options = (*FP16, f"amp.dynamic_scale={dynamic}", *CLIP)
    plain = train(data, *options, loss=Overflow(), model=linear)
    recorder = TapeRecorder()
    replayed = train(data, "trace=graph", *options, loss=Overflow(), model=linear,
                     prepare=lambda trainer: replay(trainer, recorder))
    assert recorder.replayed == 24 and plain.ema.steps == 3 * 8
    assert plain.hooks[0].losses.count(float("inf")) == replayed.hooks[0].losses.count(float("inf")) == 3
    assert gap(replayed, plain) < ROUNDING and all(p.isfinite().all() for p in replayed.model.parameters())
    assert replayed.solver.scaler.get_scale() == plain.solver.scaler.get_scale() == (65536 / 8 if dynamic else 128)


@pytest.mark.parametrize("how", ["fresh", "restored"])
def test_an_overflow_in_the_very_first_step_leaves_the_momentum_at_zero(how, monkeypatch):
    "The fused SGD of PyTorch allocates its buffers without filling them, and an overflow returns before they are written."
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: empty_like(t, **options).fill_(float("nan")))
    cfg = override(CFG, *FP16, "amp.dynamic_scale=true", "solver.optimizer=sgd", "solver.momentum=0.9")
    x, models = torch.linspace(-1, 1, 128).view(2, 64), [linear(), linear()]
    plain, device = build_solver(cfg, models[0]), DeviceSolver(models[1], cfg)
    if how == "restored": device.load_state_dict(plain.state_dict())
    for factor in (float("inf"), 1.0, float("inf"), 1.0):
        for model, solver in zip(models, (plain, device), strict=True):
            solver.set_lr(0.1)
            solver.backward(model(x).square().mean() * factor)
            solver.modify_grad()
            solver.step()
    assert plain.scaler.get_scale() == device.scaler.get_scale() == 65536 / 4
    for a, b in zip(*(model.parameters() for model in models), strict=True): torch.testing.assert_close(a, b)


def test_a_loaded_state_goes_to_where_a_graph_reads_it():
    for optimizer in ("sgd", "adam", "adamw"):
        cfg, models = override(CFG, f"solver.optimizer={optimizer}"), [linear(), linear()]
        solvers = [DeviceSolver(model, cfg) for model in models]
        for model, solver, steps in zip(models, solvers, (1, 3), strict=True):
            for _ in range(steps):
                solver.backward(model(torch.ones(2, 64)).square().mean())
                solver.step()
        places = lambda: [t.data_ptr() for state in solvers[0].optimizer.state.values() for t in state.values()]  # noqa: B023
        before = places()
        solvers[0].load_state_dict(solvers[1].state_dict())
        assert places() == before and before
        for ours, theirs in zip(*(solver.optimizer.state.values() for solver in solvers), strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        solvers[0].load_state_dict(DeviceSolver(linear(), cfg).state_dict())
        assert places() == before and all(not t.any() for state in solvers[0].optimizer.state.values() for t in state.values())


def test_what_waits_for_the_device_cannot_be_recorded():
    class Waits(PlainLoss):
        def with_accuracy(self, logits, target):
            out = super().with_accuracy(logits, target)
            return out._replace(loss=out.loss * (1 if out.loss.item() > 0 else 2))
    with pytest.raises(UserError, match="cannot be recorded.*waits for the device"):
        train(batches(9), loss=Waits(), prepare=lambda t: replay(t, TapeRecorder()))


def test_tensors_that_move_are_recorded_anew():
    class Moves:
        def __getattr__(self, event): return lambda: None

        def after_epoch(self):
            if self.trainer.progress.epoch == 2:
                for p in self.trainer.model.parameters(): p.data = p.data.clone()

    def prepare(trainer, recorder=None):
        trainer.hooks.append(hook := Moves())
        hook.trainer = trainer
        if recorder: replay(trainer, recorder)
    plain = train(batches(6), loss=PlainLoss(), prepare=prepare)
    recorder = TapeRecorder()
    replayed = train(batches(6), "trace=graph", loss=PlainLoss(), prepare=partial(prepare, recorder=recorder))
    assert recorder.recorded == 2 and recorder.plain == 6 and gap(replayed, plain) < ROUNDING
    assert len(replayed.ema.captured) == 1, "what the first recording read is kept for nothing"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("first", "second"), [("off", "graph"), ("graph", "off"), ("graph", "graph")])
def test_checkpoints_of_plain_and_replayed_runs_are_the_same(first, second, optimizer):
    data, options = batches(8), (f"solver.optimizer={optimizer}", "solver.basic_lr=0.01", "solver.lr_schedule=cosine")

    def part(trace, **more):
        if trace == "graph": return recorded(data, *options, **more)[0]
        return train(data, *options, loss=PlainLoss(), **more)
    straight = part("off")
    stop = []

    class Stop:
        def __getattr__(self, event): return lambda: None

        def after_epoch(self):
            if self.trainer.progress.epoch == 2:
                stop.append(trainer_state(self.trainer, 2))
                raise KeyboardInterrupt

    cfg = override(CFG, *options, f"trace={first}")
    seed_everything(cfg.seed)
    model = build_model(cfg)
    begun = ClsTrainer(cfg, model, data, build_solver(cfg, model), [Evaluates(3, data), Stop()])
    begun.loss = PlainLoss()
    if first == "graph": replay(begun, TapeRecorder())
    with pytest.raises(KeyboardInterrupt): begun.train()
    groups = stop[0]["solver"]["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) for group in groups)
    resumed = part(second, state=stop[0])
    losses = straight.hooks[0].losses
    straight.hooks[0].losses = losses[-8:]
    assert gap(resumed, straight) < ROUNDING


def test_a_trainer_with_an_iteration_of_its_own_is_refused():
    class Mine(ClsTrainer):
        def train_one_iter(self): pass
    model = linear()
    with pytest.raises(UserError, match="Mine has its own"):
        replay(Mine(CFG, model, batches(1), build_solver(CFG, model)), TapeRecorder())


def test_a_trainer_on_a_cpu_takes_no_graph():
    cfg, model = override(CFG, "trace=graph"), linear()
    with pytest.raises(UserError, match="needs a GPU"): traced(ClsTrainer(cfg, model, batches(1), build_solver(cfg, model)))


# Compiled


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))


MIXED = (*CASES["mixup"], "loss.label_smooth=0.2", *CLIP)


@pytest.mark.parametrize(("model", "more"), [(dense, ()), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    (convolutions, ()), (convolutions, MIXED), (dense, CASES["bfloat16"])))], ids=["dense", "plain", "mixed", "bfloat16"])
def test_a_compiled_run_is_the_plain_one(model, more):
    "With accumulation, the start of the average, learning rates that change, evaluations, dropout and a short last batch."
    data, options = batches(5, short=7), ("solver.accumulation_steps=2", *more)
    plain = train(data, *options, model=model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.warns(UserWarning, match=r"\(7, 1, 8, 8\) is not like the first one") as said:
        compiled = train(data, "trace=compile", *options, model=model, prepare=traced)
    counts = torch._dynamo.utils.counters
    assert isinstance(compiled.forward, Compiled) and len(said) == 1 and not counts["graph_break"]
    assert counts["stats"]["unique_graphs"] == 1, "it was compiled more than once"
    assert gap(compiled, plain) < ROUNDING


def test_a_model_that_breaks_the_graph_is_an_error():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = linear()

        def forward(self, x):
            x = self.head(x)
            torch._dynamo.graph_break()
            return x
    with pytest.raises(UserError, match="trace = 'compile' does not work here.*"):
        train(batches(2), "trace=compile", model=Breaks, prepare=traced)


def test_no_compiler_is_an_error_that_says_so(monkeypatch):
    import torch._inductor.config as config
    torch._dynamo.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch._inductor.utils.fresh_inductor_cache(), pytest.raises(UserError, match="compile.*(?s:.*)no-such-compiler"):
            train(batches(2), "trace=compile", model=dense, prepare=traced)


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("case", [*CASES, "float16"])
def test_a_traced_run_on_a_gpu_is_the_plain_one(case):
    data = batches(11, short=5, device="cuda")
    options = ("device=cuda", *(CASES[case] if case in CASES else (*FP16, "amp.dynamic_scale=true")))
    plain = train(data, *options)
    for trace in ("compile", "graph"):
        with pytest.warns(UserWarning, match="is not like the first one"):
            other = train(data, *options, f"trace={trace}", prepare=traced)
        assert gap(other, plain) < (1e-4 if "amp.enabled=true" not in options else 2e-2), trace
    assert isinstance(other.solver, DeviceSolver) and isinstance(other.train_one_iter, Replay)
    assert isinstance(other.train_one_iter.recorder, CudaRecorder) and other.train_one_iter.replays
