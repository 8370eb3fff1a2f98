"Every kernel compiles to machine code without a GPU, spills nothing, and reads and writes 16 bytes at a time."
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import torch
from tritoncls.kernels import binary_cross_entropy as bce, cross_entropy as ce, ema_blend, rank
from tritoncls.kernels.inspect import access_widths, compile_launch, record_launches, resources

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = (  # N, C, stride, dtype, targets
    (8192, 10, 10, BF16, "ids"), (8192, 1000, 1000, BF16, "ids mixed dense"), (8192, 1000, 1000, FP32, "ids mixed dense"),
    (8192, 1001, 1001, BF16, "ids"), (1024, 21841, 21848, BF16, "ids mixed"), (1024, 21841, 21848, FP32, "ids"),
    (1024, 21841, 21841, BF16, "ids"), (8, 131072, 131072, BF16, "ids"))

def cases():
    for N, C, stride, dtype, kinds in SHAPES:
        x, y, lam = torch.empty(N, stride, dtype=dtype)[:, :C], torch.zeros(N, dtype=torch.int64), torch.zeros(N)
        targets = dict(ids=(y, None, None, None), mixed=(y, y, lam, None), dense=(None, None, None, torch.empty(N, C)))
        for kind in kinds.split():
            t = targets[kind]
            options, binary = (None, 0.1, -100, 0.0, "mean", [1, 5]), (None, None, 0.1, None, False, "mean", [1, 5])
            stats, scale, g = torch.empty(3, N), torch.empty(2), torch.empty(())
            yield N, C, stride, dtype, kind, {
                "rank": lambda: rank.rank_op(x, *t, -100, [1, 5], "triton"),
                "ce": lambda: ce.cross_entropy_op(x, *t, *options, "triton", False),
                "ce backward": lambda: ce.cross_entropy_backward_op(g, x, stats, scale, *t, None, 0.1, -100),
                "ce both": lambda: ce.cross_entropy_and_grad_op(x, *t, *options, None, "triton"),
                "bce": lambda: bce.binary_cross_entropy_op(x, *t, *binary, "triton", False),
                "bce backward": lambda: bce.binary_cross_entropy_backward_op(g, x, *t, *binary),
                "bce both": lambda: bce.binary_cross_entropy_and_grad_op(x, *t, *binary, None, "triton")}

def narrowest(launch, compiled, names):
    if "ptx" not in compiled.asm: return {}
    widths = access_widths(compiled.asm["ptx"], names)
    # The target's own logit and the last row of peeled rows are narrow by nature; the widest access is that of the tile.
    return {f"{way} {name}": max(found) for (way, name), found in widths.items() if name in ("x_ptr", "dx_ptr", "d_ptr")}

rows = []
for N, C, stride, dtype, kind, calls in cases():
    for name, call in calls.items():
        for launch in record_launches(call):
            compiled, names = compile_launch(launch, sys.argv[1])
            rows.append(dict(kernel=name, C=C, stride=stride, dtype=str(dtype), kind=kind, **resources(compiled),
                             widths=narrowest(launch, compiled, names)))
draw = lambda dtype=FP32: [torch.empty(9000, dtype=dtype) for _ in range(2)]
schedule = lambda K: ema_blend.Schedule(torch.ones(9, K), torch.tensor(3))
EMAS = dict(  # shadows, alpha, options
    number=(draw(), 0.1, {}), values=(draw(), torch.tensor([0.1]), {}),
    schedule=(draw(), schedule(1), dict(found_inf=torch.zeros(1))), two=([draw(), draw()], torch.ones(2), {}),
    four=([draw() for _ in range(4)], schedule(4), {}), bf16=(draw(BF16), 0.1, dict(seed=3)),
    fp16=(draw(torch.float16), 0.1, dict(seed=3)), compensated=(draw(BF16), 0.1, dict(compensation=draw(BF16))))
for kind, (shadows, alpha, options) in EMAS.items():
    for launch in record_launches(lambda: ema_blend.ema_blend_(shadows, draw(BF16), alpha, backend="triton", **options)):
        compiled, names = compile_launch(launch, sys.argv[1])
        widths = access_widths(compiled.asm.get("ptx", ""), names)
        widths = {way: max(found) for (way, name), found in widths.items() if name == "?"}  # addresses from the table
        rows.append(dict(kernel="ema", C=0, stride=0, dtype="", kind=kind, **resources(compiled), widths=widths))
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile(target):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this test speaks to the compiler of Triton 3.3 and later")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, target], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 7 * 13 + 8
    name = lambda row: tuple(row[key] for key in ("kernel", "C", "stride", "dtype", "kind"))
    assert [(*name(row), row["spill_bytes"]) for row in rows if row["spill_bytes"]] == []
    if target == "gfx942": return
    for row in rows:
        if row["kernel"] == "ema": assert row["widths"] == {"ld": 128, "st": 128}
        aligned = row["C"] == 1000 or row["stride"] == 21848
        for access, bits in row["widths"].items():
            if aligned and (not access.endswith("d_ptr") or row["C"] == 1000): assert bits == 128, (*name(row), access)
            if row["C"] > 1000 and access == "ld x_ptr": assert bits == 128, name(row)
