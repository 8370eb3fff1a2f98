"Every kernel compiles to machine code without a GPU, spills nothing, and moves 16 bytes at a time where rows are aligned."
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

WIDE = 128  # bits


def promised(row: dict) -> int:
    "Bits of the narrowest access that a row of the report may have."
    shape = row["shape"]
    if shape.startswith("8192x10 "): return 32  # a row of 20 bytes
    if "x1001 " in shape or "x21841 ids" in shape: return 16  # odd rows: the last one, and the gradient
    return WIDE


def skip_old_compilers():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("the report speaks to the compiler of Triton 3.3 and later")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills_or_moves_less_than_it_could(target):
    skip_old_compilers()
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
    skip_old_compilers()
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
