"Shapes, dtypes, strides and special values that nobody thought of; and torchmetrics."
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tritoncls.kernels.binary_cross_entropy import BinaryOptions, binary_cross_entropy_reference
from tritoncls.kernels.cross_entropy import Options, cross_entropy_reference
from tritoncls.losses import (
    MixedTarget, binary_cross_entropy, binary_cross_entropy_and_grad, cross_entropy, cross_entropy_and_grad, topk_correct)
from tritoncls.runtime import UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@st.composite
def problems(draw):
    "Logits in some layout, and a target of some kind."
    N, C = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 3, 7, 10, 31, 64, 257, 300, 2049]))
    dtype = draw(st.sampled_from(list(EPS)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left, right = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    wide = (torch.randn(N, left + C + right, generator=gen) * draw(st.sampled_from([1.0, 5.0, 50.0]))).to(dtype)
    x = wide[:, left:left + C]
    if draw(st.booleans()): x = x.round()  # ties
    if draw(st.booleans()) and N: x[draw(st.integers(0, N - 1)), draw(st.integers(0, C - 1))] = -float("inf")
    if draw(st.booleans()): x = x.T.contiguous().T
    ids = lambda: torch.randint(0, C, (N,), generator=gen)
    lam = draw(st.sampled_from([0.0, 0.3, 1.0])) if draw(st.booleans()) else torch.rand(N, generator=gen)
    target = {"ids": ids, "mixed": lambda: MixedTarget(ids(), ids(), lam), "dense": lambda: torch.rand(N, C, generator=gen)}
    return x, target[draw(st.sampled_from(sorted(target)))]()


def doubled(target):
    if isinstance(target, MixedTarget): return target._replace(lam=torch.as_tensor(target.lam).double())
    return target.double() if target.is_floating_point() else target


def close(ours, exact, dtype):
    assert ours.isnan().tolist() == exact.isnan().tolist()
    assert ours.isinf().tolist() == exact.isinf().tolist()
    finite = exact.isfinite()
    a, b = ours[finite].double(), exact[finite]
    if len(b): assert (a - b).abs().max() <= 2 * EPS[dtype] * b.abs().max() + 32 * 2**-23 * (1 + b.abs().max())


def gradient(function, x):
    x = x.detach().requires_grad_()
    loss = function(x)
    loss.sum().backward()
    return loss.detach(), x.grad


LOSSES = [  # ours, the formula, its options
    pytest.param(cross_entropy, cross_entropy_reference, Options, id="cross_entropy"),
    pytest.param(binary_cross_entropy, binary_cross_entropy_reference, BinaryOptions, id="binary_cross_entropy")]

BOTH = [  # ours with its gradient, the formula, its options
    pytest.param(cross_entropy_and_grad, cross_entropy_reference, Options, id="cross_entropy"),
    pytest.param(binary_cross_entropy_and_grad, binary_cross_entropy_reference, BinaryOptions, id="binary_cross_entropy")]


@pytest.mark.parametrize(("loss", "reference", "options"), LOSSES)
@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.1]), st.sampled_from(["none", "sum"]), st.sampled_from(["torch", "triton"]))
def test_loss_and_gradient_are_those_of_the_formula_in_fp64(loss, reference, options, problem, smoothing, reduction, backend):
    x, target = problem
    chosen = dict(label_smoothing=smoothing, reduction=reduction)
    exact = gradient(lambda x: reference(x, doubled(target), options(**chosen)), x.double())
    ours = gradient(lambda x: loss(x, target, **chosen, backend=backend).loss, x)
    close(ours[0], exact[0], torch.float32)
    rows = exact[1].isfinite().all(1) & x.isfinite().all(1)
    close(ours[1][rows], exact[1][rows], x.dtype)


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from(["torch", "triton"]))
def test_counts_are_those_of_a_stable_sort(problem, backend):
    x, target = problem
    order = x.float().sort(dim=1, descending=True, stable=True).indices
    hit = lambda y, k: (order[:, :k] == y[:, None]).any(1).double()
    lam = 1.0
    if isinstance(target, MixedTarget): y1, y2, lam = target.y1, target.y2, torch.as_tensor(target.lam).double()
    else: y1 = y2 = target.argmax(1) if target.ndim == 2 else target
    want = [(lam * hit(y1, k) + (1 - lam) * hit(y2, k)).sum().item() for k in (1, 5)]
    assert topk_correct(x, target, backend=backend).tolist() == pytest.approx(want, abs=1e-5)


