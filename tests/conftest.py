from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tritoncls.runtime  # noqa: F401  before triton: it switches the interpreter on where there is no GPU

BARE = ("test_bench.py", "test_compile.py", "test_cuda.py", "test_ema.py", "test_kernels_report.py")
WHOLE_PACKAGE = ("pydantic", "yaml", "typer", "tqdm", "tensorboard", "timm", "torchvision", "safetensors", "sklearn",
                 "matplotlib", "hypothesis")

# From a checkout with torch, triton, numpy and pytest alone, the tests that need no more still run.
if not all(map(find_spec, WHOLE_PACKAGE)):
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in BARE]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs a GPU"))
