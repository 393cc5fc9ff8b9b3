"""Access folders behind a URL: `s3://`, `gs://`, `hf://` and every other protocol that fsspec opens.

A remote cache is processed in a local folder, by the same code as a local cache:

    written    remote -> a working folder; each finished shard is uploaded from there (`Mirror`)
    read       remote -> a download folder, named by the manifest's hash and reused by later runs

An object store lists a file only when it is complete, so crash safety depends only on the order of changes: the
manifest is deleted before it becomes invalid, and uploaded last. Credentials come from the environment, where each
store's own tools look for them. A URL with credentials is refused, because URLs are logged.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from offline_kto.kto_core.durable_files import OF_THE_DISK, replacing
from offline_kto.kto_core.errors import CacheError, KTOError, in_one_line, printable
from offline_kto.kto_core.redaction import bare_url, has_credentials

# Stores without folders. Creating a folder there would create a bucket if its name was misspelt.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf")


class Remote:
    """A folder behind a URL.

    Raises (here and in every method):
        CacheError: the URL contains credentials, no installed library opens it, or the store reports an error.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(url)
        if has_credentials(self.url):
            raise CacheError(
                f"{bare_url(self.url)}: remove the credentials from the URL, because URLs are logged; put them into the environment."
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
    def _asking(self, name: str = "") -> Iterator[None]:
        """Re-raise any error of fsspec as a `CacheError`; its drivers' exceptions have no common base class.

        Args:
            name: of the file, for the message.
        """
        try:
            yield
        except KTOError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise no_room(error) from error
            where = f"{self.url}/{printable(name)}" if name else self.url
            raise CacheError(
                f"{where}: {type(error).__name__}: {in_one_line(error)}. Check the address, the permissions and the "
                "credentials in the environment."
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _with_folder(self, name: str) -> str:
        """Return the path to write a file to, and create its folder if the store has folders."""
        path = self._at(name)
        if not self._has_buckets:
            self._files.makedirs(self._files._parent(path), exist_ok=True)
        return path

    def files(self) -> dict[str, int]:
        """Return file sizes by name, relative to the folder; empty if the folder does not exist."""
        with self._asking():
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(self._root) :].lstrip("/"): int(entry["size"] or 0) for path, entry in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
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
        """Copy a file within the store."""
        with self._asking():
            self._files.cp_file(self._at(name), self._with_folder(target))

    def download(
        self,
        name: str,
        path: Path,
        *,
        on_bytes: Callable[[int], None] | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Download a file; `path` exists only once it is complete.

        Args:
            on_bytes: called with the number of bytes that arrived since the last call, if the store's client reports them;
                raises a `KTOError` to stop.
            check: called with the complete file before it gets its name; raises a `KTOError` to refuse it.
        """
        from fsspec.callbacks import NoOpCallback

        progress = NoOpCallback()
        if on_bytes is not None:
            progress.relative_update = on_bytes
        with self._asking(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                self._files.get_file(self._at(name), str(temporary), callback=progress)
                if check is not None:
                    check(temporary)

    def upload(self, path: Path, name: str) -> None:
        with self._asking():
            self._files.put_file(str(path), self._with_folder(name))


def no_room(error: Exception) -> CacheError:
    return CacheError(
        f"The local folder of a remote cache cannot be written: {error}. Set XDG_CACHE_HOME to another folder."
    )
