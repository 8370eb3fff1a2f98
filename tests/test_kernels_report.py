"The kernel report: what a row says, the cache, what the command prints and writes, and kernels that do not compile."
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tritoncls.kernels import inspect
from tritoncls.kernels.machine_code import LOADED, Access, Launch
from tritoncls.runtime import UserError

triton = pytest.importorskip("triton", reason="Triton is not installed")
KEYS = ["kernel", "plan", "shape", "dtype", "registers", "spill_bytes", "shared_bytes", "narrowest_bits", "bytes_per_element",
        "least_us"]


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(target="sm_90", **changes) -> dict:
    row = dict(kernel="rank", plan="2 x 1024, 4 warps", shape="8192x1000 ids", dtype="bfloat16", registers=64, spill_bytes=0,
               shared_bytes=1024, narrowest_bits=128, bytes_per_element=2, least_us=inspect.least_us(2 * 8192 * 1000))
    return dict(target=target, triton=triton.__version__, kernels=[row | changes])


@pytest.mark.parametrize(("target", "warps"), [("sm_90", 4), ("gfx942", 2)])
def test_a_row_says_what_one_kernel_compiles_to(target, warps):
    out = python(f"""
import json
from tritoncls.kernels import inspect
rows = [row for case in inspect.loss_cases() if case.kernel == "rank" for row in inspect.kernel_rows(case, {target!r})]
print(json.dumps(rows))
""")
    aligned, shared = json.loads(out)
    assert list(aligned) == KEYS and aligned["shape"] == "8192x1000 ids" and aligned["plan"] == f"2 x 1024, {warps} warps"
    assert 16 <= aligned["registers"] <= 128 and aligned["spill_bytes"] == 0 and aligned["narrowest_bits"] == 128
    if target == "sm_90": assert aligned["shared_bytes"] > 0  # a row is the work of several warps
    assert aligned["least_us"] == {"A100": 8.04, "H100": 4.89, "H200": 3.41, "B200": 2.05, "MI300X": 3.09}
    assert shared["plan"] == f"1 x 2048, 32 programs a row, {warps} warps"


def test_a_launch_for_amd_has_warps_of_64_threads():
    out = python("""
import torch
from tritoncls.kernels import inspect
from tritoncls.kernels.machine_code import compile_launch, record_launches
case = next(case for case in inspect.loss_cases() if case.shape.startswith("8192x16384"))
for backend in ("cuda", "hip"): *_, launch = record_launches(case.call, backend); print(launch.options)
assert torch.version.hip is None or torch.version.hip != "recorded"
*_, launch = record_launches(case.call, "cuda")
try: compile_launch(launch, "gfx942")
except ValueError as error: print(error)
""")
    assert out.splitlines() == [
        "{'num_warps': 32, 'maxnreg': 64, 'enable_fp_fusion': True}", "{'num_warps': 16, 'enable_fp_fusion': True}",
        "cross_entropy_kernel asks for 2048 threads; allowed on gfx942: 1024"]


def test_a_logit_looked_up_is_not_a_tile_but_a_narrow_tile_is():
    lookup, tile = Access("ld", 16, frozenset(["x_ptr", LOADED])), Access("ld", 128, frozenset(["x_ptr"]))
    large = frozenset(["x_ptr", "dx_ptr"])
    assert inspect.narrowest([lookup, tile, Access("st", 32, frozenset(["lse_ptr"]))], large, {}) == 128
    assert inspect.narrowest([lookup, tile, Access("st", 32, frozenset(["dx_ptr"]))], large, {}) == 32


