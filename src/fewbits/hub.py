"""The Hugging Face hub: from an id to local files, through ``huggingface_hub`` and its cache."""

from __future__ import annotations

from pathlib import Path

from fewbits.errors import CheckpointError, CheckpointNotFoundError, FewbitsError
from fewbits.files import read_index

# the files a checkpoint may begin with, best first
_ENTRIES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_OPTIONAL = ("config.json", "generation_config.json")


def download(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Fetch a model's weights and configuration, and nothing else, and give the file that the weights begin with.

    What was fetched before is not fetched again, and serves alone where there is no network (or ``HF_HUB_OFFLINE``).

    Args:
        repo_id: ``"owner/name"``.
        revision: a branch, tag or commit; the main branch by default.
        token: for private and gated models; by default the one that is logged in.

    Returns:
        An index or a single file of weights in the cache; the other files lie beside it.

    Raises:
        CheckpointNotFoundError: there is no such model, revision, or access to it, or it holds no weights.
        CheckpointError: the network failed and the cache does not have it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = f"hub:{repo_id}" + (f"@{revision}" if revision else "")
    unreachable = _unreachable(repo_id, revision, token)

    def get(name: str, revision: str | None = revision) -> Path | None:
        try:
            if unreachable is None:
                return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=True))
        except EntryNotFoundError as error:
            if unreachable is None and isinstance(error, LocalEntryNotFoundError):
                raise  # the network went away meanwhile
            return None  # the model has none, or offline the cache, for which that may be why

    try:
        entry = next((path for name in _ENTRIES if (path := get(name)) is not None), None)
        if entry is None and unreachable is not None:
            raise unreachable
        if entry is None:
            raise CheckpointNotFoundError("the model holds no weights", file=where, expected=f"one of {_ENTRIES}")
        commit = entry.parent.name  # the rest comes from the same commit, though the branch may move on
        for name in _OPTIONAL:
            get(name, commit)
        if entry.suffix == ".json":
            shards = sorted(set(read_index(entry).values()))
            absent = [shard for shard in shards if get(shard, commit) is None]
            if absent:
                raise CheckpointNotFoundError(
                    f"the index names {len(absent)} of {len(shards)} shards that are not there: {', '.join(absent)}",
                    file=where if unreachable is None else entry,
                    hint=None if unreachable is None else "connect once to download them",
                )
        return entry
    except FewbitsError:
        raise
    except Exception as error:  # of huggingface_hub, and of whichever HTTP library it was built on
        raise _explained(error, where) from error


def _unreachable(repo_id: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """Why the hub does not give this model, or ``None`` if it does.

    Asked once, and before all else: for every single file ``hf_hub_download`` would try again for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo_id, _ENTRIES[0], revision=revision), token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None  # an answer: a revision that is gone is not to be served from the cache as if it were there
    except Exception as error:  # as above
        return error
    return None


def _explained(error: Exception, where: str) -> CheckpointError:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    kind = type(error).__name__
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        return CheckpointNotFoundError(
            f"no local path, and no model on the hub that can be read ({kind})",
            file=where,
            hint="check the name and the revision; for a private or gated model give a token",
        )
    return CheckpointError(
        f"no local path, and the hub cannot be read ({kind}: {next(iter(str(error).splitlines()), '')})",
        file=where,
        hint="connect once to download it, or give a local folder",
    )
