"The promise of the README: at least 99% on the digits, in at most 40 seconds of training, whatever the seed."
import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job(seed, tmp_path):
    command = [sys.executable, "-m", "tritoncls.cli", "train", f"seed={seed}", f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["acc1"] >= 99 and summary["ema_acc1"] >= 99 and summary["acc5"] >= summary["acc1"]
    assert summary["train_seconds"] <= 40
    assert (summary["seed"], summary["test_size"], summary["world_size"]) == (seed, 360, 1)
