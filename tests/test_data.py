"Loaders from outside: worker processes, several ranks, broken files, kills, folders that are not what they should be."
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import timeit
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

from tritoncls.augment import train_transform
from tritoncls.config import load_config
from tritoncls.data import (
    ImageFiles, Keys, Loader, UnreadableImage, build_dataloaders, cifar_data, digits_data, folder_data, listed, read_image)
from tritoncls.runtime import UserError

RGB = ["preprocess.img_mean=[1, 2, 3]", "preprocess.img_std=[1, 1, 1]"]
SMALL = [*RGB, "preprocess.img_size=16", "test.img_size=16", "batch_size=4", "num_classes=3",
         "augments.name=SimpleAugment"]
NAMES = ("ant", "bee", "cat")
PER_CLASS = 6


def write_pictures(folder: Path, names=NAMES, n=PER_CLASS) -> Path:
    "A folder per class with real files, every other one a JPEG."
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((30 + i, 24))
            image.save(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "train/ with one truncated JPEG and one empty PNG, val/ whole."
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "val"): write_pictures(root / part)
    jpeg = root / "train" / "bee" / "1.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (root / "train" / "cat" / "4.png").write_bytes(b"")
    return root


def config(*overrides, root=None, name="FolderLoader"):
    paths = [f"data.train_path={root}/train", f"data.val_path={root}/val"] if root else []
    return load_config(overrides=[f"data.name={name}", *paths, *SMALL, *overrides])


