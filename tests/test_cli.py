"The program from outside: what it prints, what it leaves behind, how it exits."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchmetrics.functional.classification import multiclass_accuracy

from tritoncls import cli
from tritoncls.config import dotted_keys, load_config, read_yaml
from tritoncls.data import digits_split
from tritoncls.kernels import cross_entropy, ema_blend
from tritoncls.registry import registers
from tritoncls.runtime import INTERPRETER

ROOT = Path(__file__).parent.parent

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
    ("solver.optimizer=sdg",): ["solver.optimizer = 'sdg'", "'sgd', 'adam', 'adamw', 'lamb' or 'lars'"],
    ("loss.name=CE",): ["unknown loss 'CE'", "CrossEntropy"],
    ("model.name=ResNet",): ["unknown model 'ResNet'", "SmallResNet"],
    ("solver.lr_schedule=poly",): ["solver.lr_schedule = 'poly'", "'step', 'linear', 'cosine', 'exp' or 'rel_exp'"],
    ("trainer_name=Mine",): ["unknown trainer 'Mine'", "ClsTrainer"],
    ("hooks_name=Mine",): ["unknown hooks 'Mine'", "DefaultHooks"],
    ("model.args.depth=3",): ["model.args", "depth"],
    ("num_classes=7",): ["num_classes = 7", "10 classes"],
    ("device=cuda:77",): ["cuda:77"],
    ("momentum",): ["'momentum'", "key=value"],
    ("solver.max_epoch=[",): ["not valid YAML"],
    ("-f", "absent.yaml"): ["absent.yaml"],
    ("imports=[no_such_module]",): ["imports", "'no_such_module'", "ModuleNotFoundError"],
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


def written_digits(folder: Path) -> tuple[list[Path], list[int]]:
    "The test digits as image files, and what they are."
    digits, (_, rows) = load_digits(), digits_split()
    for row in rows: Image.fromarray((digits.images[row] * 15.9375).round().astype("uint8")).save(folder / f"digit{row}.png")
    return [folder / f"digit{row}.png" for row in rows], digits.target[rows].tolist()


