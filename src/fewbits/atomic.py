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
    with _staging_folder(target.parent, target.name) as folder:
        probes = folder / "a", folder / "b"
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
    """Give the target every file of the source that it has not, by hard link where that can be."""
    with os.scandir(source) as entries:
        for entry in entries:
            place = target / entry.name
            if skip(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # gone meanwhile, or there already
                if entry.is_dir(follow_symlinks=False):
                    place.mkdir(exist_ok=True)
                    _link_tree(Path(entry.path), place)
                    shutil.copystat(entry.path, place)
                elif entry.is_symlink():
                    place.symlink_to(Path(entry.path).readlink())
                elif not os.path.lexists(place):
                    _link(entry.path, place)


def _link(source: str, place: Path) -> None:
    try:
        os.link(source, place)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, or that many of one file
        shutil.copy2(source, place)


def _lock(folder: Path) -> int:
    """A handle that holds the lock on a folder until it is closed.

    Raises:
        BlockingIOError: another holds it.
        OSError: the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def _staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder for the target of this name, locked and in the end removed."""
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_STAGING.format(name=name), dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if fcntl is None:
                break  # type: ignore[unreachable]  # reached on Windows
            try:
                stack.callback(os.close, _lock(folder))
            except (BlockingIOError, FileNotFoundError):
                continue  # another saver has taken it for left behind before it was locked
            except OSError:  # nobody can lock here, so nobody removes it
                break
            if folder.exists():
                break
        yield folder


def _remove_stale(target: Path) -> None:
    """Delete staging folders that killed savers left for this target."""
    for folder in (target.parent, target):
        if fcntl is None or not folder.is_dir():
            continue
        for entry in folder.iterdir():
            if entry.name.startswith(_STAGING.format(name=target.name)):
                with contextlib.suppress(OSError):  # its saver lives, or another is deleting it too
                    lock = _lock(entry)
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
    try:
        if target.exists() and not target.is_dir():
            raise SaveError("the path is a file", file=target, expected="a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        occupied = target.is_dir() and any(target.iterdir())
        swap = not occupied or _can_exchange(target)
        in_place = target.is_dir() and (os.path.ismount(target) or not swap or target == Path.cwd())
        with _staging_folder(target if in_place else target.parent, target.name) as staging:
            yield staging, f"-{staging.name[-8:]}" if in_place and _tensor_files(target) else ""
            for path in staging.iterdir():
                _sync(path)
            if in_place:
                _move_in(staging, target)
            else:
                _put(staging, target)
            _sync(target.parent)
    except FewbitsError:
        raise
    except OSError as error:
        raise SaveError(
            f"the checkpoint could not be written: {error.strerror or error}",
            file=target,
            hint="free space or choose another folder; what was there before is untouched",
        ) from error


def _put(staging: Path, target: Path) -> None:
    """Let the staging folder become the target, with the files of the target that are no checkpoint."""
    occupied = target.is_dir() and any(target.iterdir())
    staging.chmod((target.stat().st_mode if target.exists() else 0o777 & ~_umask()) & 0o7777)
    if not occupied:
        os.replace(staging, target)  # over nothing, or over an empty folder
        return
    _link_tree(target, staging, skip=is_checkpoint_file)
    _sync(staging)
    if not exchange(staging, target):
        raise OSError("the folders could not be exchanged")
    with contextlib.suppress(FileNotFoundError):  # the next saver has cleared it away
        _link_tree(staging, target, skip=is_checkpoint_file)  # what others wrote there meanwhile


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
            (target / name).unlink(missing_ok=True)
    os.replace(staging / entry, target / entry)
    _sync(target)
    for name in sorted(old - new - {*_INDEXES, *replaced}):
        (target / name).unlink(missing_ok=True)
    _sync(target)
