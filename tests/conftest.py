import pytest
import torch

import tritoncls.runtime  # noqa: F401  before triton: it switches the interpreter on where there is no GPU


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs a GPU"))
