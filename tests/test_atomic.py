"""Saving is atomic: killed at any moment or out of space, a folder holds the old checkpoint whole or the new one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saving_worker import FORMATS, empty, model

import fewbits
from fewbits import atomic
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import CheckpointError, SaveError
from models import same_tensors

OLD, NEW, NEXT = FORMATS
LAYOUTS: dict[str, tuple[str, bool]] = {
    "single": ("10GB", True),
    "shards": ("4KB", True),
    "pickle": ("10GB", False),
    "pickles": ("4KB", False),
}


class Worker:
    """See saving_worker.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("saving_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(fewbits.__file__).parents[1])},
        )

    def save(self, folder: Path, layout: str, **command: Any) -> Any:
        """Save the model NEW in another process; how that ended."""
        limit, safe = LAYOUTS[layout]
        command = {"folder": str(folder), "seed": NEW, "limit": limit, "safe": safe} | command
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def which(folder: Path) -> int:
    """The model that a folder holds, all of it, by what fewbits loads from it."""
    seed = open_checkpoint(folder).tensors["3.weight"].shape[-1] // 32 - 1
    assert same_tensors(fewbits.load(empty(seed), folder).state_dict(), model(seed).state_dict())
    return seed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_old(folder: Path, layout: str) -> None:
    """A folder with the checkpoint OLD and files of other kinds."""
    (folder / "nested").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "nested" / "notes.txt").write_text("notes")
    if layout == "lone":
        torch.save(model(OLD).state_dict(), folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps({"seed": OLD}))
    else:
        limit, safe = LAYOUTS[layout]
        fewbits.save(model(OLD), folder, max_shard_size=limit, safe_serialization=safe)
        assert bool(list(folder.glob("*.index.json"))) == (limit == "4KB")


def check_after_kill(folder: Path, *, exchanged: bool) -> int:
    """What a killed saver left: one whole checkpoint, and nothing that hinders the next save."""
    found = which(folder)
    assert found in (OLD, NEW)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "nested" / "notes.txt").read_text() == "notes"
    if exchanged:
        assert json.loads((folder / "config.json").read_text())["seed"] == found
    with pytest.MonkeyPatch.context() as patch:
        if not exchanged:
            patch.setattr(atomic, "exchange", lambda first, second: False)
        fewbits.save(model(NEXT), folder, max_shard_size="4KB")
    assert which(folder) == NEXT
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    named = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {"config.json", "tokenizer.json", "nested", "weights.pt", "model.safetensors.index.json"}
    assert {p.name for p in folder.iterdir()} - others == set(named["weight_map"].values())
    return found


MOVES = [
    ("single", "shards", True),
    ("shards", "single", True),
    ("shards", "pickles", True),
    ("lone", "shards", True),
    ("single", "single", False),
    ("single", "shards", False),
    ("shards", "shards", False),
    ("shards", "pickles", False),
    ("pickles", "single", False),
    ("pickle", "shards", False),
    ("lone", "shards", False),
]


