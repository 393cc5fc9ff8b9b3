"""Upload a finished run to a repository on the hub: `--push-to-hub NAME`.

Name, token and the right to write are checked before the run. The files to upload are collected in `hub/` of the run
folder, which is removed once they are uploaded; see `upload_folder`.
"""

import fnmatch
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT, is_offline_mode
from huggingface_hub.errors import RepositoryNotFoundError

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import remove_tree
from offline_kto.kto_core.errors import ConfigError, TrainingError, said_by
from offline_kto.kto_core.models.hub import bound_requests
from offline_kto.train.config import TrainConfig
from offline_kto.train.publish.base_model import is_repository_name

# Files of an earlier model in the repository that would be loaded together with the new one.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
# Answers may take that long: the hub checks a commit of many files before it answers.
_SECONDS_OF_UPLOAD = 600.0
_UPLOADED = "model, tokenizer, model card and report; no feedback text, no local path"


@dataclass(frozen=True)
class HubRepository:
    """A repository of the user's on the hub.

    Attributes:
        name: NAMESPACE/NAME.
        visibility: public or private; None if it did not exist before the run.
        weights: the files of an earlier model in it, before the run.
        token: the user's.
    """

    name: str
    visibility: str | None
    weights: tuple[str, ...]
    token: str

    @classmethod
    def find(cls, config: TrainConfig) -> "HubRepository | None":
        """Check that the run may be uploaded, and say what will be; None without `--push-to-hub`. Nothing is written.

        Raises:
            ConfigError: a name that the hub would refuse, no valid token, no right to write, or a hub that cannot be reached.
        """
        name = config.push_to_hub
        if name is None:
            return None
        where = f"--push-to-hub {name}"
        if not is_repository_name(name):
            raise ConfigError(
                f"{where}: the hub has no such names. Give NAME, or ORGANIZATION/NAME, such as me/my-model."
            )
        if is_offline_mode():
            raise ConfigError(
                f"{where}: HF_HUB_OFFLINE forbids requests to the hub. Unset it, or leave out --push-to-hub."
            )
        token = config.training.get("hub_token") or huggingface_hub.get_token()
        if not isinstance(token, str):
            raise ConfigError(f"{where}: no token of the hub was found. Run hf auth login, or set HF_TOKEN.")
        api = HfApi(token=token)
        with _limited(HF_HUB_ETAG_TIMEOUT), _refusing(where):
            user = api.whoami()
            if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
                raise ConfigError(
                    f"{where}: the token can only read. Create one that can write, and run hf auth login."
                )
            name = name if "/" in name else f"{user['name']}/{name}"
            visibility = _visibility(api, name)
            weights = _weights_in(api, name) if visibility is not None else ()
            if visibility is not None:
                with suppress(TypeError):  # earlier versions of huggingface_hub can only check the right to read
                    api.auth_check(name, write=True)
        state = f"exists, {visibility}" if visibility is not None else "will be created"
        replaced = "; the model in it will be replaced" if weights else ""
        tell(f"hub         {name} ({state}{replaced}): {_UPLOADED}")
        return cls(name, visibility, weights, token)

    def create(self) -> None:
        """Create the repository, with the visibility that is the default of its owner, unless it exists.

        Raises:
            ConfigError: the hub refuses.
        """
        if self.visibility is not None:
            return
        api = HfApi(token=self.token)
        with _limited(HF_HUB_ETAG_TIMEOUT), _refusing(f"--push-to-hub {self.name}"):
            api.create_repo(self.name, exist_ok=True)
            visibility = _visibility(api, self.name)
        tell(f"hub         created {self.name} ({visibility})")

    def upload(self, folder: Path, out: Path) -> None:
        """Upload a folder as one commit, and remove it.

        Files of an earlier model that the folder does not have are deleted, because they would be loaded with the new ones.

        Args:
            folder: what `collect` collected.
            out: the run folder, for messages.

        Raises:
            TrainingError: it cannot be uploaded. Folder and run are kept.
        """
        api = HfApi(token=self.token)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        try:
            with _limited(_SECONDS_OF_UPLOAD):
                operations: list[CommitOperationAdd | CommitOperationDelete] = [
                    *(CommitOperationDelete(name) for name in _weights_in(api, self.name) if name not in files),
                    *(CommitOperationAdd(name, path) for name, path in files.items()),
                ]
                api.create_commit(self.name, operations, commit_message=f"Upload {out.resolve().name}")
        except Exception as error:  # from the hub, its HTTP client or the disk
            raise TrainingError(
                f"{out}: the run is complete, but it could not be uploaded to {self.name}: {said_by(error)} To finish the upload: "
                f"{self.command(folder)}"
            ) from error
        remove_tree(folder)
        tell(f"uploaded    {api.endpoint}/{self.name}")

    def command(self, folder: Path) -> str:
        """Return the command that uploads the folder."""
        deleted = [word for name in self.weights if not (folder / name).exists() for word in ("--delete", name)]
        return shlex.join(["hf", "upload", self.name, str(folder), ".", *deleted])


def _visibility(api: HfApi, name: str) -> str | None:
    """Return whether a repository is private or public; None if there is none."""
    try:
        return "private" if api.model_info(name).private else "public"
    except RepositoryNotFoundError:
        return None


def _weights_in(api: HfApi, name: str) -> tuple[str, ...]:
    """Return the files in a repository that are loaded as its model."""
    paths = (path for path in api.list_repo_files(name) if "/" not in path)
    return tuple(path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in _REPLACED))


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Give each request of the block a time limit."""
    huggingface_hub.close_session()  # its limits are for the life of a session
    bound_requests(huggingface_hub.get_session(), seconds)
    try:
        yield
    finally:
        huggingface_hub.close_session()


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn the errors of the hub and of its HTTP client into one message."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: the hub refuses, or cannot be reached: {said_by(error)}") from error
