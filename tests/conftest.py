import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tritoncls.runtime import HAS_TRITON  # before triton is imported: it switches the interpreter on where there is no GPU

ROOT = Path(__file__).parent.parent
BARE = ("test_bench.py", "test_compile.py", "test_cuda.py", "test_ema.py", "test_kernels_report.py")
WHOLE_PACKAGE = ("pydantic", "yaml", "typer", "tqdm", "tensorboard", "timm", "torchvision", "safetensors", "sklearn",
                 "matplotlib", "hypothesis")

# Processes that a test starts, wherever they work, import the package from here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))

# From a checkout with torch, triton, numpy and pytest alone, the tests that need no more still run.
if not all(map(find_spec, WHOLE_PACKAGE)):
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in BARE]


def uses_triton(item: pytest.Item) -> bool:
    "Whether a test says so by its mark, or has `triton` for a parameter."
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    marked = item.get_closest_marker("triton") or item.get_closest_marker("cuda")
    return marked is not None or any(isinstance(p, str) and p == "triton" for p in parameters)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if uses_triton(item) and not HAS_TRITON: item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
