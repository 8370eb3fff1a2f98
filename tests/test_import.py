"What importing costs, and what it drags in."
import json
import subprocess
import sys

import pytest

ALONE = ("runtime", "kernels.rows", "kernels.rank", "kernels.cross_entropy", "kernels.binary_cross_entropy",
         "kernels.rounding", "kernels.multi_tensor", "kernels.ema_blend", "kernels.machine_code", "kernels.inspect", "registry",
         "losses", "ema", "clock", "workloads", "iterations", "bench")


def python(code: str) -> str:
    "Run code in a fresh process and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy_and_quick():
    code = """
import json, sys, time
began, before = time.perf_counter(), set(sys.modules)
import tritoncls, tritoncls.signals
names = sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
print(json.dumps([time.perf_counter() - began, names]))
"""
    runs = [json.loads(python(code)) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.1
    assert runs[0][1] == ["tritoncls"]


def test_kernels_need_torch_triton_and_numpy_alone():
    python(f"""
import sys
from importlib import import_module
for name in ("pydantic", "yaml", "typer", "tqdm", "tensorboard", "timm", "torchvision", "sklearn", "matplotlib",
             "safetensors", "nbdev", "fastcore"):
    sys.modules[name] = None
for module in {ALONE}: import_module("tritoncls." + module)
""")


def test_exported_code_does_not_import_nbdev():
    assert "False" in python("""
import sys, tritoncls
for name in tritoncls.__all__: getattr(tritoncls, name)
import tritoncls.cli
print(any(name.split(".")[0] in ("nbdev", "fastcore", "execnb") for name in sys.modules))
""")


@pytest.mark.triton
def test_triton_imported_first_is_explained():
    out = python("""
import os
os.environ.pop("TRITON_INTERPRET", None)
import triton, torch, tritoncls
if torch.cuda.is_available(): print("TRITON_INTERPRET")
else:
    try: tritoncls.topk_correct(torch.zeros(1, 2), torch.zeros(1).long(), backend="triton")
    except tritoncls.UserError as error: print(error)
    assert tritoncls.topk_correct(torch.zeros(1, 2), torch.zeros(1).long()).tolist() == [1, 1]
""")
    assert "TRITON_INTERPRET" in out