def test_counts_are_those_of_torchmetrics():
    multiclass_accuracy = pytest.importorskip("torchmetrics").functional.classification.multiclass_accuracy
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 20, generator=gen), torch.randint(0, 20, (500,), generator=gen)
    want = [multiclass_accuracy(x, y, num_classes=20, average="micro", top_k=k).item() for k in (1, 5)]
    assert [n / 500 for n in topk_correct(x, y).tolist()] == pytest.approx(want)


WIDTHS = (3, 10, 300, 1001, 8192)


@pytest.mark.parametrize("kind", ["ids", "mixed", "dense"])
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize(("both", "reference", "options"), BOTH)
def test_the_gradient_may_be_written_over_the_logits(both, reference, options, C, kind):
    "Of few rows of 8192 classes, several programs share each; none may read a target's logit that another has overwritten."
    gen = torch.Generator().manual_seed(C)
    x, y = torch.randn(2, C, generator=gen), torch.randint(0, C, (2, 2), generator=gen)
    target = {"ids": y[0], "mixed": MixedTarget(y[0], y[1], 0.3), "dense": torch.rand(2, C, generator=gen)}[kind]
    chosen = dict(label_smoothing=0.1, reduction="sum")
    exact = gradient(lambda x: reference(x, doubled(target), options(**chosen)), x.double())
    order = x.sort(dim=1, descending=True, stable=True).indices
    places = lambda y: (order == y[:, None]).int().argmax(1)
    ranks = {"ids": lambda: places(y[0]), "mixed": lambda: torch.stack([places(y[0]), places(y[1])], 1),
             "dense": lambda: places(target.argmax(1))}[kind]()
    for backend in ("torch", "triton"):
        logits = x.clone()
        out, dx = both(logits, target, **chosen, inplace=True, return_rank=True, backend=backend)
        assert dx.data_ptr() == logits.data_ptr() and out.rank.tolist() == ranks.tolist()
        close(out.loss, exact[0], torch.float32)
        close(logits, exact[1], torch.float32)


def torch_cross_entropy(x, target, weight): return F.cross_entropy(x, target, weight, label_smoothing=0.1)


