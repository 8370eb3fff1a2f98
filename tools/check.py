"""Everything that has to hold before a commit: `make test`. Ends with a count of what passed and what failed."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
HIDES_TRITON = os.pathsep.join(filter(None, [str(ROOT / "tests" / "without_triton"), os.environ.get("PYTHONPATH")]))
Count = tuple[int, int, int]  # passed, failed, skipped


def run(*command: str | Path, **kwargs) -> tuple[int, str]:
    "Run a command in the root, show its output, return its exit code and output."
    process = subprocess.Popen([str(part) for part in command], cwd=kwargs.pop("cwd", ROOT), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, **kwargs})
    output = []
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
    return process.wait(), "".join(output)


def notebooks() -> list[Path]:
    return sorted((ROOT / "nbs").glob("*.ipynb"))


def valid_notebooks() -> Count:
    "Each notebook is valid, has no saved error, and each cell an id of its own."
    failed = 0
    for path in notebooks():
        try:
            notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
            nbformat.validate(notebook)
            ids = [cell["id"] for cell in notebook.cells]
            errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
            if errors or len(set(ids)) != len(ids): raise ValueError("a saved error, or two cells with one id")
        except Exception as error:
            failed += 1
            print(f"{path.name}: {error}")
    return len(notebooks()) - failed, failed, 0


def export_in_sync() -> Count:
    "Exporting the notebooks into an empty package gives the package that is here, no file more or less."
    modules = lambda root: {path.relative_to(root): path.read_bytes() for path in (root / "tritoncls").rglob("*.py")}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nbs", "settings.ini"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        (copy / "tritoncls").mkdir()
        run(BIN / "nbdev_export", cwd=copy)
        here, exported = modules(ROOT), modules(copy)
    wrong = sorted(path for path in here.keys() | exported.keys() if here.get(path) != exported.get(path))
    for path in wrong: print(f"not in sync with the notebooks: {path}; `make export`, or delete what no notebook makes")
    return len(exported.keys() - set(wrong)), len(wrong), 0


def readme_in_sync() -> Count:
    code, _ = run(sys.executable, ROOT / "tools" / "readme.py", "--check")
    return (0, 1, 0) if code else (1, 0, 0)


def stub_in_sync() -> Count:
    code, _ = run(sys.executable, ROOT / "tools" / "stub.py", "--check")
    return (0, 1, 0) if code else (1, 0, 0)


def notebook_tests(**environment: str) -> Count:
    "nbdev_test, the cells marked cuda included where there is a GPU."
    import torch

    flags = ["--flags", "cuda"] if torch.cuda.is_available() and not environment else []
    code, output = run(BIN / "nbdev_test", "--n_workers", "2", *flags, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore",
                       **environment)
    failed = len(re.findall(r"^\t\S+\.ipynb$", output, re.M))
    if code and not failed: failed = len(notebooks())
    return len(notebooks()) - failed, failed, 0


def pytest(**environment: str) -> Count:
    code, output = run(sys.executable, "-m", "pytest", "-m", "not slow", "-n", "2", OMP_NUM_THREADS="1", **environment)
    count = lambda word: sum(map(int, re.findall(rf"(\d+) {word}", output.splitlines()[-1] if output else "")))
    failed = count("failed") + count("errors?")
    return count("passed"), failed or int(code != 0), count("skipped")


def ruff() -> Count:
    code, _ = run(BIN / "ruff", "check", ".")
    return (0, 1, 0) if code else (1, 0, 0)


CHECKS = {
    "valid notebooks": valid_notebooks, "export in sync": export_in_sync, "README in sync": readme_in_sync,
    "stub in sync": stub_in_sync, "ruff": ruff, "nbdev_test": notebook_tests, "pytest": pytest,
    "nbdev_test without Triton": partial(notebook_tests, PYTHONPATH=HIDES_TRITON),
    "pytest without Triton": partial(pytest, PYTHONPATH=HIDES_TRITON)}


def main() -> None:
    counts = {}
    for name, check in CHECKS.items():
        print(f"== {name}", flush=True)
        counts[name] = check()
    print()
    say = lambda count: f"{count[0]} passed, {count[1]} failed" + (f", {count[2]} skipped" if count[2] else "")
    for name, count in counts.items(): print(f"{name:26} {say(count)}")
    total = tuple(map(sum, zip(*counts.values(), strict=True)))
    print(f"total: {say(total)}")
    sys.exit(bool(total[1]))


if __name__ == "__main__": main()