def batches(loader, epoch=1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


class Numbered(Dataset):
    "Image i is a pixel, its target is i."
    def __init__(self, n, broken=()): self.n, self.broken = n, frozenset(broken)
    def __len__(self): return self.n
    def __getitem__(self, index):
        if index in self.broken: raise UnreadableImage(f"{index}.png", "broken on purpose")
        return torch.zeros(1, 1, 1, dtype=torch.uint8), index


def same(image): return image


def numbered(n, batch_size, train, rank=0, world_size=1, broken=(), **options):
    return Loader(Numbered(n, broken), same, Keys(n, batch_size, 3, train, rank, world_size), **options)


def indices(loader) -> list[list[int]]: return [target.tolist() for _, target in loader]


# Order and ranks

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(1, 1000))
@pytest.mark.timeout(30)
def test_ranks_share_the_data_set(n, batch_size, world_size, seed, epoch):
    def parts(train): return [Keys(n, batch_size, seed, train, rank, world_size, epoch) for rank in range(world_size)]
    test = [np.concatenate([np.zeros((0, 2), int), *keys])[:, 0].tolist() for keys in parts(train=False)]
    assert test == [list(range(rank, n, world_size)) for rank in range(world_size)]
    assert [keys.count for keys in parts(train=False)] == list(map(len, test))
    assert [len(keys) for keys in parts(train=False)] == [len(list(keys)) for keys in parts(train=False)]

    if n < batch_size * world_size:
        with pytest.raises(UserError, match=f"only {n} training images"): parts(train=True)
        return
    train = [list(keys) for keys in parts(train=True)]
    assert {len(each) for each in train} == {len(keys) for keys in parts(train=True)} == {n // (batch_size * world_size)}
    assert {len(batch) for each in train for batch in each} == {batch_size}
    seen = [index for each in train for batch in each for index in batch[:, 0].tolist()]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(n)) and n - len(seen) < batch_size * world_size
    assert sum(keys.count for keys in parts(train=True)) == len(seen)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_loaders_of_all_ranks_cover_the_data_set(world_size):
    test = [sum(indices(numbered(23, 3, False, rank, world_size)), []) for rank in range(world_size)]
    assert sorted(sum(test, [])) == list(range(23)) and test[0] == list(range(0, 23, world_size))
    train = [indices(numbered(24, 2, True, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(sum(train, []), [])) == list(range(24)) and {len(each) for each in train} == {12 // world_size}
    one = indices(numbered(24, 2 * world_size, True))
    assert [set(batch) for batch in one] == [set(sum(together, [])) for together in zip(*train, strict=True)]


def test_a_rank_without_test_images_has_an_empty_part():
    loader = numbered(2, 2, False, rank=3, world_size=4, num_workers=1)
    assert loader.count == len(loader) == len(list(loader)) == 0


# The same batches, whatever the workers

@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:cannot read")
def test_batches_do_not_depend_on_workers_or_history(pictures):
    alone, _ = build_dataloaders(config("data.num_workers=0", root=pictures))
    reference = {epoch: batches(alone, epoch) for epoch in (1, 2, 3)}
    assert not equal(reference[1], reference[2])
    for num_workers in (1, 2):
        train, test = build_dataloaders(config(f"data.num_workers={num_workers}", root=pictures))
        assert equal(batches(train, 3), reference[3])
        train.set_epoch(2)
        next(iter(train))                                               # left in the middle
        assert equal(batches(train, 1), reference[1]) and equal(batches(train, 2), reference[2])
        assert sorted(train.skipped) == sorted(alone.skipped)
        assert equal(batches(test), batches(build_dataloaders(config("data.num_workers=0", root=pictures))[1]))


def test_augmentation_is_torchvisions_under_the_samples_seed():
    cfg = load_config()
    train, _ = build_dataloaders(cfg)
    data, transform = digits_data(cfg).train, train_transform(cfg)
    keys, (images, target) = next(iter(Keys(len(data), cfg.batch_size, cfg.seed, True))), next(iter(train))
    for (index, seed), image, label in zip(keys.tolist(), images, target, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(transform(data[index][0]), image) and data[index][1] == label


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_stay_where_they_are(num_workers):
    train, test = build_dataloaders(load_config(overrides=[f"data.num_workers={num_workers}", "batch_size=256"]))
    torch.manual_seed(7)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    for loader in (train, test):
        for _ in loader: assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)


class Threads(Numbered):
    "The target is the number of threads of the process that reads."
    def __getitem__(self, index): return super().__getitem__(index)[0], torch.get_num_threads()


@pytest.mark.timeout(30)
def test_workers_use_one_thread():
    loader = Loader(Threads(4), same, Keys(4, 2, 1, False), num_workers=2)
    assert indices(loader) == [[1, 1], [1, 1]]


@pytest.mark.timeout(30)
def test_loaders_can_be_sent_to_a_process_that_was_not_forked(pictures):
    for cfg in (config(root=pictures), config(name="FakeData"), load_config()):
        for loader in build_dataloaders(cfg):
            there, key = pickle.loads(pickle.dumps(loader._batches)), next(iter(loader.keys))
            assert torch.equal(there[key].images, loader._batches[key].images)


# Broken files

@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_reported_once_and_replaced(pictures, num_workers):
    cfg = config(f"data.num_workers={num_workers}", "batch_size=9", root=pictures)
    train, _ = build_dataloaders(cfg)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        epochs = [batches(train, epoch) for epoch in (1, 2, 3)]
    broken = {str(pictures / "train" / "bee" / "1.jpg"), str(pictures / "train" / "cat" / "4.png")}
    said = [str(w.message) for w in caught if "cannot read" in str(w.message)]
    assert set(train.skipped) == broken and len(train.skipped) == len(said) == 2
    assert all(any(path in line for line in said) for path in broken)
    assert all(images.shape == (9, 3, 16, 16) for epoch in epochs for images, _ in epoch)
    # bee/1 and cat/4 give way to bee/2 and cat/5: each class keeps its six
    assert all(torch.cat([target for _, target in epoch]).bincount().tolist() == [6, 6, 6] for epoch in epochs)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_missing_in_evaluation(pictures, num_workers):
    test = numbered(20, 4, False, broken={1, 2, 8, 9, 10, 11, 19}, num_workers=num_workers)
    for _ in range(2): assert indices(test) == [[0, 3], [4, 5, 6, 7], [12, 13, 14, 15], [16, 17, 18]]
    assert len(test.skipped) == 7 and test.count == 20 and len(test) == 5
    swapped = load_config(overrides=["data.name=FolderLoader", f"data.train_path={pictures}/val",
                                     f"data.val_path={pictures}/train", *SMALL])
    _, test = build_dataloaders(swapped)
    target = torch.cat([target for _, target in test])
    assert target.tolist() == [0] * 6 + [1] * 5 + [2] * 5 and len(test.skipped) == 2


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_but_broken_files_is_an_error(train, num_workers):
    with pytest.raises(UserError, match="^none of the 12 images can be read; .*broken on purpose"):
        list(numbered(12, 3, train, broken=range(12), num_workers=num_workers))


@pytest.mark.filterwarnings("ignore:cannot read")
def test_a_rank_with_nothing_but_broken_files_is_no_error():
    assert indices(numbered(6, 2, False, rank=1, world_size=2, broken={1, 3, 5})) == []


# Processes that die, data sets with mistakes

KILLED = """
import json, multiprocessing, os, random, signal, sys, threading, time
from tritoncls.config import load_config
from tritoncls.data import WorkerDied, build_dataloaders

rng, said = random.Random(int(sys.argv[1])), []
cfg = load_config(overrides=["data.name=FakeData", "data.length=20000", "data.num_workers=2", "batch_size=8",
                             "preprocess.img_size=16", "test.img_size=16"])
for turn in range(int(sys.argv[2])):
    batches = iter(build_dataloaders(cfg)[turn % 2])
    next(batches)
    worker, other = multiprocessing.active_children()
    threading.Timer(rng.uniform(0, 0.1), os.kill, [worker.pid, signal.SIGKILL]).start()
    try:
        for _ in batches: sum(range(rng.choice([0, 1000, 100_000])))  # the death falls into a wait, or between two
    except WorkerDied as error: text = str(error)
    said.append([worker.pid, other.pid, text])
    del batches
print(json.dumps(said))
"""


PINNED = """
import torch
from torch.utils.data._utils import pin_memory
# A machine that seems to have a GPU: a thread takes the batches from the workers, and leaves them where they are.
torch.cuda.is_available = torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = torch.accelerator.set_device_index = lambda *_: None
torch.accelerator.current_device_index = lambda: 0
pin_memory.pin_memory = lambda data, device=None: data
"""


def killed(seed: int, turns: int, before: str = "") -> None:
    "Kill a worker again and again; each time there is the same error, and nothing else."
    done = subprocess.run([sys.executable, "-c", before + KILLED, str(seed), str(turns)], capture_output=True, text=True,
                          timeout=60 + 5 * turns)
    assert (done.returncode, done.stderr) == (0, "")
    for worker, other, text in (said := json.loads(done.stdout)):
        assert text == f"a process that reads images (pid {worker}) was killed by signal 9 (Killed)"
        for pid in (worker, other):
            with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    assert len(said) == turns


@pytest.mark.timeout(150)
def test_a_killed_worker_is_the_same_error_whenever_it_dies(): killed(0, 5)


@pytest.mark.timeout(150)
def test_a_killed_worker_is_the_same_error_where_a_thread_takes_its_batches(): killed(0, 5, PINNED)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("before", ["", PINNED], ids=["", "pinned"])
def test_a_worker_killed_a_hundred_times_is_a_hundred_times_the_same_error(before): killed(1, 100, before)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("begun", [False, True])
def test_workers_end_with_their_loader_even_in_a_reference_cycle(begun):
    before = set(multiprocessing.active_children())
    cycle = {"loader": numbered(100, 2, True, num_workers=2)}
    cycle["itself"], cycle["batches"] = cycle, iter(cycle["loader"])
    assert len(list(cycle["batches"])) == 50
    if begun: next(cycle.setdefault("again", iter(cycle["loader"])))
    assert len(set(multiprocessing.active_children()) - before) == 2
    began = time.monotonic()
    del cycle
    gc.collect()
    assert time.monotonic() - began < 4 and not set(multiprocessing.active_children()) - before


class Faulty(Numbered):
    def __getitem__(self, index): raise ZeroDivisionError("a mistake in the data set")


class Floats(Numbered):
    def __getitem__(self, index): return torch.zeros(3, 8, 8), 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_faulty_data_set_is_an_error_that_says_what(num_workers):
    with pytest.raises(ZeroDivisionError, match="a mistake in the data set"):
        list(Loader(Faulty(4), same, Keys(4, 2, 1, False), num_workers=num_workers))
    with pytest.raises(UserError, match=r"^a data set needs to give uint8 .*, not torch.float32 \(3, 8, 8\)$"):
        list(Loader(Floats(4), same, Keys(4, 2, 1, True), num_workers=num_workers))


# Folders

def test_a_folder_of_pictures(pictures):
    splits = folder_data(config(root=pictures))
    assert splits.classes == NAMES and isinstance(splits.train, ImageFiles)
    assert (len(splits.train), len(splits.test)) == (18, 18)
    theirs = datasets.ImageFolder(pictures / "val")
    for (image, target), (pil, label) in zip((splits.test[i] for i in range(18)), theirs, strict=True):
        assert target == label and np.array_equal(image.permute(1, 2, 0), pil)


def mistakes(root):
    (root / "file").write_text("")
    (root / "empty").mkdir()
    (root / "no_images" / "ant").mkdir(parents=True)
    for name, classes in {"three": "abc", "other": "abd", "many": map(str, range(30))}.items():
        write_pictures(root / name, classes, n=1)
    three = f"data.train_path={root}/three"
    return {
        (): ["data.train_path is not set", "FolderLoader needs a folder with images, a folder per class"],
        (three,): ["data.val_path is not set"],
        (three, f"data.val_path={root}/absent"): ["data.val_path", f"there is no folder {root}/absent"],
        (f"data.train_path={root}/file",): [f"data.train_path = '{root}/file'", "a file, not a folder"],
        (f"data.train_path={root}/empty",): ["data.train_path", "find any class folder", f"{root}/empty"],
        (three, f"data.val_path={root}/no_images"): ["data.val_path", "no valid file for the classes ant"],
        (three, f"data.val_path={root}/other"): ["same classes", "three alone has c;", "other alone has d"],
        (three, f"data.val_path={root}/many"): ["alone has a, b, c;", "alone has 0, 1, 10, ", " and 20 more"],
        (three, f"data.val_path={root}/three", "num_classes=10"): ["num_classes = 10", "3 classes"],
        (three, f"data.val_path={root}/three"): ["batch_size = 4", "only 3 training images"]}


def test_a_wrong_folder_is_an_error_that_says_what(tmp_path):
    for overrides, parts in mistakes(tmp_path).items():
        with pytest.raises(UserError) as caught: build_dataloaders(config(*overrides))
        for part in parts: assert part in str(caught.value)


def names(files): return sorted((Path(path).name, label) for path, label in files)


def test_links_without_loops_are_what_torchvision_makes_of_them(pictures, tmp_path):
    "A data set of links: a class, a folder in a class, and single files lead elsewhere."
    val = pictures / "val"
    (tmp_path / "ant" / "deep").mkdir(parents=True)
    (tmp_path / "bee").symlink_to(val / "bee")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "all").symlink_to(val / "cat")
    for file in (val / "ant").iterdir(): (tmp_path / "ant" / "deep" / file.name).symlink_to(file)
    (tmp_path / "list.txt").write_text("not an image")
    found, theirs = listed(tmp_path), datasets.ImageFolder(tmp_path)
    assert (found.files, found.classes, found.left_out) == (theirs.samples, theirs.classes, {})


@pytest.mark.timeout(30)
def test_each_image_is_listed_once_however_many_links_lead_to_it(tmp_path):
    "Two loops together, which a walk that follows links never leaves; links up, across, to listed files; hard links are files."
    root = write_pictures(tmp_path / "real" / "train")
    write_pictures(tmp_path / "real" / "val")
    before = datasets.ImageFolder(root).samples
    links = {"ant/loop": ".", "bee/loop": "../bee", "ant/up": "..", "ant/far up": "../../..", "cat/0 copy.png": "0.png",
             "ant/a bee.png": "../bee/0.png", "bee/ants": "../ant", "cat/broken.png": "gone.png", "cat/self.png": "self.png"}
    for name, target in links.items(): (root / name).symlink_to(target)
    for name, target in {"zebra": "cat", "yak": "nowhere"}.items(): (tmp_path / "real" / "val" / name).symlink_to(target)
    found = listed(root)
    assert found.files == before and set(found.left_out) == {str(root / name) for name in links}

    os.link(root / "cat" / "0.png", root / "cat" / "hard.png")
    (tmp_path / "train").symlink_to(root)  # the folder itself may be a link, and its paths are as given
    found = listed(tmp_path / "train")
    assert names(found.files) == names([*before, ("hard.png", 2)])
    assert found.files[0][0].startswith(str(tmp_path / "train" / "ant"))

    with pytest.raises(FileNotFoundError, match=r"no valid file for the classes zebra.*cat is listed already"):
        listed(tmp_path / "real" / "val")
    (tmp_path / "real" / "val" / "zebra").unlink()
    assert list(listed(tmp_path / "real" / "val").left_out) == [str(tmp_path / "real" / "val" / "yak")]


@pytest.mark.timeout(30)
def test_a_file_wins_over_a_link_to_it_and_the_first_of_many_links_over_the_others(tmp_path):
    root = write_pictures(tmp_path / "train", n=1)
    store = write_pictures(tmp_path / "store", ("x", "y"), n=2)
    (root / "ant" / "0 link.png").symlink_to(root / "cat" / "0.png")
    for name in ("bee", "cat"):
        (root / name / "both").symlink_to(store)
        (root / name / "1.jpg").symlink_to(store / "x" / "1.jpg")
    found = listed(root)
    assert names(found.files) == [("0.png", 0), *[("0.png", 1)] * 3, ("0.png", 2), *[("1.jpg", 1)] * 2]
    assert len(found.left_out) == 4


@pytest.mark.timeout(30)
def test_what_is_no_file_is_left_out_and_named(tmp_path):
    for part in ("train", "val"): write_pictures(tmp_path / part, n=2)
    odd = tmp_path / "train" / "ant"
    os.mkfifo(odd / "fifo.png")
    os.mkfifo(odd / "no image")
    with socket.socket(socket.AF_UNIX) as s, chdir(odd): s.bind("socket.jpg")
    (odd / "null.png").symlink_to("/dev/null")
    (odd / "locked.png").symlink_to("fifo.png")
    with pytest.warns(UserWarning) as caught: train, test = build_dataloaders(config(root=tmp_path))
    said = [str(w.message) for w in caught]
    assert len(said) == 1 and said[0].startswith(f"data.train_path = '{tmp_path}/train': left out ") and not train.skipped
    for name, kind in {"fifo.png": "a fifo", "no image": "a fifo", "socket.jpg": "a socket", "null.png": "a device",
                       "locked.png": "a fifo"}.items(): assert f"{odd / name} ({kind})" in said[0]
    assert len(train.data) == 6 and len(list(train)) == 1
    for name in ("fifo.png", "socket.jpg", "null.png", ".", "absent.png"):
        with pytest.raises(UnreadableImage): read_image(odd / name)


@pytest.mark.timeout(60)
def test_ten_thousand_files_are_listed_as_fast_as_torchvision_does(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        for i in range(3334): (tmp_path / name / f"{i}.jpg").touch()

    def fastest(function): return min(timeit.repeat(lambda: function(tmp_path), number=1, repeat=5))
    assert listed(tmp_path).files == datasets.ImageFolder(tmp_path).samples
    assert fastest(listed) < 3 * fastest(datasets.ImageFolder) + 0.05


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(num_workers, tmp_path):
    "Pillow itself would warn of the first, raise DecompressionBombError for the second, and decode both if it could."
    for part in ("train", "val"): write_pictures(tmp_path / part, n=2)
    for name, size in {"a.png": (10_001, 10_000), "b.png": (65_000, 65_000)}.items():
        (tmp_path / "train" / "bee" / name).write_bytes(png_header(*size))
    train, _ = build_dataloaders(config(f"data.num_workers={num_workers}", "batch_size=8", root=tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [len(target) for _, target in train] == [8]
    said = sorted(str(w.message) for w in caught)
    assert len(said) == 2 and all("pixels are more than data.max_megapixels = 100 allows" in line for line in said)
    assert "a.png" in said[0] and "10001 x 10000" in said[0] and "b.png" in said[1] and "65000 x 65000" in said[1]
    small = build_dataloaders(config("data.max_megapixels=0.0007", "batch_size=1", root=tmp_path))[1]  # 30 x 24 is more
    with pytest.warns(UserWarning, match="data.max_megapixels = 0.0007"), pytest.raises(UserError, match="none of the 6"):
        list(small)


def png_header(width: int, height: int) -> bytes:
    "A grey PNG that promises pixels and has none."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pillows_own_limit_comes_back_when_the_last_of_many_threads_has_read(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with ThreadPoolExecutor(8) as pool: shapes = list(pool.map(lambda _: read_image(tmp_path / "image.png").shape, range(200)))
    assert set(shapes) == {(3, 30, 40)} and Image.MAX_IMAGE_PIXELS == 100


# CIFAR

def write_cifar(root: Path, kind, label: str, rows: int) -> list[str]:
    "Files laid out as CIFAR's, with random images; the class is made to expect their checksums."
    rng, sums = np.random.default_rng(0), {}
    folder = root / kind.base_folder
    folder.mkdir()
    for name, _ in [*kind.train_list, *kind.test_list]:
        content = {"data": rng.integers(0, 256, (rows, 3072), np.uint8), label: rng.integers(0, 10, rows).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class{i}" for i in range(100 if "fine" in label else 10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for path in folder.iterdir(): sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize("num_classes, label", [(10, "labels"), (100, "fine_labels")])
def test_cifar_is_read_from_its_files(num_classes, label, tmp_path, monkeypatch):
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    overrides = [f"num_classes={num_classes}", f"data.train_path={tmp_path}"]
    with pytest.raises(UserError) as caught: cifar_data(config(*overrides, name="Cifar"))
    for name, _ in [*kind.train_list, *kind.test_list]: assert name in str(caught.value)
    assert kind.url in str(caught.value) and f"{tmp_path}/{kind.base_folder}" in str(caught.value)

    sums = write_cifar(tmp_path, kind, label, rows=20)
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, sums[name]] for name, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    train, test, classes = cifar_data(config(*overrides, name="Cifar"))
    assert len(train) == 20 * len(kind.train_list) and len(test) == 20 and classes[3] == "class3"
    raw = pickle.loads((tmp_path / kind.base_folder / kind.test_list[0][0]).read_bytes())
    image, target = test[7]
    assert image.shape == (3, 32, 32) and image.flatten().tolist() == raw["data"][7].tolist() and target == raw[label][7]
    assert next(iter(build_dataloaders(config(*overrides, name="Cifar"))[0]))[0].shape == (4, 3, 16, 16)

    damaged = tmp_path / kind.base_folder / kind.test_list[0][0]
    damaged.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=f"{damaged.name} missing or damaged"): cifar_data(config(*overrides, name="Cifar"))
