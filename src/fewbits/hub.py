"""The Hugging Face hub: from an id to a local folder, through ``huggingface_hub`` and its cache."""

from __future__ import annotations

import json
from pathlib import Path

from fewbits.errors import CheckpointError, CheckpointNotFoundError

# the files a checkpoint may begin with, best first
_ENTRIES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_OPTIONAL = ("config.json", "generation_config.json")


def download(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Fetch a model's weights and configuration, and nothing else, and give the local folder.

    What was fetched before is not fetched again, and serves alone where there is no network (or ``HF_HUB_OFFLINE``).

    Args:
        repo_id: ``"owner/name"``.
        revision: a branch, tag or commit; the main branch by default.
        token: for private and gated models; by default the one that is logged in.

    Raises:
        CheckpointNotFoundError: there is no such model, revision, or access to it, or it holds no weights.
        CheckpointError: the network failed and the cache does not have it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def cached(name: str) -> Path | None:
        """As ``fetch`` where there is no network: an entry that the cache lacks may be one the model lacks."""
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=True))
        except EntryNotFoundError:
            return None

    where = f"hub:{repo_id}" + (f"@{revision}" if revision else "")
    offline: Exception | None = None
    try:
        get = fetch
        try:
            for name in _OPTIONAL:
                get(name)
        except LocalEntryNotFoundError as error:
            get, offline = cached, error
            for name in _OPTIONAL:
                get(name)
        entry = next((path for name in _ENTRIES if (path := get(name)) is not None), None)
        if entry is None:
            if offline is not None:
                raise CheckpointError(
                    "the hub cannot be reached and the cache does not hold this model",
                    file=where,
                    hint="connect once to download it, or give a local folder",
                ) from offline
            raise CheckpointNotFoundError("the model holds no weights", file=where, expected=f"one of {_ENTRIES}")
        if entry.name.endswith(".index.json"):
            shards = sorted(set(json.loads(entry.read_text())["weight_map"].values()))
            absent = [shard for shard in shards if get(shard) is None]
            if absent:
                raise CheckpointNotFoundError(
                    f"shards that the index names are absent: {', '.join(absent)}", file=where
                )
        return entry.parent
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"no local path and no model on the hub that can be read ({type(error).__name__})",
            file=where,
            hint="check the name and the revision; for a private or gated model give a token",
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the hub cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            file=where,
            hint="connect once to download it, or give a local folder",
        ) from error
