"Every kernel compiles to machine code without a GPU, spills nothing, and moves 16 bytes at a time where rows are aligned."
import json
import os
import subprocess
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import tritoncls

pytest.importorskip("triton", reason="Triton is not installed")

WIDE = 128  # bits


def promised(row: dict) -> int:
    "Bits of the narrowest access that a row of the report may have."
    shape = row["shape"]
    if shape.startswith("8192x10 "): return 32  # a row of 20 bytes
    if "x1001 " in shape or "x21841 ids" in shape: return 16  # odd rows: the last one, and the gradient
    return WIDE


CALLS = """
import torch
from tritoncls import losses as L
from tritoncls.ema import ema_blend_
from tritoncls.kernels.ema_blend import Schedule

def logits(N, C, dtype=torch.bfloat16): return torch.zeros(N, C, dtype=dtype, requires_grad=True)

def whole(N, C): return torch.zeros(N, dtype=torch.int64)

def backward(out): out.loss.sum().backward()

x, y, wide, soft = logits(64, 1000), whole(64, 1000), logits(2, 50000), torch.zeros(64, 1000)
mixed, weight, fp32 = L.MixedTarget(y, y, torch.zeros(64)), torch.ones(1000), logits(8, 1001, torch.float32)
new = lambda dtype=torch.float32: [torch.zeros(9000, dtype=dtype)]
LAUNCHING = dict(
    rank=lambda: L.topk_correct(x, y, backend="triton"),
    shared_rank=lambda: L.topk_correct(wide, whole(2, 0), backend="triton"),
    softmax=lambda: backward(L.cross_entropy(x, y, backend="triton")),
    softmax_mixed=lambda: backward(L.cross_entropy(x, mixed, label_smoothing=0.1, z_loss=0.1, backend="triton")),
    softmax_dense=lambda: backward(L.cross_entropy(x, soft, weight=weight, reduction="none", backend="triton")),
    shared_softmax=lambda: L.cross_entropy(wide, whole(2, 0), backend="triton"),
    softmax_and_grad=lambda: L.cross_entropy_and_grad(fp32, whole(8, 0), grad_scale=2.0, label_smoothing=0.1, backend="triton"),
    sigmoid=lambda: backward(L.binary_cross_entropy(x, y, pos_weight=weight, weight=weight, backend="triton")),
    sigmoid_dense=lambda: backward(L.binary_cross_entropy(x, soft, target_threshold=0.2, reduction="none", backend="triton")),
    shared_sigmoid=lambda: L.binary_cross_entropy(wide, whole(2, 0), backend="triton"),
    sigmoid_and_grad=lambda: L.binary_cross_entropy_and_grad(x, mixed, backend="triton"),
    average=lambda: ema_blend_(new(), new(), 0.1, backend="triton"),
    averages=lambda: ema_blend_([new(), new()], new(), Schedule(torch.ones(9, 2), torch.tensor(3)), backend="triton"),
    random=lambda: ema_blend_(new(torch.bfloat16), new(), 0.1, seed=3, backend="triton"),
    halves=lambda: ema_blend_(new(torch.bfloat16), new(), 0.1, low=new(torch.int16), backend="triton"),
    random_half=lambda: ema_blend_(new(torch.float16), new(), 0.1, seed=3, backend="triton"))
"""

COMPILING = """
import json, sys
from triton.compiler.code_generator import CodeGenerator
from tritoncls.kernels.machine_code import TARGETS, compile_launch, record_launches

compiled, call = set(), CodeGenerator.call_JitFunction

def seen(generator, function, *args, **kwargs):
    compiled.add(f"{function.__module__}.{function.__name__}")
    return call(generator, function, *args, **kwargs)

CodeGenerator.call_JitFunction = seen
for name, launching in LAUNCHING.items():
    launches = record_launches(launching, TARGETS[sys.argv[1]][0])
    assert launches, name
    for launch in launches:
        try: compile_launch(launch, sys.argv[1])
        except Exception as error:
            print(json.dumps(["failed", name, f"{launch.kernel.__name__}: {type(error).__name__}: {error}"]))
        compiled.add(f"{launch.kernel.__module__}.{launch.kernel.__name__}")
        print(json.dumps(["options", name, launch.options]))
for name in compiled: print(json.dumps(["compiled", "", name]))
"""


