"""The benchmark: its clock on a device that is made up, its peers, its command, and the chapter that draws its results.

Those marked `cuda` need torch, triton, numpy and pytest alone.
"""
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tritoncls import bench, clock, iterations, workloads
from tritoncls.clock import NO_MEMORY, TIME_IS_UP, TOO_LARGE, WAITS, Row, Work, gpu_rows
from tritoncls.iterations import NETWORKS, sizes
from tritoncls.runtime import UserError
from tritoncls.workloads import BF16, FP32, GPU_SHAPES, Shape, loss_case

ROOT = Path(__file__).parent.parent
MODES = ("eager cold", "eager warm", "graph cold", "graph warm")
CPU = torch.device("cpu")


class FakeGpu:
    "Enough of torch.cuda to run the clock without a GPU: a device whose time is the number of calls since its events."
    def __init__(self):
        self.now, self.slept, self.flushed, self.capturing, self.strict = 0, [], 0, False, False
        self.current, self.pools, self.underway, self.random = "default", 0, set(), True

    def work(self, us: int):
        "A call that takes the device so long."
        if self.capturing: self.graph.calls.append(us)
        else: self.now += us

    def synchronize(self): pass
    def current_device(self): return 0
    def Stream(self): return SimpleNamespace(wait_stream=lambda other: None)
    def current_stream(self): return SimpleNamespace(name=self.current, wait_stream=lambda other: None)

    @contextmanager
    def stream(self, other):
        before, self.current = self.current, getattr(other, "name", "side")
        try: yield
        finally: self.current = before

    def empty_cache(self):
        if self.underway: raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def draw(self):
        if not self.random: raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def end_allocate(self, device, pool):
        if pool not in self.underway: raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def set_sync_debug_mode(self, mode): self.strict = mode == "error"

    def _sleep(self, cycles):
        if self.capturing: return
        self.slept.append(cycles)
        self.now += 10_000

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self): self.at = gpu.now
            def elapsed_time(self, other): return (other.at - self.at) / 1000
        return Event()

    def CUDAGraph(self):
        gpu = self

        class Graph:
            calls = ()
            def replay(self): gpu.now += sum(self.calls)
        return Graph()

    @contextmanager
    def graph_context(self, graph, pool="its own", stream=None):
        "As in PyTorch 2.11: where a capture fails, its end raises, and does no more."
        self.empty_cache()
        before, self.current, self.random = self.current, "side", False
        graph.calls, self.graph, self.capturing = [], graph, True
        self.underway.add(pool)
        try: yield
        except RuntimeError as error:
            self.capturing = False
            if "permitted" in str(error): raise RuntimeError("failed due to a previous error during capture") from error
            self.underway.remove(pool)
            self.current, self.random = before, True
            raise
        self.capturing, self.current, self.random = False, before, True
        self.underway.remove(pool)


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    for name in ("synchronize", "Stream", "current_stream", "stream", "set_sync_debug_mode", "_sleep", "Event", "CUDAGraph",
                 "empty_cache", "current_device", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph_context)

    class Flush:
        def sum(self): fake.flushed += 1
    monkeypatch.setattr(clock, "flush_buffer", Flush)
    return fake


def rows_of(ways, moved=10**6, deadline=60, **options):
    work = Work("example", "numbers", moved, ways, **options)
    return list(gpu_rows(work, time.monotonic() + deadline))


def test_each_mode_measures_the_device_and_not_what_precedes(gpu):
    rows = rows_of({"seven": lambda: lambda: gpu.work(7)})
    assert [row.case for row in rows] == [f"numbers {mode}" for mode in MODES]
    for row in rows:
        # 10^6 bytes in 7 us: 142.857 GB/s, and 142.9 is 28.58% of 500
        assert clock.of_copy(row, 500.0)[3:6] == (7.0, 142.9, 28.58) and row.note == ""
    assert gpu.flushed >= 10 and len(gpu.slept) >= 20 and min(gpu.slept) >= 20 * clock.CYCLES
    assert [row.host_us is None for row in rows] == [False, False, False, True]  # a warm graph holds many calls


