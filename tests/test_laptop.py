"A laptop: no Triton, and a device that has no fp64."
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritoncls import runtime
from tritoncls.augment import Preprocess
from tritoncls.config import load_config
from tritoncls.ema import ModelEma, update_emas
from tritoncls.evaluate import add_to_confusion, evaluate, per_class_accuracy
from tritoncls.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from tritoncls.meters import MeterBuffer
from tritoncls.models import build_model
from tritoncls.precise_bn import precise_batch_norm
from tritoncls.runtime import UserError
from tritoncls.trace import check_trace

ROOT = Path(__file__).parents[1]
NO_TRITON = str(Path(__file__).parent / "without_triton")  # on PYTHONPATH it hides Triton from Python


def python(code: str, first: str = NO_TRITON) -> str:
    "Run code in a process that looks for modules in `first` first, and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([first, str(ROOT)])})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_imported_in_one_place():
    files = [*(ROOT / "tritoncls").rglob("*.py"), *(ROOT / "nbs").glob("*.ipynb")]
    found = {path.stem for path in files if re.search(r'^ *"? *import triton\b', path.read_text(encoding="utf-8"), re.M)}
    assert found == {"runtime", "00_runtime"}, "all others take `triton` and `tl` from tritoncls.runtime"


def test_without_triton_every_module_is_imported_and_a_launch_says_what_is_missing():
    said = python("""
import pkgutil, sys
from importlib import import_module
import tritoncls
from tritoncls.kernels.rounding import round_stochastic
from tritoncls.runtime import HAS_TRITON, INTERPRETER, UserError, backends_on, triton
import torch

for module in pkgutil.walk_packages(tritoncls.__path__, "tritoncls."):
    if not module.name.endswith("__main__"): import_module(module.name)
for name in tritoncls.__all__: getattr(tritoncls, name)
assert "triton" not in sys.modules and not HAS_TRITON and not INTERPRETER and backends_on("cuda") == ("torch",)
x, y = torch.randn(8, 10, requires_grad=True), torch.arange(8)
calls = (lambda: round_stochastic[(1,)](x, y, 0, triton.language.bfloat16), lambda: triton.compile(round_stochastic),
         lambda: tritoncls.topk_correct(x, y, backend="triton"), lambda: tritoncls.ema_blend_([y], [y], 0.5, backend="triton"))
for call in calls:
    try: call()
    except UserError as error: print(error)
loss = tritoncls.CrossEntropyLoss(label_smoothing=0.1)(x, y)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1))
""")
    assert said.splitlines() == ["Triton is not installed: its kernels are skipped", *(
        f"{what} needs Triton, which is published for Linux and cannot be imported here: No module named 'triton'"
        for what in ("round_stochastic", "triton.compile", "backend 'triton'", "backend 'triton'"))]


def test_a_triton_that_does_not_load_is_named(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: wrong ELF class')\n")
    said = python("from tritoncls.runtime import WHY_NO_TRITON; print(WHY_NO_TRITON)", str(tmp_path))
    assert said == "libtriton.so: wrong ELF class\n"


def test_compiling_for_a_gpu_without_triton_is_refused_before_training(monkeypatch):
    compiled = load_config(overrides=["trace=compile"])
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    check_trace(compiled, torch.device("cpu"))  # there the compiler writes C++
    with pytest.raises(UserError, match="^trace = 'compile' on a GPU needs Triton, .*$"):
        check_trace(compiled, torch.device("cuda"))


class LikeMps(TorchDispatchMode):
    "Tensors on `meta` refuse fp64, as those on Apple's GPUs do; on the host, everything that comes from there is 1."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        there = lambda x: isinstance(x, torch.Tensor) and x.device.type == "meta"
        if name == "_local_scalar_dense" and there(args[0]): return 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and there(args[0]) and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        if any(there(t) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"{func}: the MPS framework doesn't support float64")
        return out


@pytest.fixture
def like_mps(monkeypatch):
    monkeypatch.setattr(runtime, "WITHOUT_FP64", ("meta",), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_meta", False)  # averages refuse tensors without numbers
    with LikeMps(): yield torch.device("meta")


def test_the_lookalike_has_no_fp64(like_mps):
    x = torch.zeros(3).to(like_mps)
    assert x.tolist() == [1, 1, 1] and x.sum().item() == 1 and x.int().max().item() == 1
    for double in (lambda: x.double(), lambda: torch.zeros(3, dtype=torch.float64).to(like_mps),
                   lambda: torch.zeros(3, dtype=torch.float64, device=like_mps)):
        with pytest.raises(TypeError, match="float64"): double()


def test_a_step_an_average_and_an_evaluation_need_no_fp64(like_mps):
    cfg = load_config(overrides=["model.args.widths=[4]", "augments.mixup.mixup_alpha=0.2"])
    model, preprocess = build_model(cfg).to(like_mps), Preprocess(cfg).to(like_mps)
    images, ids = torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.arange(16) % 10
    averages, meter = [ModelEma(model, momentum=m) for m in (0.9, 0.99)], MeterBuffer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for target in (ids, torch.eye(10)[ids]):
        for loss in (CrossEntropyLoss(label_smoothing=0.1), BinaryCrossEntropyLoss()):
            samples, mixed = preprocess(images, target, np.random.default_rng(0))
            out = loss.with_accuracy(model(samples), mixed)
            out.loss.backward()
            optimizer.step()
            update_emas(averages)
            averages[0].update()
            meter.update(loss=out.loss, correct=out.correct[0], time=0.5)
    assert meter["loss"].latest == 1 and meter["time"].latest == 0.5
    assert precise_batch_norm(model, [preprocess(images, ids)[0]], 16, twins=[averages[0].module]) == 16
    assert evaluate(averages[1].module, [(images, torch.eye(10)[ids])], preprocess).acc1 == 100
    confusion = torch.zeros(10, 10, dtype=torch.int64, device=like_mps)
    add_to_confusion(confusion, model(samples), ids.to(like_mps))
    assert per_class_accuracy(confusion).shape == (10,)
