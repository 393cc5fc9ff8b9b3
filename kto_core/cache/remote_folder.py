"""Caches behind a URL: `s3://`, `gs://`, `hf://` and whatever else fsspec opens.

A remote cache is worked on in a local folder, by the same code as any other:

    written    remote -> a working folder, whose remote follows it shard by shard (`Mirror`)
    read       remote -> a folder of downloads, named by the manifest's content, used again by later runs

An object store shows a file only when it is whole, so the order of changes is all that crash safety needs: the
manifest goes first where it is not valid any more, and comes last. Credentials come from the environment, where each
store's own tools look for them; a URL that holds any is refused, because URLs are logged.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from offline_kto.kto_core.durable_files import OF_THE_DISK, replacing
from offline_kto.kto_core.errors import CacheError, KTOError, in_one_line
from offline_kto.kto_core.redaction import bare_url, has_credentials

# Stores without folders; there "making the folder" would make the bucket that somebody misspelt.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf")


class Remote:
    """A folder behind a URL.

    Raises (here and in every method):
        CacheError: the URL holds credentials, nothing installed opens it, or the store refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(url)
        if has_credentials(self.url):
            raise CacheError(
                f"{bare_url(self.url)}: leave credentials out of the URL, which is logged; put them into the environment."
            )
        if not parts.netloc and not parts.path.strip("/"):
            raise CacheError(f"{url}: names no folder.")
        import fsspec

        with self._asking():
            try:
                self._files, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
            except ImportError as error:
                hint = {"s3": " (pip install 's3fs')", "gs": " (pip install 'gcsfs')"}.get(parts.scheme, "")
                raise CacheError(f"{self.url}: {in_one_line(error)}{hint}") from error
        self._root, self._has_buckets = str(root).rstrip("/"), parts.scheme in _BUCKETS

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What fsspec and its drivers raise has no common base: any of it is the store's answer."""
        try:
            yield
        except KTOError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise no_room(error) from error
            raise CacheError(
                f"{self.url}: {type(error).__name__}: {in_one_line(error)}. Check the address, the permissions and the "
                "credentials in the environment."
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _with_folder(self, name: str) -> str:
        """Where a file is written; its folder is made, where the store has folders."""
        path = self._at(name)
        if not self._has_buckets:
            self._files.makedirs(self._files._parent(path), exist_ok=True)
        return path

    def files(self) -> dict[str, int]:
        """Sizes by name, relative to the folder; empty where there is none."""
        with self._asking():
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(self._root) :].lstrip("/"): int(entry["size"] or 0) for path, entry in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where it does not exist."""
        with self._asking():
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._asking():
            self._files.pipe_file(self._with_folder(name), content)

    def remove(self, name: str) -> None:
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(name))

    def copy(self, name: str, target: str) -> None:
        """Within the store."""
        with self._asking():
            self._files.cp_file(self._at(name), self._with_folder(target))

    def download(self, name: str, path: Path) -> None:
        """Fetch one file; `path` is there only when it is whole."""
        with self._asking():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                self._files.get_file(self._at(name), str(temporary))

    def upload(self, path: Path, name: str) -> None:
        with self._asking():
            self._files.put_file(str(path), self._with_folder(name))


def no_room(error: Exception) -> CacheError:
    return CacheError(
        f"The local folder that stands for a remote cache cannot be written: {error}. XDG_CACHE_HOME names another place."
    )
