"Whatever a configuration says, it either trains or is refused with a message."
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritoncls.cli import build_trainer
from tritoncls.config import Section, dotted_keys, load_config
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


def try_out(overrides, folder):
    "One iteration, or a message."
    small = ["model.args={channels: 1, widths: [4]}", "data.length=64", f"output_dir={folder}", "solver.max_epoch=1"]
    try:
        trainer = build_trainer(load_config(overrides=[*small, *overrides]))
        trainer.progress.max_iter = len(trainer.dataloader)
        trainer.before_epoch()
        trainer.train_one_iter()
    except UserError as error: assert len(str(error)) > 10
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
