"""Open the storage of a sweep's study: a database, or Optuna's gRPC proxy in front of one.

Several machines share a storage by its URL:

    postgresql+psycopg://user@host/name    any database that SQLAlchemy opens
    grpc://host:port                       a server that `optuna.storages.run_grpc_proxy_server` runs
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from offline_kto.kto_core.errors import ConfigError, in_one_line
from offline_kto.kto_core.redaction import HIDDEN, hidden, hidden_url, secrets_of

# Types of optuna are not checked here.
_Storage: TypeAlias = Any


def check_installed() -> None:
    """Check that optuna is installed. Raises: ConfigError: it is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("kto-sweep needs optuna. Install it with: pip install 'offline-kto[sweep]'") from error


def check_storage(url: str) -> None:
    """Check that the URL of a storage is not misread, with a part of its password taken as the host.

    Raises:
        ConfigError: it is not a URL, its password is hidden or has characters that must be encoded, or a package is missing.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if _is_proxy(url):
        _proxy_of(url)
        _check_grpc(url)
        return
    encode = "Write the characters @ : / ? of a user or password as %40 %3A %2F %3F."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # both may quote a part of the password
        example = "sqlite:///study.db or postgresql+psycopg://user@host/name"
        raise ConfigError(f"--storage {hidden_url(url)}: not the URL of a database, like {example}. {encode}") from None
    if "@" in f"{parsed.host}{parsed.database if parsed.password else ''}":
        raise ConfigError(f"--storage {hidden_url(url)}: has more than one @. {encode}")
    if parsed.password == HIDDEN:
        raise ConfigError(
            f"--storage {url}: its password is not stored in sweep.yaml. Pass --storage with the password, or without one and keep "
            "it where the driver looks for it (PostgreSQL: ~/.pgpass)."
        )


def open_storage(url: str) -> _Storage:
    """Open a storage that `check_storage` has accepted. Raises: Exception: of its driver; see `of_storage`."""
    import optuna

    if not _is_proxy(url):
        return optuna.storages.get_storage(url)
    host, port = _proxy_of(url)
    return optuna.storages.GrpcStorageProxy(host=host, port=port)


def _is_proxy(url: str) -> bool:
    return url.startswith("grpc:")


def _check_grpc(url: str) -> None:
    """Check that the packages for a gRPC proxy are installed. Raises: ConfigError: one is missing or too old."""
    try:
        import google.protobuf  # noqa: F401
        import grpc  # noqa: F401
        from optuna.storages import GrpcStorageProxy  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--storage {url}: needs grpcio, protobuf and optuna 4.2 ({in_one_line(error)}). Install them with: "
            "pip install 'offline-kto[grpc]'"
        ) from error


def _proxy_of(url: str) -> tuple[str, int]:
    """Return the host and the port of a gRPC proxy. Raises: ConfigError: the URL has other parts, or none of them."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # not a port
        host = port = None
    if not host or port is None or url.rstrip("/").lower() not in (f"grpc://{host}:{port}", f"grpc://[{host}]:{port}"):
        raise ConfigError(
            f"--storage {hidden_url(url)}: the address of Optuna's gRPC proxy is written grpc://HOST:PORT, without a user, a "
            "password or a path."
        )
    return (f"[{host}]" if ":" in host else host), port


@contextlib.contextmanager
def of_storage(url: str) -> Iterator[None]:
    """Convert a storage's errors into one message. Raises: ConfigError: it cannot be used."""
    try:
        yield
    except ImportError as error:
        missing = said(url, error.__cause__ or error).rstrip(".")
        raise ConfigError(
            f"{hidden_url(url)}: {missing}. Install the driver of that database, or name another one in the URL "
            "(postgresql+psycopg://, mysql+pymysql://)."
        ) from error
    except _driver_errors() as error:
        raise ConfigError(
            f"{hidden_url(url)}: the sweep's database cannot be used: "
            f"{said(url, error.__cause__ or error).rstrip('.')}. Finished trials are kept; once the database works, run the same command "
            "to continue."
        ) from error


def _driver_errors() -> tuple[type[Exception], ...]:
    """Return the classes of the drivers' errors; evaluated only after an error, when the drivers are imported."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    grpc = sys.modules.get("grpc")
    return (StorageInternalError, SQLAlchemyError, *([] if grpc is None else [grpc.RpcError]))


def said(url: str, error: BaseException) -> str:
    """Return a driver's error message without the secrets of the URL, which it may quote."""
    details = getattr(error, "details", None)
    if callable(details):  # of gRPC, whose whole message is a page of debugging data
        error = RuntimeError(details())
    return hidden(in_one_line(error), secrets_of(url))