def name_of(value: object) -> str:
    return {True: "exchanged", False: "moved"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def kill_before(worker: Worker, folder: Path, old: str, new: str, exchanged: bool, number: int) -> int | None:
    """What is left when a saver is killed before its ``number``-th change to the disk; ``None`` if it made fewer."""
    shutil.copytree(folder / "old", folder / str(number) / "model")
    ended = worker.save(folder / str(number) / "model", new, kill_before=number, fallback=not exchanged)
    if "changes" in ended:
        assert len(ended["changes"]) == number
        return None
    assert ended == {"signal": signal.SIGKILL}
    return check_after_kill(folder / str(number) / "model", exchanged=exchanged)


@pytest.mark.parametrize(("old", "new", "exchanged"), MOVES, ids=name_of)
def test_killed_before_each_change_of_names(
    tmp_path: Path, worker: Worker, old: str, new: str, exchanged: bool
) -> None:
    """Kill it before every change from the first one in the target on, and while it still writes only now and then."""
    make_old(tmp_path / "old", old)
    shutil.copytree(tmp_path / "old", tmp_path / "trial" / "model")
    changes = worker.save(tmp_path / "trial" / "model", new, fallback=not exchanged)["changes"]
    assert which(tmp_path / "trial" / "model") == NEW
    telling = [i for i, change in enumerate(changes) if change in ("os.rename", "os.link")]
    numbers = [*range(0, telling[0], 5), *range(telling[0], min(telling[-1] + 4, len(changes)))]
    found = [kill_before(worker, tmp_path, old, new, exchanged, number) for number in numbers]
    assert found == sorted(found, key=(OLD, NEW).index)  # OLD up to one moment, NEW from then on
    assert set(found) == {OLD, NEW}


@pytest.mark.slow
@pytest.mark.parametrize("exchanged", [True, False], ids=name_of)
@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("old", [*LAYOUTS, "lone"])
def test_killed_before_every_change_to_the_disk(
    tmp_path: Path, worker: Worker, old: str, new: str, exchanged: bool
) -> None:
    make_old(tmp_path / "old", old)
    found: list[int] = []
    for number in range(1000):
        left = kill_before(worker, tmp_path, old, new, exchanged, number)
        if left is None:
            break
        found.append(left)
        shutil.rmtree(tmp_path / str(number))
    assert found == sorted(found, key=(OLD, NEW).index)
    assert set(found) == {OLD, NEW}


def kill_at_random(tmp_path: Path, worker: Worker, trials: int, exchanged: bool, seed: int) -> None:
    choose = random.Random(seed)
    layouts = list(LAYOUTS)
    make_old(tmp_path / "warm" / "model", "shards")
    start = time.perf_counter()
    worker.save(tmp_path / "warm" / "model", "shards", fallback=not exchanged)
    duration = time.perf_counter() - start
    found = []
    for number in range(trials):
        # without an exchange the kinds of layout that begin with one file are in the tests above
        old, new = choose.choice(layouts if exchanged else ["shards", "pickles"]), choose.choice(layouts)
        folder = tmp_path / str(number) / "model"
        make_old(folder, old)
        delay = choose.uniform(0, 1.1 * duration)
        ended = worker.save(folder, new, kill_after=delay, fallback=not exchanged)
        assert "error" not in ended
        found.append(check_after_kill(folder, exchanged=exchanged))
        if "changes" in ended:  # it was done before it was killed
            assert found[-1] == NEW
        shutil.rmtree(folder.parent)
    assert OLD in found  # some were killed in time


@pytest.mark.parametrize("exchanged", [True, False], ids=name_of)
def test_killed_at_random(tmp_path: Path, worker: Worker, exchanged: bool) -> None:
    kill_at_random(tmp_path, worker, 15, exchanged, seed=exchanged)


@pytest.mark.slow
@pytest.mark.parametrize("exchanged", [True, False], ids=name_of)
@pytest.mark.parametrize("seed", range(100, 105))
def test_killed_at_random_many_times(tmp_path: Path, worker: Worker, exchanged: bool, seed: int) -> None:
    kill_at_random(tmp_path, worker, 100, exchanged, seed=seed)


# ------------------------------------------------------------------------------------------- no space


@pytest.mark.parametrize("exchanged", [True, False], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_cannot_grow(tmp_path: Path, worker: Worker, layout: str, exchanged: bool) -> None:
    make_old(tmp_path / "model", "shards")
    before = contents(tmp_path)
    for size in (0, 100, 3_000):
        ended = worker.save(tmp_path / "model", layout, file_size=size, fallback=not exchanged)
        assert ended.get("error") == "SaveError", ended
        assert str(tmp_path / "model") in ended["message"]
        assert "File too large" in ended["message"]
        assert contents(tmp_path) == before
    assert which(tmp_path / "model") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "disk"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", point], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a file system needs rights that are not given here: {done.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["", "model"], ids=["mount point", "folder"])
def test_a_full_disk(small_disk: Path, layout: str, where: str) -> None:
    folder = small_disk / where
    limit, safe = LAYOUTS[layout]
    fewbits.save(model(OLD), folder)
    (small_disk / "notes.txt").write_text("notes")
    ballast = os.open(small_disk / "ballast", os.O_CREAT | os.O_WRONLY)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    assert os.write(ballast, bytes(free - 8192)) == free - 8192  # leaves too little for the next one
    os.close(ballast)
    before = contents(small_disk)
    with pytest.raises(SaveError, match="No space left") as caught:
        fewbits.save(model(NEW), folder, max_shard_size=limit, safe_serialization=safe)
    assert caught.value.file == str(folder)
    assert contents(small_disk) == before
    assert which(folder) == OLD
    (small_disk / "ballast").unlink()
    fewbits.save(model(NEW), folder, max_shard_size=limit, safe_serialization=safe)
    assert which(folder) == NEW
    assert (small_disk / "notes.txt").read_text() == "notes"


# ------------------------------------------------------------------------------------------- others at the same time


@pytest.mark.parametrize("new", ["single", "shards", "pickles"])
def test_a_reader_sees_one_checkpoint_whole(tmp_path: Path, new: str) -> None:
    """A reader that falls between two checkpoints may be refused; what it gets is one of them."""
    folder = tmp_path / "model"
    limit, safe = LAYOUTS[new]
    # of the same shapes, so that parts of one would pass for parts of the other
    torch.manual_seed(7)
    other = fewbits.quantize(empty(NEW), FORMATS[NEW])
    truth = [model(NEW).state_dict(), other.state_dict()]
    fewbits.save(other, folder, max_shard_size=limit, safe_serialization=safe)
    seen, wrong, stop = [0, 0], [], threading.Event()
    refused = 0

    def read() -> None:
        nonlocal refused
        while not stop.is_set():
            try:
                state = fewbits.load(empty(NEW), folder).state_dict()
            except CheckpointError:
                refused += 1
                continue
            matching = [i for i, t in enumerate(truth) if same_tensors(state, t)]
            if len(matching) == 1:
                seen[matching[0]] += 1
            else:
                wrong.append(state)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(30):
            fewbits.save((model(NEW), other)[number % 2], folder, max_shard_size=limit, safe_serialization=safe)
    finally:
        stop.set()
        reader.join()
    assert not wrong
    assert all(seen)


def test_savers_at_the_same_time_leave_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_old(folder, "shards")
    errors: list[Exception] = []

    def save(seed: int) -> None:
        try:
            for limit in ("4KB", "10GB", "2KB"):
                fewbits.save(model(seed), folder, max_shard_size=limit)
        except Exception as error:
            errors.append(error)

    savers = [threading.Thread(target=save, args=(seed,)) for seed in FORMATS]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert not errors
    assert json.loads((folder / "config.json").read_text())["seed"] == which(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_living_saver_is_left_alone(tmp_path: Path) -> None:
    make_old(tmp_path / "model", "shards")
    with atomic.replacing(tmp_path / "model") as (staging, _):
        fewbits.save(model(OLD), tmp_path / "model")
        assert staging.is_dir()
        fewbits.save(model(NEW), tmp_path / "other")
        shutil.copytree(tmp_path / "other", staging, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "other")
    assert which(tmp_path / "model") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_error_while_saving_leaves_nothing(tmp_path: Path) -> None:
    make_old(tmp_path / "model", "shards")
    before = contents(tmp_path)

    def interrupted() -> None:
        with atomic.replacing(tmp_path / "model") as (staging, _):
            (staging / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folders_of_other_names_are_not_taken_for_stale(tmp_path: Path) -> None:
    for name in (".model.fewbit-x", ".model2.fewbits-x", "model.fewbits-x", ".xmodel.fewbits-y"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.fewbits-left-behind").mkdir()
    fewbits.save(model(OLD), tmp_path / "model")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {".model.fewbit-x", ".model2.fewbits-x", "model.fewbits-x", ".xmodel.fewbits-y", "model"}
