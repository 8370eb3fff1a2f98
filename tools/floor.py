"""`make test-floor`: the kernels with the oldest PyTorch and Triton that settings.ini allows, in .venv-floor (several GB)."""
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-floor"
PYTHON = VENV / "bin" / "python"
CHAPTERS = ("00_", "08_", "09_", "1", "20_")  # the kernels, and the losses
TESTS = ("tests/test_losses.py", "tests/test_ema.py", "tests/test_compile.py")


def floors() -> list[str]:
    "What pip shall install: torch==2.8.*, triton==3.4.*"
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    asked = dict(re.findall(r"^(torch|triton)>=([\d.]+)", settings["DEFAULT"]["requirements"], re.M))
    return [f"{name}=={version}.*" for name, version in asked.items()]


def install() -> None:
    "Make the environment, unless it holds what settings.ini asks for now."
    ready, wanted = VENV / ".ready", (ROOT / "settings.ini").read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted: return
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--editable", ".[dev]", *floors()], cwd=ROOT, check=True)
    ready.write_text(wanted, encoding="utf-8")


def main() -> None:
    install()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    chapters = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.name.startswith(CHAPTERS)]
    commands = {path.name: [VENV / "bin" / "nbdev_test", "--path", path] for path in chapters}
    commands["pytest"] = [PYTHON, "-m", "pytest", "-m", "not slow", "-n", "2", *TESTS]
    failed = []
    for name, command in commands.items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=env).returncode: failed.append(name)
    with_what = " ".join(floors())
    if failed: sys.exit(f"with {with_what}, {len(failed)} of {len(commands)} failed: {', '.join(failed)}")
    print(f"all {len(commands)} passed with {with_what}")


if __name__ == "__main__": main()
