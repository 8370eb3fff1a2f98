"Shapes, dtypes, strides and special values that nobody thought of; and torchmetrics."
import os
import subprocess
import sys
from contextlib import nullcontext
from threading import get_ident

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from tritoncls.kernels import rows
from tritoncls.kernels.binary_cross_entropy import BinaryOptions, binary_cross_entropy_reference
from tritoncls.kernels.cross_entropy import Options, cross_entropy_reference
from tritoncls.losses import (
    CrossEntropyLoss, MixedTarget, binary_cross_entropy, binary_cross_entropy_and_grad, cross_entropy, cross_entropy_and_grad,
    topk_correct)
from tritoncls.runtime import UserError, backends_on

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
BACKENDS = backends_on("cpu")
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
@given(problems(), st.sampled_from([0.0, 0.1]), st.sampled_from(["none", "sum"]), st.sampled_from(BACKENDS))
def test_loss_and_gradient_are_those_of_the_formula_in_fp64(loss, reference, options, problem, smoothing, reduction, backend):
    x, target = problem
    chosen = dict(label_smoothing=smoothing, reduction=reduction)
    exact = gradient(lambda x: reference(x, doubled(target), options(**chosen)), x.double())
    ours = gradient(lambda x: loss(x, target, **chosen, backend=backend).loss, x)
    close(ours[0], exact[0], torch.float32)
    rows = exact[1].isfinite().all(1) & x.isfinite().all(1)
    close(ours[1][rows], exact[1][rows], x.dtype)


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from(BACKENDS))
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
    for backend in BACKENDS:
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


def forward_mode(f, x, tangent):
    with forward_ad.dual_level(): return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {  # of a loss (), of logits (N, C) and a direction (N, C)
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "forward_ad": forward_mode,
    "forward_ad with a graph": lambda f, x, v: forward_mode(f, x.clone().requires_grad_(), v).detach(),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "grad": lambda f, x, v: torch.func.grad(f)(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](torch.tensor(2.5, dtype=x.dtype))[0],
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(f), in_dims=1, out_dims=2)(torch.stack([x, v], 1)),
    "grad of vmap": lambda f, x, v: torch.func.grad(lambda x: torch.func.vmap(f)(torch.stack([x, v])).sum())(x),
    "jvp of vmap": lambda f, x, v: torch.func.jvp(torch.func.vmap(f), (x[None],), (v[None],))[1]}
TORCHS = {cross_entropy: torch_cross_entropy, binary_cross_entropy: torch_binary_cross_entropy}