def torch_binary_cross_entropy(x, target, weight):
    return F.binary_cross_entropy_with_logits(x, 0.9 * target + 0.1 / x.shape[1], weight)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("dtype", "backend"), [
    (torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton"), (torch.bfloat16, "torch")])
@pytest.mark.parametrize(("loss", "exact"), [
    (cross_entropy, torch_cross_entropy), (binary_cross_entropy, torch_binary_cross_entropy)])
def test_a_target_of_fewer_bits_costs_the_loss_no_digit(loss, exact, dtype, backend, target_dtype, weighted):
    gen = torch.Generator().manual_seed(0)
    x, target = torch.randn(4, 3, generator=gen).to(dtype), torch.rand(4, 3, generator=gen).to(target_dtype)
    weight = torch.rand(3, generator=gen).to(target_dtype) if weighted else None
    want = gradient(lambda x: exact(x, target.double(), None if weight is None else weight.double()), x.double())
    got = gradient(lambda x: loss(x, target, weight=weight, label_smoothing=0.1, backend=backend).loss, x)
    eps = 2**-23 if dtype != torch.float64 else 2**-52
    torch.testing.assert_close(got[0].double(), want[0], rtol=4 * eps, atol=0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=EPS.get(dtype, 0) + 8 * eps, atol=4 * eps)


BEYOND = (2**32 + 3, 2**32 - 100, -2**32 + 3, 2**63 - 1, -2**63, 7, -7)  # of seven classes


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_no_class_id_is_cut_to_fewer_bits(loss, backend):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(len(BEYOND) + 2, 7, generator=gen)
    y = torch.tensor([*BEYOND, 3, 0])
    for row, bad in enumerate(BEYOND):
        target = torch.tensor([3] * row + [bad] + [3] * (8 - row))
        with pytest.raises(UserError, match=rf"target\[{row}\] = {bad} is not a class id"): loss(x, target, backend=backend)
        with pytest.raises(UserError, match=rf"target.y2\[{row}\] = {bad} is not a class id"):
            loss(x, MixedTarget(y[-2:].repeat(5)[:9], target, 0.3), backend=backend)
        with pytest.raises(UserError, match="is not a class id"): topk_correct(x, target, backend=backend)
    unchecked = torch.compile(lambda x, y: loss(x, y, reduction="none", return_rank=True, backend=backend), backend="aot_eager")
    for target in (y, MixedTarget(y, y.flip(0), torch.tensor(0.3)), MixedTarget(y.flip(0), y, torch.tensor(0.3))):
        known = [False] * len(BEYOND) + [True, True]
        rows = known if target is y else [a and b for a, b in zip(known, known[::-1], strict=True)]
        logits = x.clone().requires_grad_()
        out = unchecked(logits, target)
        out.loss.nan_to_num().sum().backward()
        assert out.loss.reshape(9, -1).isfinite().all(1).tolist() == rows
        assert logits.grad.isfinite().all(1).tolist() == rows
        places = out.rank if target is y else out.rank[:, 0 if target.y1 is y else 1]
        assert places.tolist()[:len(BEYOND)] == [7] * len(BEYOND) and max(places.tolist()[len(BEYOND):]) < 7


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_ids_may_be_of_any_integer_type(dtype, backend):
    "With 300 classes and 100, more and fewer than a byte can tell apart; 156 is what is left of -100 in a byte."
    gen = torch.Generator().manual_seed(0)
    for C, ignored in ((300, -100), (300, 2**32 + 3), (100, 3), (256, -100))[:1 if backend == "triton" else None]:
        x, y = torch.randn(9, C, generator=gen), torch.randint(0, min(C, 128), (9,), generator=gen)
        y[0], y[1] = 3, 156 if dtype != torch.int8 and C > 156 else 5
        out = cross_entropy(x, y.to(dtype), ignore_index=ignored, reduction="none", return_rank=True, backend=backend)
        want = F.cross_entropy(x, y, ignore_index=ignored, reduction="none")
        torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6)
        rank = (x.sort(dim=1, descending=True, stable=True).indices == y[:, None]).int().argmax(1)
        assert out.rank.tolist() == rank.where(y != ignored, C).tolist() and out.n_valid.item() == (y != ignored).sum().item()
        want = F.binary_cross_entropy_with_logits(x, F.one_hot(y, C).float())
        torch.testing.assert_close(binary_cross_entropy(x, y.to(dtype), backend=backend).loss, want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_with_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    step = lambda x: cross_entropy(model(x), y, label_smoothing=0.1).loss
    compiled = torch.compile(step, fullgraph=True)
    for function in (step, compiled):
        model.zero_grad()
        function(x).backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        if function is step: want = got.clone()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


LAUNCHES = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tritoncls.kernels import cross_entropy as ce
from tritoncls.kernels.machine_code import record_launches

class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        seen.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))

y, lam = torch.zeros(8, dtype=torch.int64), torch.zeros(8)
for parts in ((y, None, None, None), (y, y, lam, None), (None, None, None, torch.rand(8, 10))):
    for weight, grad_scale in ((None, None), (torch.ones(10), torch.ones(()))):
        options, seen = ce.Options(weight=weight, z_loss=0.1), []
        with Operations():
            launches = record_launches(lambda: ce.both_at_once(
                torch.zeros(8, 10), ce.Parts(*parts), options, grad_scale, "triton", torch.zeros(8, 10)))
        print(*(launch.kernel.fn.__name__ for launch in launches), *sorted({*seen} - {"empty", "new_empty", "zeros"}))
"""


def test_loss_and_gradient_are_two_launches():
    "The zeros are the counter of arrivals, which on a GPU is made once, and the test's own."
    done = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 6 * ["scales_kernel cross_entropy_kernel"]
