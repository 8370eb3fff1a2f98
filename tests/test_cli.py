"The program from outside: what it prints, what it leaves behind, how it exits."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tritoncls import cli
from tritoncls.kernels import cross_entropy, ema_blend, rank
from tritoncls.runtime import INTERPRETER

QUICK = ["solver.max_epoch=1", "model.args.widths=[8]", "batch_size=256"]


def tritoncls(monkeypatch, *args) -> int:
    "Run the program in this process; its exit code."
    monkeypatch.setattr(sys, "argv", ["tritoncls", *map(str, args)])
    with pytest.raises(SystemExit) as stopped: cli.main()
    return stopped.value.code or 0


MISTAKES = {
    ("solver.basic_Ir=0.1",): ["'solver.basic_Ir'", "'solver.basic_lr'"],
    ("lr=0.1",): ["'lr'", "did you mean"],
    ("batch_size=big",): ["batch_size = 'big'", "integer"],
    ("solver.basic_lr=-1",): ["solver.basic_lr = -1", "greater than 0"],
    ("solver.momentum=1.5",): ["solver.momentum = 1.5", "less than 1"],
    ("data.name=Digit",): ["unknown data 'Digit'", "Digits", "FakeData"],
    ("solver.optimizer=sdg",): ["unknown optimizer 'sdg'", "adam, adamw, lamb, lars, sgd"],
    ("loss.name=CE",): ["unknown loss 'CE'", "CrossEntropy"],
    ("model.name=ResNet",): ["unknown model 'ResNet'", "SmallResNet"],
    ("solver.lr_schedule=poly",): ["unknown lr_schedule 'poly'", "cosine, exp, linear, rel_exp, step"],
    ("trainer_name=Mine",): ["unknown trainer 'Mine'", "ClsTrainer"],
    ("hooks_name=Mine",): ["unknown hooks 'Mine'", "DefaultHooks"],
    ("model.args.depth=3",): ["model.args", "depth"],
    ("num_classes=7",): ["num_classes = 7", "10 classes"],
    ("device=cuda:77",): ["cuda:77"],
    ("momentum",): ["'momentum'", "key=value"],
    ("solver.max_epoch=[",): ["not valid YAML"],
    ("-f", "absent.yaml"): ["absent.yaml"],
    ("--resume",): ["--resume", "no run with a checkpoint"],
    ("--resume", "output_dir=absent"): ["there is no checkpoint absent/latest.pt"],
    ("output_dir=/dev/null/run",): ["/dev/null/run", "cannot write"],
}


@pytest.mark.parametrize("args", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(args, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tritoncls(monkeypatch, "train", *args) == 2
    captured = capsys.readouterr()
    for part in MISTAKES[args]: assert part in captured.err
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert not captured.out and not list(tmp_path.iterdir()), "training began"


def test_warmup_may_be_longer_than_the_run(monkeypatch, tmp_path):
    assert tritoncls(monkeypatch, "train", *QUICK, "solver.warmup_epochs=9", f"output_dir={tmp_path}") == 0


def test_train_resume_and_test(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tritoncls(monkeypatch, "train", *QUICK, "seed=3") == 0
    out = capsys.readouterr().out
    folder = Path(out.splitlines()[-1].removeprefix("output folder: "))
    assert folder.parent == Path("outputs/digits") and "top-1" in out and "%|" in out
    files = {path.name for path in folder.iterdir()}
    assert {"latest.pt", "dumped_model.safetensors", "dumped_ema_model.safetensors", "best_model.safetensors",
            "config.yaml", "log.jsonl", "summary.json", "tensorboard",
            "loss.svg", "accuracy.svg", "momentum.svg"} <= files

    summary = json.loads((folder / "summary.json").read_text())
    assert tritoncls(monkeypatch, "train", "--resume") == 0
    again = json.loads((folder / "summary.json").read_text())
    assert again == summary and again["seed"] == 3

    assert tritoncls(monkeypatch, "train", f"output_dir={folder}") == 2
    assert "holds a run already" in capsys.readouterr().err

    assert tritoncls(monkeypatch, "test", "-w", folder / "dumped_model.safetensors") == 0
    assert f"top-1 {summary['acc1']:.2f}, top-5 {summary['acc5']:.2f} on 360 test images" in capsys.readouterr().out
    assert tritoncls(monkeypatch, "test", "-w", folder / "dumped_model.safetensors", "model.args.widths=[16]") == 2
    assert "do not fit the model" in capsys.readouterr().err


def test_a_crash_is_shown_and_exits_with_1():
    code = """
import sys
from tritoncls import cli, trainer
def broken(self, *args): raise RuntimeError("the GPU fell off the bus")
trainer.ClsTrainer.model_step = broken
import tempfile
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["tritoncls", "train", f"output_dir={folder}/run"]
    cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the GPU fell off the bus" in done.stderr


class Counted:
    "A kernel that counts its launches."
    def __init__(self, kernel): self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.skipif(not INTERPRETER, reason="on a GPU the kernels run anyway")
def test_the_main_job_runs_through_the_kernels(monkeypatch, tmp_path):
    "Two iterations with backend=triton launch the kernels and come to what PyTorch comes to."
    homes = {"cross_entropy_kernel": cross_entropy, "cross_entropy_backward_kernel": cross_entropy,
             "ema_blend_kernel": ema_blend, "rank_kernel": rank}
    kernels = {name: Counted(getattr(module, name)) for name, module in homes.items()}
    for name, module in homes.items(): monkeypatch.setattr(module, name, kernels[name])

    def trained(backend):
        return cli.run(cli.run_config(None, False, [
            "solver.max_epoch=1", "batch_size=512", "model.args.widths=[8, 16]", "model_ema.start_epoch=0",
            "model_ema.momentum=0.5", f"backend={backend}", f"output_dir={tmp_path}/{backend}"]))

    ours = trained("triton")
    assert {name: kernel.launches for name, kernel in kernels.items()} == dict.fromkeys(homes, 2)
    torchs = trained("torch")
    for a, b in zip(ours.ema.module.parameters(), torchs.ema.module.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * max(1.0, b.norm())
    assert ours.results["model"].count == 360
    assert abs(ours.results["model"].acc1 - torchs.results["model"].acc1) <= 100 / 360
