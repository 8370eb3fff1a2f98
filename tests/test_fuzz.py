"Whatever a configuration, a checkpoint, a header or a log says, it is used or refused with a short message."
import copy
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tritoncls.checkpoint import read_checkpoint, restore, trainer_state
from tritoncls.cli import build_trainer
from tritoncls.config import Section, dotted_keys, load_config
from tritoncls.logs import read_log
from tritoncls.predict import class_names, weights_config
from tritoncls.runtime import UserError

is_section = lambda field: isinstance(field.annotation, type) and issubclass(field.annotation, Section)
KEYS = [name for name, field in dotted_keys().items() if not is_section(field)]
WORDS = ["-1", "0", "1", "2", "3", "7", "0.5", "1e-4", "3.5", "1.0e30", "inf", "-inf", ".nan", "null", "true", "false", "abc",
         "''", "[]", "[1, 2]", "[2, 1]", "[0.1, 0.9]", "[[0, bias], 0.1]", "[[0, '('], 0.1]", "[a, b]", "{}", "{a: 1}"]
NAMES = {
    "model.name": ["SmallResNet", "timm/test_vit", "torchvision/nothing", "os:getcwd", "a:b", "timm/"],
    "data.name": ["Digits", "FakeData", "Cifar", "FolderLoader"], "loss.name": ["CrossEntropy", "BinaryCrossEntropy"],
    "augments.name": ["SimpleAugment", "ColorAugment", "AutoAugment", "RandAugment", "RandomAffine"],
    "solver.optimizer": ["sgd", "adam", "adamw", "lamb", "lars"],
    "solver.lr_schedule": ["step", "linear", "cosine", "exp", "rel_exp"],
    "solver.grad_clip.name": ["norm", "value", "adaptive"], "amp.dtype": ["float16", "bfloat16"],
    "model_ema.schedule": ["tf_ratio", "cosine", "cubic", "swa"], "augments.mixup.mode": ["batch", "pair", "elem"],
    "model_ema.schedule_args": ["{momentum: 0.9}", "{start_momentum: 0.5, end_momentum: 0.9}"], "model.args": ["{channels: 1}"],
    "data.train_path": [".", "/nowhere"], "model.freeze": ["[features]", "['(']", "[nothing]", "['']"],
    "preprocess.img_mean": ["[1, 2, 3]"], "preprocess.img_std": ["[1, 2, 3]", "[0]"], "imports": ["[os]", "[no_such_module]"]}
FIXED = {"output_dir", "device", "seed", "data.num_workers", "solver.max_epoch", "num_classes"}

assignments = st.lists(st.sampled_from([key for key in KEYS if key not in FIXED]).flatmap(
    lambda key: st.sampled_from(WORDS + 4 * NAMES.get(key, [])).map(lambda word: f"{key}={word}")), max_size=4)


def refused(error: UserError) -> None:
    "The message is one for people."
    lines = str(error).split("\n")
    assert len(str(error)) > 10 and len(lines) < 40 and max(map(len, lines)) <= 500, error


def try_out(overrides, folder):
    "One iteration, or a message."
    small = ["model.args={channels: 1, widths: [4]}", "data.length=64", f"output_dir={folder}", "solver.max_epoch=1"]
    try:
        trainer = build_trainer(load_config(overrides=[*small, *overrides]))
        trainer.progress.max_iter = len(trainer.dataloader)
        trainer.before_epoch()
        trainer.train_one_iter()
    except UserError as error: refused(error)
    else: assert np.isfinite(trainer.seconds)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(assignments)