def test_work_that_no_cache_holds_is_cold(gpu):
    rows = rows_of({"seven": lambda: lambda: gpu.work(7)}, moved=clock.FLUSH)
    assert [(row.us, row.note) for row in rows] == [(7.0, ""), (None, TOO_LARGE)] * 2


@pytest.mark.parametrize("kind", ("mixed", "dense"))
def test_what_a_peer_cannot_do_is_a_row_that_says_so(gpu, monkeypatch, kind):
    monkeypatch.setattr(workloads, "installed", lambda package: True)
    monkeypatch.setattr(workloads, "CPU_SHAPES", (Shape(8, 10, 10, FP32, kind),))
    monkeypatch.setattr(clock, "device_us", lambda call, *args, **options: (call(), 1.0)[1])
    rows = [row for work in workloads.loss_work(CPU) for row in gpu_rows(work, time.monotonic() + 60)]
    said = {(row.case, row.impl) for row in rows if row.note == "takes class ids only" and row.us is None}
    assert said == {(f"8x10 fp32 {kind} grad", impl) for impl in ("Liger", "QuACK", "QuACK, one pass")} | {
        (f"8x10 fp32 {kind} forward", impl) for impl in ("Liger", "QuACK")}
    assert {row.impl for row in rows if row.us} == {"torch eager", "tritoncls", "tritoncls, one pass"}


def test_a_way_that_waits_for_the_device_has_no_graph(gpu):
    def call():
        gpu.work(5)
        if gpu.strict: raise RuntimeError("called a synchronizing CUDA operation")
    rows = rows_of({"waits": lambda: call})
    assert [(row.us, row.note) for row in rows[:2]] == [(5.0, WAITS)] * 2 and gpu.slept == []
    assert [(row.us, row.note) for row in rows[2:]] == [(None, f"{WAITS}: no graph")] * 2


def test_what_goes_wrong_is_a_row_and_the_next_way_is_tried(gpu):
    def out_of_memory(): raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def no_capture():
        if gpu.capturing: raise RuntimeError("operation not permitted when stream is capturing\nmore")
        gpu.work(3)
    rows = rows_of({"big": out_of_memory, "bad": lambda: [].no_such_method, "eager only": lambda: no_capture,
                    "good": lambda: lambda: gpu.work(4)})
    by = lambda impl: [row for row in rows if row.impl == impl]
    assert by("big") == [Row("example", "numbers", "big", note=NO_MEMORY)]
    assert "no_such_method" in by("bad")[0].note and by("bad")[0].us is None
    assert [row.us for row in by("eager only")] == [3.0, 3.0, None]
    assert by("eager only")[2].note == "RuntimeError: operation not permitted when stream is capturing"
    assert [row.us for row in by("good")] == [4.0] * 4


def test_a_capture_that_fails_ends_nothing_but_itself(gpu):
    def fails(message):
        if gpu.capturing: raise RuntimeError(message)
        gpu.work(3)
    messages = "operation not permitted when stream is capturing", "a refusal of the call itself"
    rows = rows_of({message: lambda message=message: gpu.draw() or (lambda: fails(message)) for message in messages} |
                   {"good": lambda: gpu.draw() or (lambda: gpu.work(4))})
    notes = [row.note for row in rows if row.us is None]
    times = [row.us for row in rows if row.impl == "good"]
    assert gpu.current == "default" and notes[0] == f"RuntimeError: {messages[0]}"
    assert times == [4.0] * 4 and notes[1:] == [f"RuntimeError: {messages[1]}"] and gpu.underway == set()


def test_time_that_is_up_is_a_row(gpu):
    rows = rows_of({"a": lambda: lambda: gpu.work(1), "b": lambda: lambda: gpu.work(1)}, deadline=-1)
    assert [(row.impl, row.us, row.note) for row in rows] == [("a", None, TIME_IS_UP), ("b", None, TIME_IS_UP)]


