"""The Hugging Face Hub: a path that does not exist and reads ``org/name`` is fetched by ``huggingface_hub``.

Cache, token and endpoint are configured in that library.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from lorax_fn.core.errors import LoraError, error
from lorax_fn.interop.files import needs

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(path: str | os.PathLike, wanted: Sequence[str], revision: str | None = None) -> pathlib.Path:
    """The folder itself, or the cached one of a repository, with its files that match ``wanted``.

    Raises:
      LoraError: there is neither a folder nor such a repository.
    """
    folder = pathlib.Path(path)
    if folder.exists():
        if not folder.is_dir():
            raise error(
                "this path is not a folder.",
                path=folder,
                want=f"a folder with {', '.join(wanted)}",
                do="pass the folder.",
            )
        return folder
    if not (isinstance(path, str) and _REPO.fullmatch(path)) or ".." in path:
        raise error(
            "there is no such folder.",
            path=folder,
            want="a folder, or org/name on the Hub",
            do="check the path.",
        )
    hub = needs("huggingface_hub", "hub")
    try:
        return pathlib.Path(hub.snapshot_download(path, revision=revision, allow_patterns=list(wanted)))
    except Exception as failure:
        raise _refused(path, failure) from failure


def upload(folder: pathlib.Path, repo: str, files: Sequence[str], private: bool, revision: str | None) -> str:
    """Uploads some files of a folder; the address of the commit."""
    hub = needs("huggingface_hub", "hub")
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=str(folder), allow_patterns=list(files), revision=revision
        )
    except Exception as failure:
        raise _refused(repo, failure) from failure
    return str(getattr(done, "commit_url", done))


def _refused(repo: Any, failure: Exception) -> LoraError:
    return error(
        "the Hub did not serve this repository.",
        path=repo,
        got=f"{type(failure).__name__}: {str(failure).splitlines()[0][:300] if str(failure) else ''}",
        do="check the name, the revision and the token (hf auth login).",
    )