def test_a_configuration_trains_or_is_refused(tmp_path_factory, overrides):
    torch.set_num_threads(1)
    try_out(overrides, tmp_path_factory.getbasetemp() / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(assignments)
def test_500_configurations_train_or_are_refused(tmp_path_factory, overrides):
    torch.set_num_threads(1)
    try_out(overrides, tmp_path_factory.getbasetemp() / "run")


# Odd values: what YAML can say, and what somebody might put into a file

TAGS = ["!!int", "!!float", "!!bool", "!!null", "!!str", "!!seq", "!!map", "!!set", "!!omap", "!!pairs", "!!timestamp",
        "!!binary", "!!merge", "!!python/none", "!!python/object:os.system", "!x", "!", "!<a>", "&a", "*a", "|\n ", ">\n ",
        "? ", "- ", "---", "..."]
NUMERALS = ["0x10", "010", "1_000", "1:2:3", "+5", "-0", ".", "1e", "1e999", "-.inf", "\u0663", "1 000", "1,5", "0b1", "1.",
            ".5e1"]
PATHS = ["a\0b", "\ud800", "../..", "/dev/null/x", "~", ".", "", "os:getcwd", ":", "timm/", "torchvision/", "a:b:c",
         "caf\u00e9 \u732b"]
BRACKETS = [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("&a [", "]"), ("!!seq [", "]")]
JUNK = [None, True, -1, 10**30, 1.5, float("nan"), "word", "seed: !!int x", [], {}, [1], {"a": 1}, (), torch.zeros(3),
        torch.tensor(1)]
numbers = st.one_of(
    st.integers(10**12, 10**90).map(str), st.integers(-10**90, -1).map(str), st.integers(1, 6000).map(lambda n: "9" * n),
    st.builds("{}.{}e{}".format, st.integers(0, 99), st.integers(0, 99), st.integers(-400, 400)), st.sampled_from(NUMERALS))


def nested(pair, depth, inside, closed): return pair[0] * depth + inside + pair[1] * depth * closed


def laughing(levels, width):
    names = [f"a{i}" for i in range(levels)]
    later = (f"&{b} [{', '.join(width * [f'*{a}'])}]" for a, b in zip(names, names[1:], strict=False))
    return "[" + ", ".join(["&a0 [ha]", *later]) + "]"


names = st.one_of(
    st.text(max_size=300), st.text("/.ab\0:", max_size=30), st.integers(100, 5000).map(lambda n: "x" * n),
    st.sampled_from(PATHS))
VALUES = {
    "tags": st.builds("{} {}".format, st.sampled_from(TAGS), st.one_of(st.sampled_from(WORDS), st.text(max_size=12))),
    "numbers": numbers,
    "nesting": st.one_of(
        st.builds(nested, st.sampled_from(BRACKETS), st.integers(1, 40) | st.integers(1000, 3000),
                  st.sampled_from(["", "1", "*a", "x: y"]), st.booleans()),
        st.builds(laughing, st.integers(1, 30), st.integers(1, 10))),
    "names": names.map(json.dumps)}


def value(kind, data, folder):
    "A value of one key, on the command line or in a file."
    key = data.draw(st.sampled_from([key for key in KEYS if (kind, key) != ("names", "imports")]))
    text = data.draw(VALUES[kind])
    if data.draw(st.booleans()): return try_out([f"{key}={text}"], folder / "run")
    file = folder / "run.yaml"
    file.write_text(f"{key.split('.')[0]}: {text}\n" if data.draw(st.booleans()) else text, encoding="utf-8", errors="replace")
    try: load_config(file)
    except UserError as error: refused(error)


def places(state, path=()):
    "The paths of the first entries of a nested state."
    inside = list(state.items())[:8] if isinstance(state, dict) else list(enumerate(state))[:4] if isinstance(
        state, list | tuple) else []
    return [p for key, part in inside for p in ((*path, key), *places(part, (*path, key)))]


def changed(state, path, junk):
    "The state with something else, or nothing, in one place."
    if not path: return junk
    parts = dict(state) if isinstance(state, dict) else list(state)
    if junk is ... and len(path) == 1: del parts[path[0]]
    else: parts[path[0]] = changed(parts[path[0]], path[1:], junk)
    return parts if isinstance(state, dict | list) else tuple(parts)


@cache
def trained() -> tuple:
    "A trainer after three iterations, and its state."
    trainer = build_trainer(load_config(overrides=[
        "model.args={channels: 1, widths: [4]}", "batch_size=64", "output_dir=nowhere", "solver.optimizer=adamw",
        "model_ema.start_epoch=0"]))
    trainer.hooks = []
    trainer.progress.max_iter = len(trainer.dataloader)
    iterate(trainer, 3)
    return trainer, copy.deepcopy(trainer_state(trainer, 0, 3))


def iterate(trainer, n):
    trainer.before_epoch()
    for _ in range(n):
        trainer.train_one_iter()
        trainer.progress.next_iter()


def checkpoint(kind, data, folder):
    "A checkpoint with an entry that is not what it was, resumed for one iteration."
    trainer, state = trained()
    path = data.draw(st.sampled_from(places(state)))
    torch.save(changed(state, path, data.draw(st.sampled_from([*JUNK, ...]))), folder / "latest.pt")
    try: restore(trainer, read_checkpoint(folder / "latest.pt"))
    except UserError as error: return refused(error)
    trainer.progress.epoch = 1
    if trainer.progress.iter <= trainer.progress.max_iter: iterate(trainer, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3), max_leaves=6)
entries = st.dictionaries(
    st.sampled_from(["cfg", "classes", "acc1", "kind", "step", "loss", "model", "lr"]),
    json_values | st.sampled_from(["train", "eval", "seed: 1", "[1]", {"acc1": 90.0}, 3]), max_size=4)
texts = st.one_of(entries.map(json.dumps), json_values.map(json.dumps), st.text(),
                  st.sampled_from(["[" * 10**5, "9" * 5000, "{"]))


def header(kind, data, folder):
    "The header of a file of weights."
    save_file({"x": torch.zeros(1)}, folder / "weights.safetensors", {"tritoncls": data.draw(texts)})
    try: class_names(folder / "weights.safetensors", weights_config(folder / "weights.safetensors").num_classes)
    except UserError as error: refused(error)


def log(kind, data, folder):
    "Lines of a log."
    lines = [*data.draw(st.lists(texts, max_size=5)), json.dumps({"kind": "train", "step": 10**6, "loss": 1.0})]
    (folder / "log.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    train, tests = (read_log(folder / "log.jsonl", kind) for kind in ("train", "eval"))
    assert train and all(r[name] is None or math.isfinite(r[name]) for r in train for name in r if name != "kind")
    assert all(math.isfinite(part["acc1"] or 0) for r in tests for part in r.values() if isinstance(part, dict))


KINDS = {**dict.fromkeys(VALUES, value), "checkpoint": checkpoint, "header": header, "log": log}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_odd_values_are_used_or_refused_with_a_short_message(kind, data, tmp_path):
    torch.set_num_threads(1)
    KINDS[kind](kind, data, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_1200_odd_values_are_used_or_refused_with_a_short_message(kind, data, tmp_path):
    torch.set_num_threads(1)
    KINDS[kind](kind, data, tmp_path)
