"A mistake in a value, a name or a file is one short line that says where; closed streams and strange letters are none."
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tritoncls import cli
from tritoncls.checkpoint import load_checkpoint, previous, read_checkpoint
from tritoncls.config import dump_yaml, load_config, make_config, read_yaml
from tritoncls.registry import registers
from tritoncls.runtime import UserError

QUICK = ["solver.max_epoch=1", "model.args.widths=[4]", "batch_size=256", "device=cpu"]
LAUGHS = "[&a [ha, ha, ha], " + ", ".join(
    f"&{b} [{', '.join(9 * [f'*{a}'])}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)) + "]"  # 3 * 9^8 words


def tritoncls(monkeypatch, *args) -> int:
    "Run the program in this process; its exit code."
    monkeypatch.setattr(sys, "argv", ["tritoncls", *map(str, args)])
    with pytest.raises(SystemExit) as stopped: cli.main()
    return stopped.value.code or 0


def complaint(capsys) -> str:
    "The one line on stderr, and nothing else."
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 600, (out, err)
    return err.removeprefix("error: ").rstrip("\n")


VALUES = {
    "seed=!!int abc": ["seed = '!!int abc'", "a whole number"],
    "solver.nesterov=!!bool maybe": ["solver.nesterov = '!!bool maybe'", "true or false"],
    "seed=!!int ''": ["seed = ", "a whole number"],
    "solver.basic_lr=!!float x": ["solver.basic_lr", "'!!float x'", "a number"],
    "seed=!!timestamp x": ["seed", "'!!timestamp x'", "unknown tag"],
    "seed=" + "9" * 5000: ["seed = '999", "...", "at most 100 characters, not 5000"],
    "solver.max_epoch=" + "9" * 90: ["solver.max_epoch = 999", "...", "less than or equal to 1000000"],
    "model.args=" + "[" * 3000: ["model.args = '[[", "nested more than 20 levels"],
    "model.args=" + "{a: " * 60 + "1" + "}" * 60: ["model.args = '{a: {a:", "nested more than 20 levels"],
    "model.args." + "a." * 3000 + "b=1": ["model.args.a.a", "nested more than 20 levels"],
    "model.args={x: &a [*a]}": ["model.args", "nested more than 20 levels"],
    "solver.weight_decay=" + LAUGHS: ["solver.weight_decay = '[&a [ha", "more than 10000 values"],
    "model.args={x: " + LAUGHS + "}": ["model.args = '{x: [&a", "more than 10000 values"],
    'output_dir="a\\0b"': ["output_dir = 'a\\x00b'", "a path"],
    "output_dir=" + "a" * 300: ["output_dir = 'aaa", "...", "at most 255 bytes"],
    "output_dir=" + "a/" * 3000: ["output_dir = 'a/a", "..."],
    'output_dir="a\\ud800b"': ["output_dir = 'a\\ud800b'", "a path"],
    "weights=" + "a" * 300: ["weights = 'aaa", "...", "at most 255 bytes"],
    "device=meta": ["device = 'meta'", "allowed", "cpu, cuda"],
    "device=hpu": ["device = 'hpu'", "allowed", "cpu, cuda"],
    "data.length=1e21": ["data.length = 1e+21", "valid integer"],
    "data.length=" + str(10**21): ["data.length = 1" + "0" * 21, "less than or equal to 100000000"],
    "solver.max_epoch=1e12": ["solver.max_epoch = 1000000000000.0", "valid integer"],
    "solver.max_epoch=" + str(10**12): ["solver.max_epoch = 1000000000000", "less than or equal to 1000000"],
    "num_classes=" + str(10**12): ["num_classes = 1000000000000", "less than or equal to"],
    "solver.basic_lr=1e300": ["solver.basic_lr = 1e+300", "from -1e30 to 1e30"],
    "data.name=" + "x" * 3000: ["data.name = 'xxx", "...", "Digits, FakeData"],
    "x" * 100000 + "=1": ["unknown key 'xxx", "...", "did you mean"],
    "model.freeze=['" + "(" * 1000 + "']": ["model.freeze", "...", "not a regular expression"],
    "model.freeze=['a{99999999999}']": ["model.freeze", "not a regular expression"],
    "seed=\"a": ["seed", "not valid YAML"],
    "model.args={[a]: 1}": ["model.args", "keys need to be names"],
}


