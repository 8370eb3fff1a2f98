"What is published is whole: the tests run from the source distribution, and the wheel has the hints."
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
ALONE = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=ALONE, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    "The source distribution, unpacked somewhere else."
    folder = tmp_path_factory.mktemp("sdist")
    with FileLock(tmp_path_factory.getbasetemp().parent / "sdist.lock"):  # it is put together in the checkout
        run(ROOT, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    [packed] = folder.glob("tritoncls-*.tar.gz")
    with tarfile.open(packed) as archive: archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_it_holds_what_the_checkout_holds(unpacked):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert set(tracked) - held == set()
    made = {name for name in held - set(tracked) if ".egg-info" not in name}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_the_tests_run_from_it(unpacked):
    where = run(unpacked, "-c", "import tritoncls; print(tritoncls.__file__)")
    assert Path(where.strip()) == unpacked / "tritoncls" / "__init__.py"
    said = run(unpacked, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_hooks.py", "tests/test_evaluate.py",
               "tests/test_laptop.py")
    assert " passed" in said and "failed" not in said
    nbdev_test = Path(sys.executable).with_name("nbdev_test")
    assert "Success." in run(unpacked, nbdev_test, "--path", "nbs/04_files.ipynb")
    run(unpacked, "tools/stub.py", "--check")


def test_the_wheel_made_of_it_has_hints_and_asks_for_triton_on_linux_alone(unpacked, tmp_path):
    run(unpacked, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".")
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert {f"tritoncls/{name}" for name in ("py.typed", "__init__.pyi", "__main__.py", "configs/digits.yaml")} <= names
    assert not any(name.startswith(("tests/", "nbs/", "tools/")) for name in names)
    [triton] = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: triton")]
    assert triton.endswith('; platform_system == "Linux"')