def draw_differentiable(dtype):
    gen = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=gen, dtype=torch.float64)
    y, weight = torch.randint(0, 4, (2, 3), generator=gen), torch.rand(4, generator=gen, dtype=torch.float64)
    return x.to(dtype), v.to(dtype), y, weight


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("loss", "dtype", "backend", "compiled"), [
    *((loss, dtype, backend, False) for loss in TORCHS for dtype, backend in (
        (torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton"))),
    (cross_entropy, torch.float32, "triton", True), (binary_cross_entropy, torch.float32, "torch", True)])
def test_transforms_of_a_loss_are_those_of_torchs(loss, dtype, backend, compiled, transform):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    x, v, y, weight = draw_differentiable(dtype)
    target = {cross_entropy: y[0], binary_cross_entropy: F.one_hot(y[0], 4).double()}[loss]
    want = TRANSFORMS[transform](lambda x: TORCHS[loss](x, target, weight), x.double(), v.double())
    ours = lambda x: loss(x, y[0], weight=weight.to(dtype), label_smoothing=0.1, backend=backend).loss
    if compiled: ours = torch.compile(ours, backend="aot_eager")
    got = TRANSFORMS[transform](ours, x, v)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", TORCHS)
def test_the_jacobian_of_the_losses_of_rows(loss, backend):
    x, _, y, _ = draw_differentiable(torch.float32)
    target = {cross_entropy: y[0], binary_cross_entropy: F.one_hot(y[0], 4).double()}[loss]
    torchs = {cross_entropy: F.cross_entropy, binary_cross_entropy: F.binary_cross_entropy_with_logits}[loss]
    ours = lambda x: loss(x, y[0], reduction="none", backend=backend).loss
    want = torch.func.jacrev(lambda x: torchs(x, target, reduction="none"))(x.double())
    vectorized = torch.autograd.functional.jacobian(ours, x, vectorize=True)
    for got in (torch.func.jacfwd(ours)(x), torch.func.jacrev(ours)(x), vectorized):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", TORCHS)
def test_a_batch_of_targets(loss, backend):
    "The gradient of each example, as `vmap(grad)` gives it, for every kind of target; and the counts of a batch."
    x, v, y, _ = draw_differentiable(torch.float32)
    gen = torch.Generator().manual_seed(1)
    lam, dense = torch.rand(2, 3, generator=gen), torch.rand(2, 3, 4, generator=gen)
    for parts, join in (((y,), lambda y: y), ((dense,), lambda d: d), ((y, y.flip(0), lam), MixedTarget)):
        out = lambda x, *parts, join=join: loss(x, join(*parts), topk=(1, 2), label_smoothing=0.1, backend=backend)
        hits = lambda x, *parts, join=join: topk_correct(x, join(*parts), (1, 2), backend=backend)
        batch = torch.stack([x, v]), *parts
        gradients = torch.func.vmap(torch.func.grad(lambda *inputs, out=out: out(*inputs).loss))(*batch)
        counts, correct = torch.func.vmap(lambda *inputs, out=out: out(*inputs)[1:4])(*batch), torch.func.vmap(hits)(*batch)
        for i, inputs in enumerate(zip(*batch, strict=True)):
            torch.testing.assert_close(gradients[i], gradient(lambda x, out=out, i=inputs: out(x, *i[1:]).loss, inputs[0])[1])
            assert all(torch.equal(a[i], b) for a, b in zip(counts, out(*inputs)[1:4], strict=True))
            assert torch.equal(correct[i], out(*inputs).correct)


def second_derivatives(f, x, v):
    twice = lambda x: torch.autograd.grad(f(x), x, create_graph=True)[0]
    yield lambda: torch.func.hessian(f)(x)
    yield lambda: torch.func.jacrev(torch.func.jacrev(f))(x)
    yield lambda: torch.func.jvp(torch.func.grad(f), (x,), (v,))
    yield lambda: torch.func.jvp(torch.func.vmap(torch.func.grad(f)), (x[None],), (v[None],))
    yield lambda: torch.func.jvp(torch.func.vjp(f, x)[1], (torch.ones(()),), (torch.ones(()),))
    yield lambda: (twice(x.clone().requires_grad_()) * v).sum().backward()
    yield lambda: forward_mode(lambda x: twice(x.requires_grad_()), x, v)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", TORCHS)
def test_a_second_derivative_is_an_error_not_zero(loss, backend):
    x, v, y, _ = draw_differentiable(torch.float32)
    for second in second_derivatives(lambda x: loss(x, y[0], backend=backend).loss, x, v):
        with pytest.raises(RuntimeError, match="torch.nn.functional have one"): second()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("both", [cross_entropy_and_grad, binary_cross_entropy_and_grad])
def test_a_loss_with_its_gradient_has_no_derivative_and_says_so(both, backend):
    x, v, y, _ = draw_differentiable(torch.float32)
    f = lambda x, **options: both(x, y[0], backend=backend, **options)
    for part in (lambda x: f(x)[0].loss, lambda x: f(x)[1]):
        for transform in ("jvp", "forward_ad", "jacfwd", "jvp of vmap"):
            with pytest.raises(RuntimeError, match="no derivative in forward mode"): TRANSFORMS[transform](part, x, v)
    value, dx = torch.func.vmap(lambda x: (f(x)[0].loss, f(x)[1]))(torch.stack([x, v]))
    for i in range(2): assert torch.equal(value[i], f((x, v)[i])[0].loss) and torch.equal(dx[i], f((x, v)[i])[1])
    before = x.clone()
    for transform in ("jvp", "forward_ad", "vmap", "grad"):
        with pytest.raises(UserError, match="inplace"): TRANSFORMS[transform](lambda x: f(x, inplace=True)[0].loss, x, v)
    assert torch.equal(x, before)


def test_the_gradient_of_each_example_of_a_model():
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(6, 7), CrossEntropyLoss(label_smoothing=0.1)
    x, y = torch.randn(8, 6), torch.randint(0, 7, (8,))
    params = dict(model.named_parameters())
    one = lambda params, x, y: loss(torch.func.functional_call(model, params, (x[None],)), y[None])
    got = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
    for i in range(8):
        want = torch.autograd.grad(F.cross_entropy(model(x[i:i + 1]), y[i:i + 1], label_smoothing=0.1), list(params.values()))
        for name, exact in zip(params, want, strict=True): torch.testing.assert_close(got[name][i], exact)


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


def test_what_a_launch_keeps_on_a_gpu_is_not_allocated_by_the_thread_that_warms_a_graph_up(monkeypatch):
    "CUDA graphs of torch.compile take what this thread allocates for theirs; the GPU is played by the CPU."
    class Stream:
        cuda_stream, device = 7, torch.device("cpu")
        def wait_stream(self, other): waited.append(other)

    waited, threads, zeros = [], [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: threads.append(get_ident()) or zeros(*size, **options))
    monkeypatch.setattr(rows, "_arrivals", {})
    kept = [rows.arrivals(torch.device("cuda", 0)) for _ in range(3)]
    assert kept[0] is kept[1] is kept[2] and len(waited) == 1 and len(threads) == 1 and threads[0] != get_ident()


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


@pytest.mark.triton
def test_loss_and_gradient_are_two_launches():
    "The zeros are the counter of arrivals, which on a GPU is made once, and the test's own."
    done = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 6 * ["scales_kernel cross_entropy_kernel"]
