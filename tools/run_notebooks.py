"""Run notebooks and save their outputs, the same bytes from run to run.

    python tools/run_notebooks.py [NOTEBOOK...]     all of nbs/ by default
"""
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(\w+)", re.M)


def skipped(cell: dict, flags: set[str]) -> bool:
    "Whether a cell carries a flag such as `cuda`, or `eval: false`."
    source = "".join(cell["source"])
    return bool(flags & set(DIRECTIVE.findall(source))) or "#| eval: false" in source


def bare(output: dict) -> dict:
    "An output without counters and metadata."
    output = {key: value for key, value in output.items() if key != "metadata"}
    if output["output_type"] in ("display_data", "execute_result"): output["metadata"] = {}
    if "execution_count" in output: output["execution_count"] = None
    if "text" in output: output["text"] = lines(output["text"])
    if "data" in output: output["data"] = {kind: lines(text) for kind, text in output["data"].items()}
    return output


def lines(text: str | list[str]) -> list[str]:
    return "".join(text).splitlines(keepends=True)


def run(path: Path, flags: set[str]) -> None:
    "Execute the cells that are not skipped, and write their outputs into the notebook."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and not skipped(cell, flags)]
    running = nbformat.reads(json.dumps(notebook | {"cells": cells}), as_version=4)
    NotebookClient(running, kernel_name="python3", timeout=900, record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = {cell["id"]: cell["outputs"] for cell in running.cells}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"], cell["outputs"] = None, [bare(output) for output in outputs.get(cell["id"], [])]
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    # Sums on several threads round differently from machine to machine.
    os.environ.update(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
    flags = {"notest", "slow"} | (set() if torch.cuda.is_available() else {"cuda"})
    for path in map(Path, sys.argv[1:] or sorted((ROOT / "nbs").glob("*.ipynb"))):
        print(path.name, flush=True)
        run(path, flags)


if __name__ == "__main__": main()