def jit_functions() -> set[str]:
    "Every @triton.jit function of the package, by its module and name, from the source."
    root = Path(tritoncls.__file__).parent
    module = lambda path: ".".join(("tritoncls", *path.relative_to(root).with_suffix("").parts))
    return {f"{module(path)}.{name}" for path in root.rglob("*.py")
            for name in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)", path.read_text(encoding="utf-8"), re.M)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", [
    "sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "gfx942"))])
def test_every_kernel_compiles_and_says_whether_products_and_sums_may_be_fused(target, tmp_path):
    "The interpreter runs what a compiler refuses. A new @triton.jit function fails here until a call of `CALLS` reaches it."
    skip_without_linker(target)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CALLS + COMPILING, target], capture_output=True, text=True,
                          timeout=580, env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    found = lambda kind: [(name, value) for this, name, value in said if this == kind]
    assert found("failed") == []
    assert jit_functions() - {name for _, name in found("compiled")} == set()
    # Triton 3.9 warns where nothing is said, and from 3.10 on nothing is fused there.
    assert [name for name, options in found("options") if not isinstance(options.get("enable_fp_fusion"), bool)] == []


ASSEMBLY = """
import json, sys
from tritoncls.kernels.machine_code import compile_launch, record_launches
for name in ("rank", "softmax", "sigmoid"):
    launch = record_launches(LAUNCHING[name], "hip")[0]
    print(json.dumps(compile_launch(launch, "gfx942")[0].asm["amdgcn"]))
"""


def test_programs_on_amd_wait_for_their_stores_before_they_say_that_they_have_arrived():
    "NVIDIA's barrier orders the stores of all threads before the counting by one of them. AMD's waits for no store."
    skip_without_linker("gfx942")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CALLS + ASSEMBLY], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    for assembly in map(json.loads, done.stdout.splitlines()):
        lines = [line.strip() for line in assembly.splitlines()]
        counted = [i for i, line in enumerate(lines) if line.startswith("global_atomic_add")]
        assert counted
        for i in counted:
            barrier = max(k for k in range(i) if lines[k] == "s_barrier")
            waited = max(k for k in range(barrier) if lines[k].startswith("s_waitcnt") and "vmcnt(0)" in lines[k])
            stores = [k for k in range(barrier) if lines[k].startswith(("global_store", "buffer_store"))]
            assert stores and max(stores) < waited


def skip_without_linker(target: str) -> None:
    "Triton links AMD's machine code with a program that it does not ship before 3.5."
    import triton
    if target != "gfx942" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5): return
    pytest.skip("Triton 3.4 links AMD's machine code with ld.lld, which it does not ship")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills_or_moves_less_than_it_could(target):
    skip_without_linker(target)
    from tritoncls.kernels.inspect import report

    [made] = report([target])
    rows = made["kernels"]
    assert len(rows) >= 40 and len({row["kernel"] for row in rows}) == 8
    name = lambda row: (row["kernel"], row["shape"], row["dtype"])
    assert [(*name(row), row["spill_bytes"]) for row in rows if row["spill_bytes"]] == []
    narrowed = [(*name(row), row["narrowest_bits"]) for row in rows if row["narrowest_bits"] < promised(row)]
    assert narrowed == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_odd_rows_are_read_16_bytes_at_a_time_but_for_the_last_one(target):
    skip_without_linker(target)
    program = f"""
import json
from tritoncls.kernels import inspect
from tritoncls.kernels.machine_code import LOADED, TARGETS, accesses, compile_launch, record_launches
for case in inspect.loss_cases():
    if "x1001 " not in case.shape and "x21841 ids" not in case.shape: continue
    *_, launch = record_launches(case.call, TARGETS[{target!r}][0])
    found = accesses(*compile_launch(launch, {target!r}))
    print(json.dumps([a.bits for a in found if a.way == "ld" and "x_ptr" in a.on and LOADED not in a.on]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    kernels = [Counter(json.loads(line)) for line in done.stdout.splitlines()]
    # One way through the kernel for the last row, two bytes an access, and one for all others, eight times as wide.
    assert len(kernels) == 3 and all(set(bits) == {16, WIDE} and bits[16] == 8 * bits[WIDE] for bits in kernels), kernels
