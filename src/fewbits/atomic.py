"""Replacing a folder's checkpoint as one step: whoever looks sees all of the old one or all of the new one.

The new files are written to a staging folder beside the target. Where the target is a plain folder, staging takes in
its other files (by hard link) and the two folders change places in one system call (``renameat2`` with
``RENAME_EXCHANGE`` on Linux, ``renamex_np`` with ``RENAME_SWAP`` on macOS). Where that is impossible (a mount point,
the working directory, a file system without it), the files move in one by one: shards under names nobody has, then the
index or single file that makes them a checkpoint, in one rename; only then do the old ones go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fewbits.errors import FewbitsError, SaveError

_STAGING = ".{name}.fewbits-{pid}-"
# what a checkpoint consists of, whoever wrote it; these are replaced together, everything else is kept
_CHECKPOINT_FILE = re.compile(
    r"(model|pytorch_model)([-.][\w.-]*)?\.(safetensors|bin|pt|pth)(\.index\.json)?|config\.json|generation_config\.json"
)
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
    """Whether a file of this name belongs to a checkpoint and is replaced with it."""
    return _CHECKPOINT_FILE.fullmatch(name) is not None


def _can_exchange(target: Path) -> bool:
    """Whether the folder can change places: it is no mount point or working directory, and the file system can."""
    if os.path.ismount(target) or target == Path.cwd() or target in Path.cwd().parents:
        return False
    with tempfile.TemporaryDirectory(prefix=_STAGING.format(name=target.name, pid=os.getpid()), dir=target.parent) as d:
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
        if skip(entry.name) or place.exists():
            continue
        if entry.is_dir(follow_symlinks=False):
            place.mkdir()
            _link_tree(Path(entry.path), place)
            shutil.copystat(entry.path, place)
        elif entry.is_symlink():
            place.symlink_to(Path(entry.path).readlink())
        else:
            try:
                os.link(entry.path, place)
            except OSError:  # a file system without hard links
                shutil.copy2(entry.path, place)


def _remove_stale(target: Path) -> None:
    """Delete staging folders that killed savers left for this target."""
    pattern = re.compile(re.escape(f".{target.name}.fewbits-") + r"(\d+)-.*")
    for folder in (target.parent, target):
        if not folder.is_dir():
            continue
        for entry in folder.iterdir():
            found = pattern.fullmatch(entry.name)
            if found is None or int(found[1]) == os.getpid():
                continue
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(entry, ignore_errors=True)
            except PermissionError:
                pass  # somebody else's saver, alive


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    """Collect the files of a new checkpoint and put them in place of the old ones when the block ends well.

    Yields:
        The folder to write to, and a tag to put into the names of shards (empty unless files move in one by one).

    Raises:
        SaveError: nothing could be written, or the disk is full; the target is as it was.
    """
    target = Path(os.path.realpath(Path(folder).expanduser()))
    if target.exists() and not target.is_dir():
        raise SaveError("the path is a file", file=target, expected="a folder")
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        occupied = target.is_dir() and any(target.iterdir())
        swap = not occupied or _can_exchange(target)
        in_place = target.is_dir() and (os.path.ismount(target) or not swap or target == Path.cwd())
        prefix = _STAGING.format(name=target.name, pid=os.getpid())
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target if in_place else target.parent))
        yield staging, f"-{staging.name[-8:]}" if in_place and occupied else ""
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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _move_in(staging: Path, target: Path) -> None:
    """Files one by one, the one that makes the others a checkpoint last, then the old ones out."""
    new = {p.name for p in staging.iterdir()}
    old = {p.name for p in target.iterdir() if p.is_file() and is_checkpoint_file(p.name)}
    entries = {n for n in new if n.endswith(".index.json") or n in ("model.safetensors", "pytorch_model.bin")}
    for name in sorted(new - entries, key=lambda n: n.endswith(".json")):
        os.replace(staging / name, target / name)
    for name in entries:
        os.replace(staging / name, target / name)
    for name in sorted(old - new, key=lambda n: not n.endswith(".index.json")):
        (target / name).unlink()
    _sync(target)