@pytest.mark.parametrize("assignment", VALUES, ids=[key[:30] for key in VALUES])
def test_a_value_that_cannot_be_is_one_short_line_with_key_value_and_what_is_allowed(assignment, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tritoncls(monkeypatch, "train", "model.args={channels: 1, widths: [4]}", assignment) == 2
    line = complaint(capsys)
    for part in VALUES[assignment]: assert part in line, line
    assert not list(tmp_path.iterdir()), "training began"


@pytest.mark.parametrize("text, parts", [
    ("seed: 1\nsolver:\n  nesterov: !!bool maybe", ["line 3", "solver.nesterov = 'maybe'", "true or false"]),
    ("seed: 1\nmodel: {args: {x: " + LAUGHS + "}}", ["line 2", "model.args.x", "more than 10000 values"]),
    (LAUGHS, ["more than 10000 values"]), ("[" * 5000, ["nested"]), ("x" * 2_000_000, ["more than 1000000 characters"]),
    ("seed: 1\nseed: 2", ["'seed' stands twice"]), ("seed: 1\nb: 'x", ["line 2", "not valid YAML"]),
    ("seed: \0", ["not valid YAML"])])
def test_a_file_that_cannot_be_is_one_short_line_with_its_name(text, parts, monkeypatch, capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert tritoncls(monkeypatch, "train", "-f", file) == 2
    line = complaint(capsys)
    for part in (str(file), *parts): assert part in line, line


def test_a_hundred_mistakes_are_eight_lines_and_a_count():
    with pytest.raises(UserError) as caught: load_config(overrides=[f"model_ema.{'m' * i}=1" for i in range(1, 101)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 9 and lines[-1] == "and 92 more" and all("did you mean" in line for line in lines[:-1])


def test_a_run_that_is_longer_than_its_schedules_can_be():
    cfg = load_config(overrides=["data.name=FakeData", "solver.max_epoch=1000000", "batch_size=1", "output_dir=x"])
    with pytest.raises(UserError, match="solver.max_epoch = 1000000: 1024 iterations an epoch"): cli.build_trainer(cfg)


def test_a_configuration_is_read_back_as_it_was_written():
    words = ["none", "null", "1e-4", "010", "off", "true", "~", "0x10", "1:2", ".inf", "2001-01-01", "=", "<<", "a\0b",
             "é\u2028", " "]
    cfg = make_config({"model": {"args": {"words": words, **{word: word for word in words}}}})
    assert make_config(read_yaml(dump_yaml(cfg), "test")) == cfg


# Names

@pytest.mark.parametrize("key, name, allowed", [
    ("augments.name", "TrivialAugment", "AutoAugment, ColorAugment, RandAugment, RandomAffine, SimpleAugment"),
    ("solver.optimizer", "lion", "'sgd', 'adam', 'adamw', 'lamb' or 'lars'"), ("solver.name", "Mine", "DefaultSolver"),
    ("solver.lr_schedule", "poly", "'step', 'linear', 'cosine', 'exp' or 'rel_exp'"), ("loss.name", "CE", "BinaryCrossEntropy"),
    ("model_ema.schedule", "ema", "'cosine'"), ("data.name", "Digit", "Cifar, Digits, FakeData, FolderLoader"),
    ("model.name", "resnet50", "SmallResNet, package.module:callable, timm/NAME, torchvision/NAME"),
    ("trainer_name", "Mine", "ClsTrainer"), ("hooks_name", "Mine", "DefaultHooks")])
def test_an_unknown_name_is_refused_when_the_configuration_is_read(key, name, allowed):
    with pytest.raises(UserError) as caught: load_config(overrides=[f"{key}={name}"])
    line = str(caught.value)
    assert line.startswith(f"{key} = '{name}': ") and allowed in line and "\n" not in line


def test_names_that_come_later_or_have_another_form_are_taken():
    for assignment in ("model.name=timm/resnet18", "model.name=torchvision/resnet18", "model.name=my.module:Net"):
        load_config(overrides=[assignment])
    load_config(overrides=["imports=[my_module]", "augments.name=Mine", "data.name=Mine"])
    registers.losses.register("Mine")(lambda **_: None)
    try: assert load_config(overrides=["loss.name=Mine"]).loss.name == "Mine"
    finally: registers.losses.pop("Mine")


def test_a_configuration_knows_every_name_that_the_package_has():
    from typing import get_args

    from tritoncls.config import BUILT_IN, ModelEmaConfig, SolverConfig
    from tritoncls.optimizers import OPTIMIZERS
    from tritoncls.schedules import LR_SCHEDULES, MOMENTUM_SCHEDULES
    for registry in vars(registers).values():
        ours = {name for name, thing in registry.items() if thing.__module__.startswith("tritoncls.")}
        assert ours == set(BUILT_IN[registry.kind])
    words = lambda section, key: get_args(section.model_fields[key].annotation)
    assert words(SolverConfig, "optimizer") == tuple(OPTIMIZERS)
    assert words(SolverConfig, "lr_schedule") == tuple(LR_SCHEDULES)
    assert get_args(words(ModelEmaConfig, "schedule")[0]) == tuple(MOMENTUM_SCHEDULES)


# Checkpoints and weights that somebody has edited

@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "The folder of a short run."
    folder = tmp_path_factory.mktemp("finished") / "run"
    cli.run(cli.run_config(None, False, [*QUICK, "model_ema.start_epoch=0", f"output_dir={folder}"]))
    return folder


def with_numpy(rng, **changes):
    name, numbers, place, *rest = rng["numpy"]
    return rng | {"numpy": (name, changes.get("numbers", numbers), changes.get("place", place), *rest)}


FORGED = {  # what an entry becomes -> what the error names
    "rng": (lambda rng: None, "rng"), "rng.python": (lambda rng: rng | {"python": "seed"}, "rng"),
    "rng.numpy": (lambda rng: with_numpy(rng, numbers=torch.zeros(3)), "rng"),
    "rng.numpy position": (lambda rng: with_numpy(rng, place=10**6), "rng"),
    "rng.torch": (lambda rng: rng | {"torch": torch.zeros(5056)}, "rng"),
    "rng.cuda": (lambda rng: rng | {"cuda": [1]}, "rng"), "rng lacks": (lambda rng: {}, "rng"),
    "cfg": (lambda cfg: 7, "cfg"), "cfg tag": (lambda cfg: "seed: !!int abc", "cfg"), "cfg list": (lambda cfg: "[1]", "cfg"),
    "cfg laughs": (lambda cfg: LAUGHS, "cfg"), "best": (lambda best: {"model": "high"}, "best.model"),
    "best list": (lambda best: [99.0], "best"), "best nan": (lambda best: {"model": float("nan")}, "best.model"),
    "meters": (lambda meters: {"loss": 1}, "meters.loss"),
    "meters values": (lambda meters: {"loss": {"values": ("a",), "total": 1.0, "count": 1}}, "meters.loss.values.0"),
    "classes": (lambda classes: 7, "classes"), "classes numbers": (lambda classes: [1], "classes.0"),
    "seconds": (lambda seconds: "long", "seconds"), "epoch": (lambda epoch: -1, "epoch"), "iter": (lambda n: 1.5, "iter"),
    "images": (lambda n: None, "images"), "steps_per_epoch": (lambda n: 0, "steps_per_epoch"),
    "model": (lambda model: [1], "model"), "model number": (lambda model: model | {"head.bias": 1}, "model.head.bias"),
    "ema": (lambda ema: {"module": {}}, "ema.steps"), "ema text": (lambda ema: "average", "ema"),
    "solver": (lambda solver: None, "solver"), "version": (lambda version: torch.zeros(3), "its version is tensor")}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_entry_of_a_checkpoint_is_named_with_its_file(case, finished, tmp_path, monkeypatch, capsys):
    forge, named = FORGED[case]
    state, entry = torch.load(finished / "latest.pt", weights_only=True), case.split()[0].split(".")[0]
    state[entry] = forge(state[entry])
    for path in (tmp_path / "latest.pt", previous(tmp_path / "latest.pt")): torch.save(state, path)
    with pytest.raises(UserError) as caught: read_checkpoint(tmp_path / "latest.pt")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/latest.pt") and named in line and "\n" not in line and len(line) <= 500, line
    assert tritoncls(monkeypatch, "train", "--resume", *QUICK, f"output_dir={tmp_path}") == 2
    assert capsys.readouterr().err.count(named) >= 2


def test_an_entry_that_a_checkpoint_lacks_is_named_and_the_one_before_it_is_taken(finished, tmp_path):
    state = torch.load(finished / "latest.pt", weights_only=True)
    torch.save({name: part for name, part in state.items() if name != "rng"}, tmp_path / "latest.pt")
    torch.save(state, previous(tmp_path / "latest.pt"))
    with pytest.warns(UserWarning, match="latest.pt: rng = .*field required; taking .*latest.previous.pt"):
        assert load_checkpoint(tmp_path / "latest.pt")["epoch"] == 1


@pytest.mark.parametrize("forge", [
    {}, {"optimizer": None}, {"optimizer": {"state": {}, "param_groups": 7}}, {"optimizer": {"state": [], "param_groups": []}},
    "a word in its state"], ids=str)
def test_a_forged_state_of_an_optimizer_does_not_fit(forge, finished, tmp_path, monkeypatch, capsys):
    state = torch.load(finished / "latest.pt", weights_only=True)
    if isinstance(forge, str): state["solver"]["optimizer"]["state"][0] = {"momentum_buffer": "word"}
    else: state["solver"] = state["solver"] | forge if forge else {}
    torch.save(state, tmp_path / "latest.pt")
    assert tritoncls(monkeypatch, "train", "--resume", *QUICK, f"output_dir={tmp_path}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the checkpoint does not fit this configuration:") and "Traceback" not in err


HEADERS = {"{": "JSON", "[1]": "JSON", "[" * 100000: "JSON", '{"acc1": "high"}': "acc1 = 'high'", '{"cfg": 7}': "cfg = 7",
           '{"cfg": "[1]"}': "cfg = '[1]'", '{"cfg": "seed: x"}': "seed = 'x'", '{"cfg": "seed: !!int x"}': "seed = 'x'",
           '{"cfg": "model: {name: 7}"}': "model.name = 7", '{"classes": 7}': "classes = 7",
           '{"classes": [1]}': "classes.0 = 1"}


@pytest.mark.parametrize("header", HEADERS, ids=[header[:25] for header in HEADERS])
def test_a_forged_header_of_weights_is_named_with_its_file(header, finished, tmp_path, monkeypatch, capsys):
    file = tmp_path / "weights.safetensors"
    save_file(load_file(finished / "dumped_model.safetensors"), file, {"tritoncls": header})
    for command in (["predict", "-w", file, "image.png"], ["test", "-w", file]):
        assert tritoncls(monkeypatch, *command) == 2
        line = complaint(capsys)
        assert line.startswith(f"{file}: ") and HEADERS[header] in line, line


def test_a_forged_header_of_the_best_weights_is_named_when_a_run_resumes(finished, tmp_path, monkeypatch, capsys):
    for name in ("latest.pt", "config.yaml"): (tmp_path / name).write_bytes((finished / name).read_bytes())
    save_file({"x": torch.zeros(1)}, tmp_path / "best_model.safetensors", {"tritoncls": '{"acc1": [1]}'})
    assert tritoncls(monkeypatch, "train", "--resume", f"output_dir={tmp_path}") == 2
    assert "best_model.safetensors: acc1 = [1]" in capsys.readouterr().err


# Streams

def program(*args, cwd, shell="", **env):
    "Run the program in a process of its own."
    command = [sys.executable, "-m", "tritoncls.cli", *map(str, args)]
    if shell: command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("shell", [">&-", pytest.param(">&- 2>&-", marks=pytest.mark.slow)])
def test_a_run_without_standard_output_is_a_run(shell, tmp_path):
    done = program("train", *QUICK, "data.num_workers=1", "log_every_n_iter=2", "output_dir=run", cwd=tmp_path, shell=shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["train", "train", "train", "eval"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_size"] == 360


NAMES = ["caf\u00e9 \u732b.png", os.fsdecode(b"\xff.png")]


@pytest.mark.parametrize("encoding, shown", [
    ("ascii", b"caf\\xe9 \\u732b.png"), ("latin-1", b"caf\xe9 \\u732b.png"), ("utf-8", NAMES[0].encode())])
def test_predict_prints_any_file_name_on_any_screen(encoding, shown, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES: Image.new("L", (8, 8)).save(name)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert tritoncls(monkeypatch, "predict", "-w", finished / "dumped_model.safetensors", *NAMES, "\u732b.jpg") == 1
    for stream in streams: stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    assert shown in out and b"\\udcff.png" in out and out.count(b"%") == 10
    assert err.startswith(b"error: cannot read ") and err.count(b"\n") == 1


def test_predict_prints_any_file_name_where_the_locale_is_c(finished, tmp_path):
    for name in NAMES: Image.new("L", (8, 8)).save(tmp_path / name)
    done = program("predict", "-w", finished / "dumped_model.safetensors", *NAMES, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0",
                   PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.count(b"%") == 10 and b"\\udcff.png" in done.stdout


# Going on

def again(monkeypatch, folder, *args): return tritoncls(monkeypatch, "train", "--resume", f"output_dir={folder}", *args)


def copied(finished: Path, folder: Path) -> Path:
    for name in ("latest.pt", "config.yaml", "log.jsonl"): (folder / name).write_bytes((finished / name).read_bytes())
    return folder


def test_lines_of_the_log_that_are_no_records_do_no_harm(finished, tmp_path, monkeypatch):
    folder = copied(finished, tmp_path)
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'7\n[]\nnull\n{"kind": "train"}\n{"kind": "train", "step": "1"}\n{"kind": "eval", "step": 1, "model": 5}\n'
                   b'{"kind": "train", "step": 3, "loss": [1]}\n\xff\xfe\n' + b"9" * 5000 + b"\n" + b"[" * 100000 + b"\n")
    assert again(monkeypatch, folder) == 0 and "<svg" in (folder / "loss.svg").read_text()


@pytest.mark.parametrize("key, then, now", [
    ("data.name", "Digits", "FakeData"), ("num_classes", 10, 12),
    ("model.name", "SmallResNet", "tritoncls.models:SmallResNet")])
def test_another_run_is_refused_with_both_values_and_changes_no_file(key, then, now, finished, tmp_path, monkeypatch, capsys):
    folder = copied(finished, tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    more = ["data.name=FakeData"] if key == "num_classes" else []  # Digits has ten classes
    assert again(monkeypatch, folder, *more, f"{key}={now}") == 2
    err = capsys.readouterr().err
    assert f"{key} = {then!r}, now {now!r}" in err and "another run" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert again(monkeypatch, folder) == 0


def test_other_keys_are_told_with_both_values_and_kept(finished, tmp_path, monkeypatch):
    folder = copied(finished, tmp_path)
    with pytest.warns(UserWarning, match="with other keys: solver.basic_lr = .*, now 0.01; solver.max_epoch = 1, now 2$"):
        assert again(monkeypatch, folder, "solver.max_epoch=2", "solver.basic_lr=0.01", "log_every_n_iter=3") == 0
    assert load_config(folder / "config.yaml").solver.basic_lr == 0.01


@pytest.mark.filterwarnings("error:the run continues")
def test_keys_that_change_no_number_are_not_told(finished, tmp_path, monkeypatch):
    assert again(monkeypatch, copied(finished, tmp_path), "log_every_n_iter=3", "data.num_workers=0", "max_nan_iters=5") == 0
