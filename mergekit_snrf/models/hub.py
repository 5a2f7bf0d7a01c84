"""Models on the hub: what a repository holds, its copy in the cache, and downloads."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable
from pathlib import Path

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.models.shards import TensorHeader

_SECONDS = 10


def find_repository(name: str, revision: str | None) -> tuple[str, tuple[str, ...]] | SnrfError:
    """Return the commit of a revision and the paths of all its files, or why the hub does not give them."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    try:
        # Unlike a listing this is not tried again and again while there is no network.
        found = get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_SECONDS)
        commit = found.commit_hash or revision or "main"
        return commit, tuple(sorted(HfApi().list_repo_files(name, revision=commit)))
    except Exception as error:
        # What huggingface_hub, httpx and the file system raise has no common base.
        what = f"neither a local folder nor a model that the hub gives ({_reason(error)})"
        return SnrfError(name, what, "check the name, the network and the login (hf auth login)")


def cached_snapshot(name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """Return the folder of a revision in the cache, whether complete or not; None if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):
        return None


def download(name: str, revision: str | None, files: Iterable[str], cache_dir: str | None) -> Path:
    """Download the files that match the patterns and are not in the cache yet; return the folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=[*files]))
    except Exception as error:
        raise SnrfError(name, f"cannot be downloaded ({_reason(error)})", "check network and disk") from None


def remote_headers(name: str, commit: str) -> dict[str, TensorHeader]:
    """Return the headers of all tensors without a download; ``SnrfError``: they are not safetensors, or damaged."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=commit)
    except NotASafetensorsRepoError:
        remedy = f"download it first (hf download {name}) and give the folder"
        raise SnrfError(name, "has no safetensors weights on the hub", remedy) from None
    except Exception as error:
        what = f"its weights cannot be read ({_reason(error)})"
        raise SnrfError(name, what, "check the network and the files") from None
    return {
        key: TensorHeader(tensor.dtype, tuple(tensor.shape), file)
        for file, shard in metadata.files_metadata.items()
        for key, tensor in shard.tensors.items()
    }


def lacking(folder: Path, files: Iterable[str]) -> list[str]:
    """Return those of the files that are not in the folder."""
    return [name for name in files if not os.path.isfile(folder.joinpath(*name.split(posixpath.sep)))]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