def tiny(monkeypatch):
    "Small pieces of every work."
    shapes = (*(Shape(4, C, stride, FP32, kind) for C, stride in ((10, 10), (21, 24)) for kind in ("ids", "mixed", "dense")),)
    monkeypatch.setattr(workloads, "CPU_SHAPES", shapes)
    monkeypatch.setattr(iterations, "NETWORKS", {name: iterations.Network("7x3 4096 100", 2, 3) for name in NETWORKS})
    for module in (workloads, iterations): monkeypatch.setattr(module, "installed", lambda package: package == "torch")
    parts = lambda: (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    monkeypatch.setattr(iterations, "small_network", lambda: torch.nn.Sequential(*parts(), torch.nn.Linear(4, 10)))
    monkeypatch.setattr(clock, "BUDGET", 1)
    monkeypatch.setattr(clock, "ROUNDS", 3)
    workloads.draw.cache_clear()
    iterations.model_of.cache_clear()


def test_every_way_runs_under_the_clock_of_a_gpu(gpu, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(bench, "cpu_rows", gpu_rows)
    copies = lambda device: iter([Work("copy", "1 MiB", 2 << 20, {"torch copy_": lambda: lambda: gpu.work(10)})])
    monkeypatch.setitem(bench.PARTS, "copy", copies)
    # The made-up device gives no time to real calls, and none is not a time: let each take a microsecond.
    monkeypatch.setattr(clock, "device_us", lambda call, *args, **options: (call(), 1.0)[1])
    result = bench.run(bench.ALL, "cpu")
    assert list(result) == ["device", "driver", "versions", "date", "copy_gbps", "rows"]
    assert all(list(row) == list(Row._fields) for row in result["rows"])
    wrong = [row for row in result["rows"] if row["us"] is None and "is not installed" not in row["note"]]
    assert wrong == [], wrong
    assert {row["bench"] for row in result["rows"]} == {"copy", *bench.ALL}
    absent = {row["impl"] for row in result["rows"] if row["note"].endswith("is not installed")}
    assert absent == {"Liger", "QuACK", "timm ModelEmaV3"}
    shares = [row["note"] for row in result["rows"] if row["bench"] == "step" and row["impl"] != "network alone"]
    assert shares == ["0.0% outside the network"] * 4


def test_the_tensor_lists_are_those_of_the_networks():
    timm = pytest.importorskip("timm")
    names = {"vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224"}
    for name, network in NETWORKS.items():
        with torch.device("meta"): model = timm.create_model(names.get(name, name))
        tensors = list(model.state_dict().values())
        assert sizes(network) == sorted(t.numel() for t in tensors if t.is_floating_point()), name
        assert network.counters == sum(not t.is_floating_point() for t in tensors), name
        assert network.modules == len(list(model.modules())), name


def test_resnet50_is_torchvisions():
    theirs = pytest.importorskip("torchvision").models.resnet50().eval()
    ours = iterations.resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(): torch.testing.assert_close(ours(x), theirs(x))


def test_the_bytes_are_the_same_for_all_and_the_fewest_there_are():
    assert loss_case(Shape(8192, 1000, 1000, BF16), grad=True) == ("8192x1000 bf16 ids grad", 8192 * (2 * 1000 * 2 + 8))
    assert loss_case(Shape(256, 10, 10, BF16, "mixed"), grad=False) == ("256x10 bf16 mixed forward", 256 * (10 * 2 + 2 * 8))
    flat = loss_case(Shape(8192, 1000, 1000, FP32, "dense"), grad=False)
    assert flat == ("8192x1000 fp32 dense forward", 2 * 8192 * 1000 * 4)
    resnet50 = next(work for work in iterations.ema_work(CPU) if work.case == "resnet50 fp32")
    assert resnet50.moved == 12 * 25_610_152 + 16 * 53


def test_the_grid_has_what_was_asked_for():
    plain = {(s.N, s.C, s.dtype) for s in GPU_SHAPES if s.kind == "ids" and s.stride == s.C and not s.compiled}
    assert plain == {(N, C, dtype) for N in (256, 1024, 8192, 32768) for dtype in (BF16, FP32)
                     for C in (10, 1000, 4096, 21841, 21848, 32768, 131072)}
    assert {s.kind for s in GPU_SHAPES} == {"ids", "mixed", "dense"} and sum(s.compiled for s in GPU_SHAPES) == 3
    goals = {(N, C, C) for N in (8192, 32768) for C in (1000, 4096, 21848, 32768)} | {
        (N, 21841, 21848) for N in (8192, 32768)} | {(1024, 1000, 1000)}
    assert goals <= {(s.N, s.C, s.stride) for s in GPU_SHAPES[:14] if s.dtype == BF16}
    assert {s.dtype for s in GPU_SHAPES[:-28]} == {BF16} and {s.dtype for s in GPU_SHAPES[-28:]} == {FP32}


def test_the_last_part_has_the_time_that_is_left(monkeypatch):
    "And a part alone has its own."
    seen = {}
    monkeypatch.setattr(bench, "measured", lambda part, device, deadline: seen.update({part: deadline}) or iter(()))
    began = time.monotonic()
    bench.run(("ema", "step", "loss"), "cpu")
    assert [round(seen[part] - began, -1) for part in ("copy", "ema", "step", "loss")] == [200, 200, 200, 430]
    bench.run(("loss",), "cpu")
    assert seen["loss"] - time.monotonic() <= 200


@pytest.mark.parametrize("kind", ("ids", "mixed", "dense"))
def test_eager_accuracy_is_timms(kind):
    timms = pytest.importorskip("timm.utils").accuracy
    x, target = workloads.draw(Shape(64, 20, 20, FP32, kind), CPU)
    top = lambda y: torch.stack(timms(x, y, (1, 5))) * len(x) / 100
    if kind == "mixed": want = 0.3 * top(target.y1) + 0.7 * top(target.y2)
    else: want = top(target if kind == "ids" else target.argmax(1))
    torch.testing.assert_close(workloads.torch_hits(x, target).float(), want)


def test_what_people_write_is_what_an_iteration_does():
    "Our iteration and the plain one train the same network, and average it alike."
    plain, ours = (iterations.training(iterations.small_network, 4, 8, 10, CPU, fused) for fused in (False, True))
    (plain_step, _), (our_step, _) = iterations.STEPS["plain PyTorch"], iterations.STEPS["tritoncls"]
    for _ in range(3): assert torch.equal(plain_step(plain), our_step(ours))
    for a, b in zip(plain.params + plain.shadows, ours.params + ours.shadows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.params[0], plain.shadows[0])


def test_the_command_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch)
    copies = lambda device: iter([Work("copy", "1 KiB", 2048, {"torch copy_": lambda: lambda: torch.ones(9).clone()})])
    monkeypatch.setitem(bench.PARTS, "copy", copies)
    assert bench.main(["loss", "--device", "cpu", "--json", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert file.stem.endswith(f"{result['date']}-loss") and result["copy_gbps"] > 0
    assert {"bench", "case", "impl", "us", "gbps", "pct_of_copy", "host_us", "launches", "note"} == set(result["rows"][0])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("loss 4x21/24 fp32 dense forward")]
    assert len(lines) == 2 and " 1.00" in lines[0] and str(file) in printed


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert bench.main(["loss", "--device", "cuda:77"]) == 2
    assert bench.main(["loss", "--device", "cpu", "--json", str(tmp_path / "absent" / "file.json")]) == 2
    assert bench.main(["tune", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "cuda:77" in said and "absent" in said and "needs a GPU" in said and "Traceback" not in said
    with pytest.raises(UserError, match="ema, step, loss, tune, all"): bench.bench("everything")
    with pytest.raises(SystemExit): bench.main(["everything"])


def test_a_failure_of_our_own_is_an_exit_code(monkeypatch, capsys):
    failed = lambda note: dict(device="x", copy_gbps=1, rows=[Row("loss", "c", "tritoncls", note=note)._asdict()])
    for note, code in (("RuntimeError: no", 1), (TIME_IS_UP, 0), (NO_MEMORY, 0)):
        monkeypatch.setattr(bench, "run", lambda *args, note=note: failed(note))
        assert bench.main(["loss"]) == code


def test_it_needs_torch_triton_and_numpy_alone():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", """
import sys
for name in ("pydantic", "yaml", "typer", "tqdm", "tensorboard", "timm", "torchvision", "sklearn", "matplotlib",
             "safetensors", "nbdev", "fastcore"):
    sys.modules[name] = None
import runpy
sys.argv = ["bench", "--help"]
runpy.run_module("tritoncls.bench", run_name="__main__")
"""], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "ema,step,loss,tune,all" in done.stdout, done.stderr


def made_up_result() -> dict:
    "A result as a GPU would give it, with numbers by formula, to draw the chapter from."
    rows = [Row("copy", "1024 MiB eager cold", "torch copy_", 700.0, 3000.0, None, 9.0, 1)]
    for shape in GPU_SHAPES:
        for grad in (True, False):
            case, moved = loss_case(shape, grad)
            names = ["torch.compile"] if shape.compiled else [
                name for name in workloads.LOSSES if (grad or "pass" not in name) and (shape.kind == "ids" or "Q" not in name)]
            for i, name in enumerate(names):
                for mode in MODES:
                    us = moved / 3e6 * (1 + i) + 5
                    rows.append(Row("loss", f"{case} {mode}", name, us, moved / us / 1e3, moved / us / 3e4, 30.0 + i, 2 + i))
    for name, network in NETWORKS.items():
        moved = 12 * sum(sizes(network))
        for i, impl in enumerate(("torch._foreach_lerp_", "tritoncls ModelEma", "flat lerp")):
            us = moved / 3e6 * (2 - 0.5 * i) + 5
            rows.append(Row("ema", f"{name} fp32 eager cold", impl, us, moved / us / 1e3, moved / us / 3e4, 50.0, 3))
    for impl, us in (("plain PyTorch", 110e3), ("tritoncls", 103e3), ("network alone", 100e3)):
        rows.append(Row("step", "resnet50 256x3x224x224 bf16 eager warm", impl, us, host_us=9e3, launches=700))
    rows += [Row("loss", "all", "Liger", note="liger_kernel is not installed"), Row("loss", "c", "QuACK", note=TIME_IS_UP)]
    rows += [Row("tune", "8192x1000 bf16 ids grad eager cold", way, us, 3000.0, us) for way, us in (
        ("the library's plan", 12.0), ("4096 elements, 8 warps", 11.0), ("1024 elements, 4 warps", 14.0))]
    return dict(device="A GPU that is made up", driver="1.2", versions=dict(torch="2.11.0", triton="3.6.0"), date="2026-01-01",
                copy_gbps=3000.0, rows=[row._asdict() for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("filled", (True, False))
def test_the_chapter_draws_whatever_results_there_are(filled, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    results = tmp_path / "benchmarks" / "results"
    for folder in (results, tmp_path / "nbs"): folder.mkdir(parents=True)
    if filled: bench.write_result(made_up_result(), results)
    notebook = nbformat.read(ROOT / "nbs" / "91_results.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "nbs")}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=200, resources=resources).execute()
    outputs = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [data["image/svg+xml"] for data in outputs if "image/svg+xml" in data]
    text = "\n".join(data.get("text/markdown", "") for data in outputs)
    if not filled:
        assert pictures == [] and text.count("No result from a GPU yet") == 10
        return
    assert len(pictures) == 4 and "A GPU that is made up" in text
    assert "| iteration of resnet50: % outside the network at most | 5 | 2.91 | reached |" in text
    assert "| one pass, all of bf16: times as fast as Liger | 1.5 | 1 | missed at 28 of 28 |" in text
    assert "| ModelEma: us on the host at most | 60 | 50 | reached |" in text
    assert "| the library's plan | 12.0 | 12.0 |\n| 4096 elements, 8 warps | 11.0 | 11.0 |" in text
    assert "liger_kernel is not installed" in text
    (tmp_path / "text.md").write_text(text)
    for i, picture in enumerate(pictures): (tmp_path / f"{i}.svg").write_text(picture)


@pytest.mark.cuda
def test_the_clock_counts_what_the_device_does():
    spin = lambda: torch.cuda._sleep(400_000)
    clock.wake_up()
    one = clock.device_us(spin, lead=50)
    assert 50 < one < 2000
    for lead, cold, calls in ((500, False, 1), (50, True, 1), (50, False, 10)):
        assert abs(clock.device_us(spin, lead, cold, calls) - one) < 0.2 * one
    assert clock.host_us(spin, 10) < 0.5 * one and not clock.waits(spin)
    assert clock.waits(lambda: torch.ones(1, device="cuda").item())
    x = torch.ones(8, device="cuda")
    assert clock.launches(lambda: x.add_(1).mul_(2)) == 2


@pytest.mark.cuda
def test_our_ways_are_measured_in_every_mode_and_agree_with_torch():
    device = torch.device("cuda")
    for kind in ("ids", "mixed", "dense"):
        shape = Shape(1024, 1000, 1000, BF16, kind)
        x, target = workloads.draw(shape, device)
        loss = workloads.torch_loss(x.double(), target)[0]
        for name, function in workloads.loss_ways(shape, grad=True).items():
            if kind != "ids" and function in workloads.IDS_ONLY: continue
            got = workloads.loss_call(function, shape, device, grad=True)()[0]
            assert abs(got.item() - loss.item()) <= 0.02 * loss.item(), name
        ways = {name: lambda f=function, s=shape: workloads.loss_call(f, s, device, True)
                for name, function in workloads.loss_ways(shape, grad=True).items() if "tritoncls" in name}
        rows = list(gpu_rows(Work("loss", *loss_case(shape, True), ways), time.monotonic() + 120))
        assert [row.case.split(" ", 4)[4] for row in rows] == [*MODES] * 2 and all(row.us > 0 for row in rows), rows
        assert dict(clock.count_launches(Work("loss", "", 0, ways), time.monotonic() + 60))["tritoncls"] == 2
    x, target = workloads.draw(Shape(64, 10, 10, FP32), device)
    torch.testing.assert_close(workloads.our_loss(x, target)[0], F.cross_entropy(x, target))


@pytest.mark.cuda
def test_every_average_is_measured():
    works = {work.case: work for work in iterations.ema_work(torch.device("cuda"))}
    rows = list(gpu_rows(works["efficientnet_b0 fp32"], time.monotonic() + 120))
    assert all(row.us or "no graph" in row.note for row in rows), rows
    assert {row.impl for row in rows} >= {"torch._foreach_lerp_", "tritoncls ModelEma", "tritoncls ema_blend_", "flat lerp"}


@pytest.mark.cuda
def test_pytorch_captures_again_after_a_capture_that_failed():
    "In a process of its own, which is lost if this fails."
    program = """
import torch
from tritoncls.clock import captured
x = torch.zeros(8, device="cuda")
try: captured(lambda: x.cpu())
except RuntimeError as error: print(error)
else: raise AssertionError("captured a copy to the host")
assert torch.cuda.current_stream() == torch.cuda.default_stream()
torch.cuda.empty_cache()
torch.randn(8, device="cuda")
captured(lambda: x.add_(1))()
assert x.tolist() == [5] * 8  # three calls to warm up, and two replays
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and "captur" in done.stdout, done.stdout + done.stderr
