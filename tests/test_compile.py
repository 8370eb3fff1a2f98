"Every kernel compiles to machine code without a GPU, spills nothing, and moves 16 bytes at a time where rows are aligned."
import pytest

WIDE = 128  # bits


def promised(row: dict) -> int:
    "Bits of the narrowest access that a row of the report may have."
    shape = row["shape"]
    if shape.startswith("8192x10 "): return 32  # a row of 20 bytes
    if "x1001 " in shape or "x21841 ids" in shape: return 16  # odd rows: the last one, and the gradient
    return WIDE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills_or_moves_less_than_it_could(target):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("the report speaks to the compiler of Triton 3.3 and later")
    from tritoncls.kernels.inspect import report

    [made] = report([target])
    rows = made["kernels"]
    assert len(rows) >= 40 and len({row["kernel"] for row in rows}) == 8
    name = lambda row: (row["kernel"], row["shape"], row["dtype"])
    assert [(*name(row), row["spill_bytes"]) for row in rows if row["spill_bytes"]] == []
    narrowed = [(*name(row), row["narrowest_bits"]) for row in rows if row["narrowest_bits"] < promised(row)]
    assert narrowed == []