def test_train_resume_test_and_predict(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tritoncls(monkeypatch, "train", *QUICK, "solver.max_epoch=4", "batch_size=64", "seed=3") == 0
    out = capsys.readouterr().out
    folder = Path(out.splitlines()[-1].removeprefix("output folder: "))
    assert folder.parent == Path("outputs/digits") and "top-1" in out and "%|" in out
    ends = {"dumped_model.safetensors", "dumped_ema_model.safetensors", "summary.json", "loss.svg"}
    files = {path.name for path in folder.iterdir()}
    assert ends | {"latest.pt", "latest.previous.pt", "best_model.safetensors", "config.yaml", "log.jsonl", "tensorboard",
                   "accuracy.svg", "momentum.svg"} <= files

    summary = json.loads((folder / "summary.json").read_text())
    before = {name: (folder / name).read_bytes() for name in ends}
    for name in ends: (folder / name).unlink()
    assert tritoncls(monkeypatch, "train", "--resume") == 0
    assert {name: (folder / name).read_bytes() for name in ends} == before and summary["seed"] == 3

    (folder / "latest.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="latest.pt is damaged.*; taking .*latest.previous.pt, of epoch 3"):
        assert tritoncls(monkeypatch, "train", "--resume", f"output_dir={folder}") == 0
    again = json.loads((folder / "summary.json").read_text())
    assert {**again, "train_seconds": 0} == {**summary, "train_seconds": 0}

    assert tritoncls(monkeypatch, "train", f"output_dir={folder}") == 2
    assert "holds a run already" in capsys.readouterr().err

    weights = folder / "dumped_model.safetensors"
    assert tritoncls(monkeypatch, "test", "-w", weights, "--per-class", "--confusion", "confusion.svg") == 0
    first, *classes = capsys.readouterr().out.splitlines()
    assert first.startswith(f"top-1 {summary['acc1']:.2f}, top-5 {summary['acc5']:.2f} on 360 test images, loss ")
    rows = [line.split() for line in classes]
    assert [row[0] for row in rows] == list("0123456789") and sum(int(row[3]) for row in rows) == 360
    hits = sum(float(row[1]) * int(row[3]) for row in rows) / 360
    assert abs(hits - summary["acc1"]) < 0.01 and "<svg" in Path("confusion.svg").read_text()

    assert tritoncls(monkeypatch, "test", "-w", weights, "model.args.widths=[16]") == 2
    assert "do not fit the model" in capsys.readouterr().err
    assert tritoncls(monkeypatch, "test", "-w", weights, "--confusion", "confusion.png") == 2
    assert "ends in .svg" in capsys.readouterr().err

    paths, target = written_digits(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    assert tritoncls(monkeypatch, "predict", "-w", weights, *paths) == 0
    blocks = capsys.readouterr().out.split(f"{tmp_path}/")[1:]
    named = [[line.split() for line in block.splitlines()[1:]] for block in blocks]
    assert len(named) == 360 and all(len(lines) == 5 for lines in named)
    shares = [[float(share.rstrip("%")) for share, _ in lines] for lines in named]
    assert all(row == sorted(row, reverse=True) and 0 <= sum(row) <= 100.03 for row in shares)
    answers = torch.tensor([int(lines[0][1]) for lines in named])
    accuracy = 100 * multiclass_accuracy(answers, torch.tensor(target), 10, average="micro").item()
    assert accuracy == pytest.approx(summary["acc1"], abs=1e-3) and accuracy > 25

    assert tritoncls(monkeypatch, "predict", "-w", weights, paths[0], "broken.png", "absent.png", paths[1]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("%") == 10 and str(paths[1]) in captured.out
    assert [line.split(":")[1] for line in captured.err.splitlines()] == [" cannot read broken.png", " cannot read absent.png"]


@pytest.mark.parametrize("command", ["test", "predict"])
def test_weights_that_are_not_there(command, monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    more = ["image.png"] if command == "predict" else []
    for name in ("absent.safetensors", "bad.safetensors"):
        assert tritoncls(monkeypatch, command, "-w", tmp_path / name, *more) == 2
        assert f"error: the weights {tmp_path}/{name}" in capsys.readouterr().err.replace("there are no weights", "the weights")
    assert tritoncls(monkeypatch, command, *more) == 2
    assert "--weights" in capsys.readouterr().err


def test_modules_of_ones_own(monkeypatch, tmp_path):
    "A model from a file in the current directory."
    (tmp_path / "my_model.py").write_text("""
from torch import nn
from tritoncls.registry import registers

@registers.models.register("Linear")
def linear(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert tritoncls(monkeypatch, "train", "imports=[my_model]", "model.name=Linear", "model.args={}", "solver.max_epoch=1",
                     "output_dir=run") == 0
    for command, more in (("test", ()), ("predict", written_digits(tmp_path)[0][:1])):
        registers.models.pop("Linear")
        sys.modules.pop("my_model")
        assert tritoncls(monkeypatch, command, "-w", "run/dumped_model.safetensors", *more) == 0
    assert registers.models.pop("Linear").__module__ == sys.modules.pop("my_model").__name__


@pytest.mark.parametrize("columns", [80, 120])
def test_help_explains_every_key(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert tritoncls(monkeypatch, "train", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert columns - 12 < max(map(len, lines)) <= columns
    assert sum(line == "" for line in lines) > 20, "no gaps between the groups"
    text = " ".join(" ".join(lines).split())
    leaves = {name: field for name, field in dotted_keys().items() if field.description}
    assert len(leaves) > 90
    for name, field in leaves.items():
        assert f" {name}=" in text and field.description in text, name


EXAMPLES = {file.name: file for folder in ("configs", "tritoncls/configs") for file in (ROOT / folder).glob("*.yaml")}


@pytest.mark.parametrize("name", ["cifar10.yaml", "digits.yaml", "fake_data_speed.yaml", "imagenet_resnet50.yaml"])
def test_every_example_is_a_configuration(name):
    assert len(EXAMPLES) == 4
    cfg = load_config(EXAMPLES[name])

    def check(values, prefix=""):
        for name, value in values.items():
            assert prefix + name in dotted_keys()
            if f"{prefix}{name}." in " ".join(dotted_keys()): check(value, f"{prefix}{name}.")
    check(read_yaml(EXAMPLES[name].read_text(), name))
    assert cfg.output_dir is None and len(cfg.preprocess.img_mean) == cfg.model.args.get("channels", 3)


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
    "Two iterations and two evaluations with backend=triton launch the kernels and come to what PyTorch comes to."
    homes = {"cross_entropy_kernel": cross_entropy, "cross_entropy_backward_kernel": cross_entropy,
             "ema_blend_kernel": ema_blend}
    kernels = {name: Counted(getattr(module, name)) for name, module in homes.items()}
    for name, module in homes.items(): monkeypatch.setattr(module, name, kernels[name])

    def trained(backend):
        return cli.run(cli.run_config(None, False, [
            "solver.max_epoch=1", "batch_size=512", "model.args.widths=[8, 16]", "model_ema.start_epoch=0",
            "model_ema.momentum=0.5", f"backend={backend}", f"output_dir={tmp_path}/{backend}"]))

    ours = trained("triton")
    assert {name: kernel.launches for name, kernel in kernels.items()} == {
        "cross_entropy_kernel": 4, "cross_entropy_backward_kernel": 2, "ema_blend_kernel": 2}
    torchs = trained("torch")
    for a, b in zip(ours.ema.module.parameters(), torchs.ema.module.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * max(1.0, b.norm())
    assert ours.results["model"].count == 360
    assert abs(ours.results["model"].acc1 - torchs.results["model"].acc1) <= 100 / 360
