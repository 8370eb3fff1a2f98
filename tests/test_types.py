"The hints of the public names, as mypy sees them from the outside."
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tritoncls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]

USER = """
from pathlib import Path
from typing import assert_type

import numpy as np
import torch

import tritoncls

logits, target = torch.randn(4, 10, requires_grad=True), torch.arange(4)
out = tritoncls.cross_entropy(logits, target, label_smoothing=0.1, topk=(1, 5))
assert_type(out, tritoncls.LossOutput)
assert_type(out.loss, torch.Tensor)
assert_type(tritoncls.CrossEntropyLoss().with_accuracy(logits, target), tritoncls.LossOutput)
assert_type(tritoncls.cross_entropy_and_grad(logits.detach(), target), tuple[tritoncls.LossOutput, torch.Tensor])
assert_type(tritoncls.topk_correct(logits, tritoncls.MixedTarget(target, target, 0.5)), torch.Tensor)

model: torch.nn.Module = tritoncls.SmallResNet(10, channels=1)
ema = tritoncls.ModelEma(model, momentum=0.99)
ema.update()
assert_type(ema.module, torch.nn.Module)
cfg = tritoncls.load_config(Path("mine.yaml"), ["solver.max_epoch=3"])
assert_type(cfg, tritoncls.Config)
assert_type(cfg.solver.max_epoch, int)
assert_type(tritoncls.build_model(cfg), torch.nn.Module)
rates: np.ndarray = tritoncls.lr_schedule("cosine", 10, steps_per_epoch=5)
assert_type(tritoncls.evaluate(model, [], tritoncls.Preprocess(cfg)).acc1, float)
"""
MISTAKES = """
import tritoncls

tritoncls.CrossEntropyLos()
tritoncls.cross_entropy("logits", 3)
tritoncls.ModelEma(model=None)
tritoncls.CrossEntropyLoss(smoothing=0.1)
"""


def mypy(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    return subprocess.run([sys.executable, "-m", "mypy", cache, "--no-error-summary", *arguments], cwd=folder, text=True,
                          capture_output=True, timeout=800, env={**os.environ, "MYPYPATH": str(ROOT)})


def test_a_user_may_be_strict(tmp_path):
    (tmp_path / "names.py").write_text(f"from tritoncls import ({', '.join(tritoncls.__all__)})\n")
    (tmp_path / "user.py").write_text(USER)
    done = mypy(tmp_path, "--strict", "--follow-imports=silent", "names.py", "user.py")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_users_mistakes_are_found(tmp_path):
    (tmp_path / "user.py").write_text(MISTAKES)
    done = mypy(tmp_path, "--strict", "--follow-imports=silent", "user.py")
    found = sorted({(line.split(":")[1], line.rsplit("[")[-1]) for line in done.stdout.splitlines() if "error" in line})
    assert found == [("4", "attr-defined]"), ("5", "arg-type]"), ("6", "arg-type]"), ("7", "call-arg]")], done.stdout


def test_the_packages_own_hints_resolve():
    done = mypy(ROOT, "-p", "tritoncls")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
