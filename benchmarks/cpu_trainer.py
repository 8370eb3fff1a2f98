"""What the trainer costs beside the same loop written by hand: python benchmarks/cpu_trainer.py

Both train the digits with the shipped recipe: same loader, augmentation, network, loss, SGD, moving average, learning rate per
iteration, accuracy, a log line now and then. The hand-written epochs run in between the trainer's, which keeps its hooks: logs,
TensorBoard, checkpoints.
Prints the median time of an epoch of each, and the ratio; evaluation and checkpoints of the trainer are counted apart.
"""
import statistics
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from tritoncls.cli import build_trainer, open_folder
from tritoncls.config import load_config
from tritoncls.data import build_dataloaders
from tritoncls.hooks import BaseHook
from tritoncls.models import build_model
from tritoncls.schedules import lr_schedule

EPOCHS = 13


class ByHand:
    "The loop in plain PyTorch."
    def __init__(self, cfg):
        s = cfg.solver
        self.cfg, self.loader, self.model, self.shadow = cfg, build_dataloaders(cfg)[0], build_model(cfg), build_model(cfg)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, s.momentum, 0, s.weight_decay, s.nesterov)
        self.lr = lr_schedule(s.lr_schedule, s.max_epoch, steps_per_epoch=len(self.loader), warmup_epochs=s.warmup_epochs)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (cfg.preprocess.img_mean, cfg.preprocess.img_std))

    def epoch(self, number: int) -> None:
        self.model.train()
        self.loader.set_epoch(number)
        average = [t for t in self.shadow.state_dict().values() if t.is_floating_point()]
        current = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        for n, (images, target) in enumerate(self.loader):
            self.optimizer.param_groups[0]["lr"] = self.lr[(number - 1) * len(self.loader) + n] * self.cfg.solver.basic_lr
            logits = self.model((images.float() - self.mean) / self.std)
            loss = F.cross_entropy(logits, target, label_smoothing=self.cfg.loss.label_smooth)
            hit = logits.detach().topk(5).indices == target[:, None]
            acc1, acc5 = 100 * hit[:, 0].float().mean(), 100 * hit.any(1).float().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad(): torch._foreach_lerp_(average, current, 1 - self.cfg.model_ema.momentum)
            if n % self.cfg.log_every_n_iter == 0: print(f"{loss:.3f} {acc1:.1f} {acc5:.1f}")


class Stopwatch(BaseHook):
    """The first hook: its `before_epoch` comes before, its `after_epoch` before those of all others.

    The loop by hand goes first in every other epoch: whoever does finds the caches full of checkpoints.
    """
    def __init__(self, by_hand: ByHand): self.by_hand, self.ours, self.theirs = by_hand, [], []

    def before_epoch(self) -> None:
        if self.trainer.progress.epoch % 2: self.hand()
        self.began = time.perf_counter()

    def after_epoch(self) -> None:
        self.ours.append(time.perf_counter() - self.began)
        if not self.trainer.progress.epoch % 2: self.hand()

    def hand(self) -> None:
        began = time.perf_counter()
        self.by_hand.epoch(self.trainer.progress.epoch)
        self.theirs.append(time.perf_counter() - began)


def main() -> None:
    with TemporaryDirectory() as folder:
        cfg = load_config(overrides=[f"solver.max_epoch={EPOCHS}", f"output_dir={Path(folder) / 'run'}", "device=cpu"])
        trainer, watch = build_trainer(cfg), Stopwatch(ByHand(cfg))
        open_folder(cfg)
        watch.trainer = trainer
        trainer.hooks.insert(0, watch)
        with redirect_stdout(StringIO()): trainer.train()
    ours, theirs = (statistics.median(times[1:]) for times in (watch.ours, watch.theirs))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {EPOCHS - 1} epochs")
    print(f"by hand {1e3 * theirs:.0f} ms, ClsTrainer {1e3 * ours:.0f} ms, ratio {ours / theirs:.3f}", file=sys.stdout)


if __name__ == "__main__": main()
