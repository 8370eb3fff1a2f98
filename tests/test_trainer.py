"Training on real batches: losses, accumulation, mixed precision, the average, evaluation, resuming, seeds, failures."
import copy
import subprocess
import sys
import warnings
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from tritoncls.augment import Preprocess, mix
from tritoncls.checkpoint import load_checkpoint, restore, save_checkpoint, trainer_state
from tritoncls.config import load_config, override
from tritoncls.data import build_dataloaders
from tritoncls.ema import ModelEma
from tritoncls.evaluate import evaluate
from tritoncls.losses import LossOutput, binary_cross_entropy, topk_correct
from tritoncls.models import build_model, freeze, train_mode
from tritoncls.precise_bn import precise_batch_norm
from tritoncls.runtime import UserError, seed_everything
from tritoncls.solver import build_solver
from tritoncls.trainer import ClsTrainer, total_loss

CFG = load_config(overrides=["model.args.widths=[4, 8]", "batch_size=32", "augments.name=null", "solver.basic_lr=0.1",
                             "model_ema.enabled=false"])
FP16 = ("amp.enabled=true", "amp.dtype=float16")


def digits(n):
    loader = build_dataloaders(CFG)[0]
    images, target = map(torch.cat, zip(*islice(loader, -(-n // 32)), strict=True))
    return images[:n], target[:n]


def batches(n, size):
    images, target = digits(n)
    return list(zip(images.split(size), target.split(size), strict=True))


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def trainer_of(data, *overrides, model=None):
    cfg = override(CFG, "solver.max_epoch=1", *overrides)
    seed_everything(cfg.seed)
    model = build_model(cfg) if model is None else model
    solver = build_solver(cfg, model)
    solver.set_lr(1.0)
    return ClsTrainer(cfg, model, data, solver)


def trained(data, *overrides, model=None):
    trainer = trainer_of(data, *overrides, model=model)
    trainer.train()
    return trainer


def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
def assert_close(a, b): assert (a - b).norm() <= 1e-6 * b.norm()


def test_every_item_of_a_loss_is_logged():
    parts = {"ce_loss": torch.tensor(1.0, requires_grad=True), "z_loss": torch.tensor(0.5)}
    trainer = trainer_of(batches(32, 32), model=linear())
    trainer.loss = lambda logits, target: {name: part + 0 * logits.sum() for name, part in parts.items()}
    trainer.train()
    logged = {name: trainer.meter[name].latest for name in ("ce_loss", "z_loss", "loss")}
    assert logged == {"ce_loss": 1, "z_loss": 0.5, "loss": 1.5}
    with pytest.raises(UserError, match="entropy"): total_loss({"entropy": torch.tensor(1.0)})


def test_a_dict_of_losses_is_not_changed():
    given = {"a_loss": torch.tensor(1.0), "b_loss": torch.tensor(2.0)}
    before = dict(given)
    assert total_loss(given)[0] == 3 and given == before


@pytest.mark.parametrize("amp", ((), FP16, (*FP16, "amp.dynamic_scale=true")))
def test_accumulated_micro_batches_step_like_one_larger_batch(amp):
    clip = ("solver.grad_clip.name=norm", "solver.grad_clip.max_norm=0.5")
    halves = trained(batches(128, 32), "solver.accumulation_steps=2", *amp, *clip, model=linear())
    whole = trained(batches(128, 64), *amp, *clip, model=linear())
    if amp: torch.testing.assert_close(weights(halves), weights(whole), rtol=2**-10, atol=2**-10)  # fp16's own rounding
    else: assert_close(weights(halves), weights(whole))


class Explodes(nn.Module):
    "A loss that is infinite in one iteration."
    def __init__(self, trainer, iteration):
        super().__init__()
        self.at = lambda: trainer.progress.iter == iteration

    def forward(self, logits, target): return nn.functional.cross_entropy(logits, target) * (float("inf") if self.at() else 1)


@pytest.mark.parametrize("dynamic", ("false", "true"))
def test_an_overflow_skips_the_step_and_the_average(dynamic):
    trainer = trainer_of(batches(128, 32), *FP16, f"amp.dynamic_scale={dynamic}", "model_ema.enabled=true",
                         "model_ema.start_epoch=0", model=linear())
    trainer.loss = Explodes(trainer, 3)
    trainer.train()
    assert weights(trainer).isfinite().all() and trainer.ema.steps == 3
    assert all(t.isfinite().all() for t in trainer.ema.module.state_dict().values())


def test_left_over_micro_batches_make_a_step_of_their_own():
    odd = trained(batches(160, 32), "solver.accumulation_steps=2", model=linear())
    data = batches(160, 32)
    joined = [tuple(map(torch.cat, zip(*data[i:i + 2], strict=True))) for i in (0, 2, 4)]
    assert_close(weights(odd), weights(trained(joined, model=linear())))
    few = trained(batches(64, 32), "solver.accumulation_steps=8", model=linear())
    assert_close(weights(few), weights(trained(batches(64, 64), model=linear())))


def test_the_average_counts_steps_over_the_whole_run():
    trainer = trained(batches(96, 32), "solver.max_epoch=4", "solver.accumulation_steps=2", "model_ema.enabled=true",
                      "model_ema.update_period=5", "model_ema.start_epoch=0", "model_ema.momentum=0.5", model=linear())
    assert trainer.ema.steps == 8  # two an epoch; fires in step 5
    first = linear().state_dict()
    assert not torch.equal(trainer.ema.module.state_dict()["1.weight"], first["1.weight"])


def test_start_epoch_0_is_epoch_0_and_update_period_0_is_refused():
    enabled = ("model_ema.enabled=true", "solver.warmup_epochs=3")
    start = lambda *more: trainer_of(batches(64, 32), *enabled, *more, model=linear()).ema.settings["start"]
    assert start("model_ema.start_epoch=0") == 0 and start("model_ema.start_epoch=null") == 6
    with pytest.raises(UserError, match="model_ema.update_period = 0"): override(CFG, "model_ema.update_period=0")


def test_the_average_copies_integer_buffers():
    model = build_model(CFG)
    model.register_buffer("relative_position_index", torch.arange(9))  # as in a Swin transformer
    trainer = trained(batches(96, 32), "model_ema.enabled=true", model=model)
    state = trainer.ema.module.state_dict()
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    assert counts and all(state[name].dtype == torch.int64 and state[name] == 3 for name in counts)
    assert torch.equal(state["relative_position_index"], torch.arange(9))


def test_the_average_finds_statistics_that_were_replaced():
    model = build_model(CFG)
    ema, bn = ModelEma(model, momentum=0.5), next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    ema.update()
    bn.running_mean = bn.running_mean + 4
    ema.update()
    assert (next(m for m in ema.module.modules() if isinstance(m, nn.BatchNorm2d)).running_mean == 2).all()


def test_precise_statistics_over_nothing_change_nothing():
    model = build_model(CFG)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        precise_batch_norm(model, [], 100)
    assert caught and all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_evaluation_counts_every_image_of_few_batches_and_refuses_none():
    model, preprocess = build_model(CFG), Preprocess(CFG)
    for n in (1, 3, 5): assert evaluate(model, batches(32 * n, 32), preprocess).count == 32 * n
    with pytest.raises(UserError, match="empty"): evaluate(model, [], preprocess)


def test_one_process_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    assert evaluate(build_model(CFG), batches(32, 32), Preprocess(CFG)).count == 32


def test_top_5_of_fewer_than_5_classes_is_100_percent():
    logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
    assert topk_correct(logits, target).tolist() == [(logits.argmax(1) == target).sum(), 8]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    data = [(images, target % 3) for images, target in batches(64, 32)]
    assert trained(data, model=model).meter["stat_acc@5"].latest == 100
    assert evaluate(model, data, Preprocess(CFG)).acc5 == 100


def test_binary_cross_entropy_takes_class_ids():
    for N, C in ((6, 4), (4, 4)):
        logits, target = torch.randn(N, C, dtype=torch.float64).float(), torch.randint(0, C, (N,))
        want = nn.functional.binary_cross_entropy_with_logits(logits.double(), nn.functional.one_hot(target, C).double())
        torch.testing.assert_close(binary_cross_entropy(logits, target).loss.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ("batch", "pair", "elem"))
@pytest.mark.parametrize("B", (2, 4, 7, 8))
def test_every_mode_mixes_batches_of_every_size(mode, B):
    assert callable(mix)
    images, target = digits(B)
    for kind in ("mixup_alpha=0.8", "cutmix_alpha=1.0"):
        cfg = override(CFG, f"augments.mixup.mode={mode}", f"augments.mixup.{kind}")
        preprocess, plain = Preprocess(cfg), Preprocess(CFG)(images, target)[0]
        samples, mixed = preprocess(images, target, np.random.default_rng(1))
        assert torch.equal(mixed.y1, target) and torch.equal(mixed.y2, target.flip(0))
        if kind.startswith("mixup"):
            lam = mixed.lam.view(-1, 1, 1, 1)
            torch.testing.assert_close(samples, lam * plain + (1 - lam) * plain.flip(0))


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    overrides = ["model_ema.enabled=true", "model_ema.start_epoch=1", "data.num_workers=0", "augments.name=RandomAffine"]

    def begin(epochs):
        cfg = override(CFG, *overrides, f"solver.max_epoch={epochs}", "solver.warmup_epochs=0")
        seed_everything(cfg.seed)
        model = build_model(cfg)
        trainer = ClsTrainer(cfg, model, build_dataloaders(cfg)[0], build_solver(cfg, model))
        trainer.solver.set_lr(1.0)
        return trainer
    straight, first, second = begin(4), begin(2), begin(4)
    straight.train()
    first.train()
    first.best = {"model": 97.5}
    save_checkpoint(tmp_path / "latest.pt", trainer_state(first, 2))
    seed_everything(99)
    second.before_train = lambda: restore(second, load_checkpoint(tmp_path / "latest.pt"))
    with pytest.warns(UserWarning, match="solver.max_epoch = 2, now 4"): second.train()
    for a, b in ((straight.model, second.model), (straight.ema.module, second.ema.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert second.best == {"model": 97.5} and second.ema.steps == straight.ema.steps
    assert second.solver.lr == straight.solver.lr


def test_an_average_can_be_added_on_resume(tmp_path):
    without, with_ema = trained(batches(64, 32)), trainer_of(batches(64, 32), "model_ema.enabled=true")
    save_checkpoint(tmp_path / "latest.pt", trainer_state(without, 1))
    with pytest.warns(UserWarning, match="model_ema.enabled = False, now True"):
        restore(with_ema, load_checkpoint(tmp_path / "latest.pt"))
    states = with_ema.ema.module.state_dict().values(), without.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)) and with_ema.ema.steps == 2


def test_the_seed_reaches_everything():
    def first_batch(seed):
        cfg = override(CFG, f"seed={seed}", "augments.name=RandomAffine")
        seed_everything(cfg.seed)
        return build_model(cfg).head.weight.detach().clone(), next(iter(build_dataloaders(cfg)[0]))[0]
    (w1, x1), (w2, x2), (w3, x3) = first_batch(1), first_batch(1), first_batch(2)
    assert torch.equal(w1, w2) and torch.equal(x1, x2) and not torch.equal(w1, w3) and not torch.equal(x1, x3)


def test_failure_has_an_exit_code_and_a_message(tmp_path):
    (tmp_path / "failing.py").write_text(
        "from tritoncls.registry import registers\n"
        "@registers.losses.register('Failing')\ndef failing(**options):\n"
        "    def loss(logits, target): raise RuntimeError('the loss failed')\n    return loss\n")
    command = [sys.executable, "-m", "tritoncls.cli", "train", "imports=[failing]", "loss.name=Failing", "solver.max_epoch=1",
               f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode not in (0, 2) and "the loss failed" in done.stderr
    done = subprocess.run([*command, "solver.basic_lr=-1"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "solver.basic_lr" in done.stderr and "Traceback" not in done.stderr


def test_frozen_layers_stay_as_they_are_and_typos_are_named():
    model = build_model(CFG)
    freeze(model, ["^features"])
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("features")}
    trained(batches(96, 32), "solver.weight_decay=0.1", model=model)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())
    assert not any(m.training for m in train_mode(model).modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(UserError, match="did you mean 'solver.momentum'"): override(CFG, "solver.momentun=0.9")


def test_an_exception_leaves_training_and_evaluation_modes_as_they_were():
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError("in the middle")
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), Fails())
    model[1].eval()
    for function in (lambda: evaluate(model, batches(32, 32), Preprocess(CFG)),
                     lambda: precise_batch_norm(model, [digits(32)[0].float()], 32)):
        with pytest.raises(RuntimeError, match="in the middle"): function()
        assert [m.training for m in model] == [True, False, True]


def test_pycls_momentum_counts_accumulation_and_gradients_are_exchanged_once_a_step():
    alpha = ("model_ema.enabled=true", "model_ema.alpha=1e-2", "solver.max_epoch=10", "batch_size=32")
    trainer = trainer_of(batches(128, 32), *alpha, "solver.accumulation_steps=2", model=linear())
    assert abs(trainer.ema.settings["momentum"] - (1 - 1e-2 * 64 / 10)) < 1e-12

    class Parallel(nn.Module):
        "Looks like DistributedDataParallel, and notes when it would exchange gradients."
        def __init__(self, module):
            super().__init__()
            self.module, self.silent, self.said = module, False, []

        def forward(self, x):
            self.said.append(not self.silent)
            return self.module(x)

        @contextmanager
        def no_sync(self):
            self.silent = True
            yield
            self.silent = False
    model = Parallel(linear())
    trained(batches(160, 32), "solver.accumulation_steps=2", model=model)
    assert model.said == [False, True, False, True, True]


class Watched(torch.Tensor):
    "A tensor that refuses to give its value to the host."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__int__,
                    torch.Tensor.cpu, torch.Tensor.numpy): raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})


class PlainLoss:
    "Loss and counts in PyTorch, without looks at values: on a CPU ours looks, because nobody has to wait there."
    def with_accuracy(self, logits, target):
        hits = logits.topk(5).indices == target[:, None]
        counts = torch.stack([hits[:, 0].sum(), hits.sum()])
        return LossOutput(nn.functional.cross_entropy(logits, target), counts, None, None, None, None)


def test_no_iteration_waits_for_the_device():
    clip = ("solver.grad_clip.name=norm", "solver.grad_clip.max_norm=1.0", "solver.accumulation_steps=2")
    trainer = trainer_of(batches(128, 32), *clip, "model_ema.enabled=true", "log_every_n_iter=99", model=linear())
    trainer.loss, step, seen = PlainLoss(), trainer.model_step, []
    trainer.model_step = lambda samples, target: seen.append(step(samples.as_subclass(Watched), target)) or seen[-1]
    trainer.train()
    assert len(seen) == 4 and all(isinstance(logged, Watched) for logged in seen[0].values())
    with pytest.raises(AssertionError, match="waits"): seen[0]["loss"].item()
