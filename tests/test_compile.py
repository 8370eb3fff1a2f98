"Every kernel compiles to machine code without a GPU, spills nothing, and reads 1000 classes 16 bytes at a time."
import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, re, sys
import tritoncls.runtime
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tritoncls.kernels import cross_entropy as ce, ema_blend as ema, rank
from tritoncls.kernels.multi_tensor import CHUNK

TYPES = dict(x_ptr="*{x}", dx_ptr="*{x}", y_ptr="*i64", rank_ptr="*i32", loss_ptr="*fp32", max_ptr="*fp32",
             log_sum_ptr="*fp32", g_ptr="*fp32", N="i32", on="fp32", off="fp32", ignore_index="i32", table_ptr="*i64",
             alpha="fp32")

def compiled(kernel, target, warps, x, **constants):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else TYPES[n].format(x=x) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    asm = triton.compile(source, target=target, options=dict(num_warps=warps)).asm
    if "ptx" not in asm: return dict(bytes=len(asm["hsaco"]))
    ptx = asm["ptx"]
    vectors = lambda op: [int(v or 1) for v in re.findall(op + r"(?:\\.\\w+)*?(?:\\.v(\\d))?\\.b32", ptx)]
    width = lambda op: 4 * max(vectors(op), default=0)
    return dict(bytes=len(asm["cubin"]), local=".local" in ptx, load=width(r"ld\\.global"), store=width(r"st\\.global"))

backend, arch, warp_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp_size)
report = {}
for C in (10, 1000, 21841):
    for x in ("bf16", "fp32"):
        tile = rank.logits_tile(C)
        shape = dict(C=C, STRIDE=C, ROWS=tile.rows, BLOCK=tile.block)
        for name, kernel, more in (
                ("rank", rank.rank_kernel, {}), ("forward", ce.cross_entropy_kernel, dict(SMOOTH=True)),
                ("backward", ce.cross_entropy_backward_kernel, {})):
            report[f"{name} {C} {x}"] = compiled(kernel, target, tile.warps, x, **shape, **more)
report["ema"] = compiled(ema.ema_blend_kernel, target, 4, "fp32", ON_DEVICE=False, CHUNK=CHUNK)
TYPES["alpha"] = "*fp32"
report["ema, alpha on the device"] = compiled(ema.ema_blend_kernel, target, 4, "fp32", ON_DEVICE=True, CHUNK=CHUNK)
print(json.dumps(report))
"""


@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_kernels_compile(target, monkeypatch):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this test speaks to the compiler of Triton 3.3 and later")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = subprocess.run([sys.executable, "-c", PROGRAM, *target.split()], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 20 and all(kernel["bytes"] > 0 for kernel in report.values())
    if target.startswith("hip"): return
    assert not [name for name, kernel in report.items() if kernel["local"]]
    for name in ("rank 1000", "forward 1000", "backward 1000"):
        for x in ("bf16", "fp32"): assert report[f"{name} {x}"]["load"] == 16, name
    for x in ("bf16", "fp32"): assert report[f"backward 1000 {x}"]["store"] == 16
