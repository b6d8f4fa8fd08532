"""Replacing a folder's checkpoint as one step: whoever looks sees all of the old one or all of the new one.

The new files are written to a staging folder beside the target. Where the target is a plain folder, staging takes in
its other files (by hard link) and the two folders change places in one system call (``renameat2`` with
``RENAME_EXCHANGE`` on Linux, ``renamex_np`` with ``RENAME_SWAP`` on macOS). Where that is impossible (a mount point,
the working directory, a file system without it), the files move in one by one: shards under names nobody has, then the
index that makes them a checkpoint, in one rename; only then do the old ones go. A folder then never holds two
checkpoints without saying which is meant: an old index first takes the new one's name, which is then replaced, and an
index that comes to stand beside an old single file names that file under ``metadata.replaces`` until it is gone.

A saver holds a lock on its staging folder. Locks end with their process, so what is not locked was left by one that
was killed. (A process id in the name would not tell: in a container the next process often has the same one.)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fewbits.errors import FewbitsError, SaveError

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is locked, and nothing is taken for left behind
    fcntl = None  # type: ignore[assignment]

_STAGING = ".{name}.fewbits-"
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_INDEXES = tuple(f"{name}.index.json" for name in _SINGLES)
# the names that transformers, Accelerate and fewbits write weights under; these are replaced together. Everything else
# is kept: a "model.pt" or "model-best.safetensors" may be the only copy of something.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\w{8})?-\d{5}-of-\d{5}\.(safetensors|bin)")
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # <fcntl.h>, <linux/fs.h>, <sys/stdio.h>


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change places atomically; ``False`` where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(first), os.fsencode(second), _RENAME_SWAP) == 0  # type: ignore[unreachable,no-any-return,unused-ignore]
        done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    except (OSError, AttributeError):  # no such function in this libc
        return False
    return int(done) == 0


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint and goes with it."""
    return name in _SINGLES or name in _INDEXES or _WEIGHTS.fullmatch(name) is not None


def _can_exchange(target: Path) -> bool:
    """Whether the folder can change places: it is no mount point or working directory, and the file system can."""
    if os.path.ismount(target) or target == Path.cwd() or target in Path.cwd().parents:
        return False
    with tempfile.TemporaryDirectory(prefix=_STAGING.format(name=target.name), dir=target.parent) as d:
        probes = Path(d, "a"), Path(d, "b")
        for probe in probes:
            probe.mkdir()
        return exchange(*probes)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_tree(source: Path, target: Path, skip: Callable[[str], bool] = lambda name: False) -> None:
    for entry in os.scandir(source):
        place = target / entry.name
        if skip(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            place.mkdir(exist_ok=True)
            _link_tree(Path(entry.path), place)
            shutil.copystat(entry.path, place)
        elif os.path.lexists(place):
            continue
        elif entry.is_symlink():
            place.symlink_to(Path(entry.path).readlink())
        else:
            try:
                os.link(entry.path, place)
            except OSError:  # a file system without hard links
                shutil.copy2(entry.path, place)


def _lock(folder: Path) -> int | None:
    """A handle that holds the lock on a folder until it is closed; ``None`` where another holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(handle)
        return None
    return handle


def _remove_stale(target: Path) -> None:
    """Delete staging folders that killed savers left for this target."""
    for folder in (target.parent, target):
        if fcntl is None or not folder.is_dir():
            continue
        for entry in folder.iterdir():
            if entry.name.startswith(_STAGING.format(name=target.name)):
                with contextlib.suppress(OSError):  # another saver may be deleting it too
                    lock = _lock(entry)
                    if lock is not None:
                        shutil.rmtree(entry, ignore_errors=True)
                        os.close(lock)


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    """Collect the files of a new checkpoint and put them in place of the old ones when the block ends well.

    Yields:
        The folder to write to, and a tag to put into the names of shards, with an index that names them (empty unless
        files move in one by one over an earlier checkpoint).

    Raises:
        SaveError: nothing could be written, or the disk is full; the target is as it was.
    """
    target = Path(os.path.realpath(Path(folder).expanduser()))
    staging: Path | None = None
    lock: int | None = None
    try:
        if target.exists() and not target.is_dir():
            raise SaveError("the path is a file", file=target, expected="a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        occupied = target.is_dir() and any(target.iterdir())
        swap = not occupied or _can_exchange(target)
        in_place = target.is_dir() and (os.path.ismount(target) or not swap or target == Path.cwd())
        prefix = _STAGING.format(name=target.name)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target if in_place else target.parent))
        lock = None if fcntl is None else _lock(staging)
        yield staging, f"-{staging.name[-8:]}" if in_place and _tensor_files(target) else ""
        for path in staging.iterdir():
            _sync(path)
        if in_place:
            _move_in(staging, target)
        else:
            mode = target.stat().st_mode if target.exists() else 0o777 & ~_umask()
            staging.chmod(mode & 0o7777)
            if not occupied:
                os.replace(staging, target)  # over nothing, or over an empty folder
            else:
                _link_tree(target, staging, skip=is_checkpoint_file)
                _sync(staging)
                if not exchange(staging, target):
                    raise OSError("the folders could not be exchanged")
                with contextlib.suppress(FileNotFoundError):  # the next saver has cleared it away
                    _link_tree(staging, target, skip=is_checkpoint_file)  # what others wrote there meanwhile
        _sync(target.parent)
    except FewbitsError:
        raise
    except OSError as error:
        raise SaveError(
            f"the checkpoint could not be written: {error.strerror or error}",
            file=target,
            hint="free space or choose another folder; what was there before is untouched",
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _tensor_files(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth") and p.is_file()]


def _move_in(staging: Path, target: Path) -> None:
    """Files one by one, the one that makes the others a checkpoint last, then the old ones out.

    Every call in here leaves a folder that loads: as the old checkpoint up to the one rename of the entry, as the new
    one from there on.
    """
    new = {p.name for p in staging.iterdir()}
    old = {p.name for p in target.iterdir() if is_checkpoint_file(p.name)}
    entry = next(name for name in (*_INDEXES, *_SINGLES) if name in new)
    lone = _tensor_files(target)
    if len(lone) == 1 and entry in _INDEXES and not old.intersection((*_SINGLES, *_INDEXES)):
        # a file of any name is a checkpoint while it is the only one: give it a name that stays one beside shards
        standard = _SINGLES[0] if lone[0].endswith(".safetensors") else _SINGLES[1]
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(target / lone[0], target / standard)
            old.add(standard)
    for name in sorted(new - {entry}):
        os.replace(staging / name, target / name)
    _sync(target)  # what the entry names is on disk before the entry is
    for name in old.intersection(_INDEXES) - {entry}:
        os.replace(target / name, target / entry)  # it names the same files under any name
    replaced = sorted(old.intersection(_SINGLES) - new)
    if replaced:
        index = json.loads((staging / entry).read_text())
        index["metadata"]["replaces"] = replaced
        commit = staging / "commit"
        commit.write_text(json.dumps(index))
        _sync(commit)
        os.replace(commit, target / entry)
        for name in replaced:
            (target / name).unlink()
    os.replace(staging / entry, target / entry)
    _sync(target)
    for name in sorted(old - new - {*_INDEXES, *replaced}):
        (target / name).unlink()
    _sync(target)
