"""What ModelScope and Hugging Face are asked for a model, each by its own client."""

import glob
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class HubFile(NamedTuple):
    """A file as a hub lists it. `size` is in bytes; `digest` changes with its content."""

    path: str
    size: int
    digest: str | None


def missing(folder: Path, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files that are not in the folder, or not in their size."""
    sizes = _sizes(folder)
    return [file for file in files if sizes.get(folder / file.path) != file.size]


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


class ModelScope:
    """A model on ModelScope. The hub's list of its files is kept in the copy, as LISTING.

    Args:
        model: its id.
        revision: a branch, a tag or a commit; None: the default one.
        cache: the folder for copies; None: the hub's usual cache.
    """

    LISTING = ".qwen-vllm.json"

    def __init__(self, model: str, revision: str | None, cache: str | None) -> None:
        self._hub, self._errors = import_module("modelscope_hub"), import_module("modelscope_hub.errors")
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
        self._config = self._hub.HubConfig()
        self._api = self._hub.HubApi(self._config)
        self._model, self._revision, self._cache = model, revision or "master", cache
        self._older: Path | None = None

    def copy(self) -> Path | None:
        """Return the folder in the local cache, whole or not."""
        try:
            return self._repository(local_files_only=True)
        except self._errors.CacheNotFound:
            # Where modelscope of 2024 kept models, which the client does not know.
            cache = Path(self._cache or self._config.cache_dir)
            names = self._model, self._model.replace(".", "___")
            places = [cache / folder / name for folder in ("", "hub", "models") for name in names]
            self._older = next((place for place in places if place.is_dir()), None)
            return self._older

    def known(self, copy: Path) -> list[HubFile] | None:
        """Return the list of files that came with a copy; None: there is none of this revision."""
        revision, files = self._noted(copy)
        return files if revision == self._revision else None

    def listing(self) -> list[HubFile]:
        """Ask the hub for the list of files."""
        try:
            files = self._api.list_repo_files(self._model, "model", revision=self._revision)
        except self._errors.NotExistError:  # modelscope.ai may have it
            self._api = self._hub.HubApi(self._config, endpoint=self._api.resolve_endpoint_for_read(self._model))
            files = self._api.list_repo_files(self._model, "model", revision=self._revision)
        return [HubFile(file.path, file.size, file.sha256) for file in files if not file.is_dir]

    def download(self, listing: Sequence[HubFile], wanted: Sequence[HubFile]) -> Path:
        """Fetch what is missing or has changed of `wanted`; return the folder.

        The client gives each file an hour. As long as data flows, it gets another.
        """
        folder = self._repository(file_list=[])
        noted = {file.path: file.digest for file in self._noted(folder)[1]}
        changed = [file for file in wanted if noted.get(file.path, file.digest) != file.digest]
        for file in [*changed, *missing(folder, wanted)]:
            (folder / file.path).unlink(missing_ok=True)
        try:
            (folder / self.LISTING).write_text(json.dumps({"revision": self._revision, "files": listing}))
        except OSError:
            if missing(folder, wanted):
                raise  # else it is whole, in a cache that cannot be written
        while lacking := missing(folder, wanted):
            before = sum(_sizes(folder).values())
            try:
                self._repository(file_list=[{"Path": path, "Size": size, "Sha256": sha} for path, size, sha in lacking])
            except self._errors.FileDownloadError as failure:
                slow = all(isinstance(error, self._errors.NetworkError) for error in failure.failed_files.values())
                if not slow or sum(_sizes(folder).values()) <= before:
                    raise
        return folder

    def _repository(self, **options: Any) -> Path:
        """Call the client; with an empty `file_list` it makes the folder, and no more."""
        folder: Path = self._api.download_repo(
            self._model, "model", revision=self._revision, cache_dir=self._cache, local_dir=self._older, **options
        )
        return folder

    def _noted(self, copy: Path) -> tuple[str | None, list[HubFile]]:
        try:
            noted = json.loads((copy / self.LISTING).read_text())
            return noted["revision"], [HubFile(*file) for file in noted["files"]]
        except (OSError, ValueError):
            return None, []


class HuggingFace:
    """A model on Hugging Face; as `ModelScope`. The hub's client keeps the lists."""

    def __init__(self, model: str, revision: str | None, cache: str | None) -> None:
        self._hub, self._errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
        self._model, self._options = model, {"revision": revision, "cache_dir": cache}

    def copy(self) -> Path | None:
        """Return the folder in the local cache, whole or not."""
        with suppress(self._errors.LocalEntryNotFoundError):
            return self._snapshot(local_files_only=True, allow_patterns="config.json")
        return None

    def known(self, copy: Path) -> list[HubFile] | None:
        """Return the list of files that came with a copy; None: there is none."""
        with suppress(self._errors.CachedRepoTreeNotFoundError):
            files = self._hub.get_cached_repo_tree(self._model, **self._options)
            return [HubFile(file.path, file.size, _digest(file)) for file in files]
        return None

    def listing(self) -> list[HubFile]:
        """Ask the hub for the list of files."""
        revision = self._options["revision"]
        files = self._hub.HfApi().model_info(self._model, revision=revision, files_metadata=True, timeout=10).siblings
        return [HubFile(file.rfilename, file.size, _digest(file)) for file in files]

    def download(self, listing: Sequence[HubFile], wanted: Sequence[HubFile]) -> Path:
        """Fetch what is missing of `wanted`; return the folder. The client does not look at checksums."""
        began = time.time() - 1
        folder = self._snapshot(allow_patterns=[glob.escape(file.path) for file in wanted])
        fetched = {file: path for file in wanted if (path := folder / file.path).stat().st_mtime > began}
        damaged = [path for file, path in fetched.items() if file.digest not in (None, *_digests(path))]
        for path in damaged:
            path.resolve().unlink()
        if damaged:
            names = ", ".join(str(path.relative_to(folder)) for path in damaged)
            raise OSError(f"{names}: what came has another checksum than the hub names")
        return folder

    def _snapshot(self, **options: Any) -> Path:
        return Path(self._hub.snapshot_download(self._model, **self._options, **options))


def _digest(file: Any) -> str | None:
    """Return the checksum that Hugging Face has for a file: SHA-256 of a large one, of others that of git."""
    digest: str | None = file.lfs.sha256 if file.lfs else file.blob_id
    return digest


def _digests(path: Path) -> tuple[str, str]:
    """Return the two checksums of a file that Hugging Face may have."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        content.seek(0)
        return sha256, hashlib.file_digest(content, lambda: git).hexdigest()


HUBS: Mapping[str, type[ModelScope] | type[HuggingFace]] = {"modelscope": ModelScope, "huggingface": HuggingFace}