def test_one_narrow_access_in_an_aligned_branch_of_the_average_is_seen():
    import triton.language as tl
    sizes = dict(CHUNK=4096, K=2, ROUND="nearest", E_TYPE=tl.float32)
    aligned = inspect.aligned_accesses(Launch(None, sizes, dict(num_warps=4)), threads=32)
    # 32 elements a thread, in three branches: two shadows of 4 bytes, and parameters of 4, 2 and 2
    assert aligned == {"ld": 3 * 2 * 8 + 8 + 4 + 4, "st": 3 * 2 * 8}
    access = lambda way, bits, count: [Access(way, bits, frozenset([LOADED]))] * count
    unaligned = [*access("ld", 16, 64), *access("ld", 64, 4), *access("st", 32, 192)]
    whole = [*unaligned, *access("ld", 128, aligned["ld"]), *access("st", 128, aligned["st"])]
    assert inspect.narrowest(whole, frozenset([LOADED]), aligned) == 128
    assert inspect.narrowest(whole[:-1], frozenset([LOADED]), aligned) == 32
    assert inspect.narrowest([a for a in whole if (a.way, a.bits) != ("ld", 128)], frozenset([LOADED]), aligned) == 16


def test_what_was_compiled_is_kept_until_the_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    rows = example()["kernels"]
    monkeypatch.setattr(inspect, "compile_all", lambda targets: asked.append(targets) or dict.fromkeys(targets, rows))
    for _ in range(2): assert inspect.report(["sm_90"]) == [example()]
    assert [made["target"] for made in inspect.report(["sm_80", "sm_90"])] == ["sm_80", "sm_90"]
    assert asked == [["sm_90"], ["sm_80"]]
    monkeypatch.setattr(inspect, "torch", SimpleNamespace(__version__="another"))
    inspect.report(["sm_90"])
    assert asked[2:] == [["sm_90"]]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(inspect, "compile_all", lambda targets: {"sm_90": []})
    assert inspect.report(["sm_90"])[0]["kernels"] == []


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspect, "report", lambda targets: [example(target) for target in targets])
    file = tmp_path / "kernels.json"
    inspect.print_report(["sm_90"], file)
    assert json.loads(file.read_text()) == example()
    assert "8192x1000 ids" in capsys.readouterr().out
    inspect.print_report([], file)
    assert [made["target"] for made in json.loads(file.read_text())] == ["sm_80", "sm_90", "sm_100", "gfx942"]
    monkeypatch.setattr(inspect, "report", lambda targets: pytest.fail("compiled before the path was tried"))
    for path in (tmp_path, tmp_path / "absent" / "kernels.json"):
        with pytest.raises(UserError, match="--json"): inspect.print_report(["sm_90"], path)


def test_a_kernel_that_does_not_compile_is_named():
    out = python("""
import json
import torch, triton, triton.language as tl
from tritoncls.kernels import inspect
from tritoncls.runtime import UserError

import tempfile, importlib.util, pathlib
path = pathlib.Path(tempfile.mkdtemp(), "broken.py")
path.write_text('''
import triton, triton.language as tl
@triton.jit
def broken(x_ptr, CHUNK: tl.constexpr): tl.store(x_ptr + tl.arange(0, CHUNK), no_such_name)
''')
spec = importlib.util.spec_from_file_location("broken", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
call = lambda: module.broken[(1,)](torch.empty(128), CHUNK=128, num_warps=4)
case = inspect.Case("broken", "128", "float32", call, 128, 4, frozenset(["x_ptr"]))
inspect.loss_cases, inspect.ema_cases = lambda: [case], lambda: []
inspect.compile_part(["sm_90"], 0)
""")
    number, target, [row] = json.loads(out)
    assert target == "sm_90" and "broken 128 float32" in row["error"] and "no_such_name" in row["error"]


def test_kernels_that_do_not_compile_end_the_report(tmp_path, monkeypatch):
    line = json.dumps([0, "sm_90", [{"error": "sm_90: rank 1x1 float32: CompilationError: no_such_name"}]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = SimpleNamespace(returncode=0, stdout=line + "\n", stderr="")
    monkeypatch.setattr(inspect.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(UserError, match="do not compile\nsm_90: rank 1x1 float32: CompilationError"): inspect.report(["sm_90"])
    assert not list(tmp_path.rglob("*.json"))
