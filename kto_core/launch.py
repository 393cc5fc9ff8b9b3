"""Read the launch, that is rank and world size, and remove variables that would silently change scores.

`torchrun` and `accelerate launch` describe a launch in environment variables. Transformers and accelerate read the same
variables, and others that change precision, device or batch size. Only this module reads them. Variables that it
ignores it also removes from the environment, so that the libraries ignore them too.
"""

import os
import re
import sys
from dataclasses import dataclass

from offline_kto.kto_core.console import warn
from offline_kto.kto_core.errors import ConfigError, printable

_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
_NUMBERS = ("RANK", "LOCAL_RANK")
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")

# On a CPU accelerate reads these as its own launch, before or instead of the others.
_OF_MPI = re.compile(
    r"(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE)|MPI_LOCALRANKID|MPI_LOCALNRANKS"
)
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# The variable by which `accelerate launch` asks each rank to shard, and the settings that belong to it.
_SHARDING = {
    "FSDP": ("ACCELERATE_USE_FSDP", re.compile(r"FSDP_")),
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", re.compile(r"ACCELERATE_(DEEPSPEED_|CONFIG_DS_FIELDS$)")),
}
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")

# Variables that would make libraries override the options, and what decides instead. The last two lines cover all other
# settings of accelerate, known or future, and one that would let torch unpickle a checkpoint.
_TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
_DECIDED_BY = {
    re.compile(r"ACCELERATE_(MIXED_PRECISION|DOWNCAST_BF16|(FP8|AO|TE)_.*)|XLA_(USE|DOWNCAST)_BF16"): "--dtype decides",
    re.compile(
        rf"NVIDIA_TF32_OVERRIDE|HIPBLASLT_ALLOW_TF32|{_TF32}|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
    ): "--dtype decides",
    re.compile(r"ACCELERATE_(USE_CPU|TORCH_DEVICE)"): "--device decides",
    re.compile(r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS"): "--batch-size and --max-tokens decide",
    re.compile(r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_.*"): "nothing here uses it",
    re.compile(r"FORK_LAUNCHED|TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"): "nothing here uses it",
}
_HARMLESS = ("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")  # true or false

# Variables that libraries parse as a number on import; a bad value would end in a traceback.
_NUMBERS_OF_LIBRARIES = {
    "HF_HUB_ETAG_TIMEOUT": int,
    "HF_HUB_DOWNLOAD_TIMEOUT": int,
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
}

# Values that have no effect.
_NEUTRAL = ("", "0", "no", "none", "false", "off", "default", "strict")


@dataclass(frozen=True)
class Launch:
    """One process of a launch.

    Attributes:
        local_rank: rank of this process on its machine.
        local_world_size: processes on this machine if the launcher is known to set it correctly; else 1.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this process locks, checks and writes the folders of the launch."""
        return self.rank == 0

    @property
    def local_share(self) -> tuple[int, int]:
        """(i, n): this process does every n-th piece of the work done once per machine, starting with the i-th.

        A launch without a known launcher may number its processes in any way, so there each process does all of it.
        """
        return (self.local_rank, self.local_world_size) if self.local_rank < self.local_world_size else (0, 1)


def world_size() -> int:
    """Return the number of processes in this launch, 1 without a launcher.

    Raises:
        ConfigError: WORLD_SIZE is not a number of processes.
    """
    return _number("WORLD_SIZE", least=1) or 1


def is_first_process() -> bool:
    """Return whether this process speaks for the launch, even one that cannot be read."""
    try:
        return read_launch().is_first
    except ConfigError:
        return True


def read_launch() -> Launch:
    """Return rank and world size of this process.

    RANK or LOCAL_RANK without WORLD_SIZE are ignored, and so is any of them with a WORLD_SIZE of 1.

    Raises:
        ConfigError: a variable is not a number, or the numbers contradict each other.
    """
    world, rank = world_size(), _number("RANK", least=0)
    local_rank, local_world = _number("LOCAL_RANK", least=0), _number("LOCAL_WORLD_SIZE", least=1)
    if world == 1:
        return Launch()
    if rank is None:
        raise ConfigError(f"WORLD_SIZE is {world}, but RANK is not set. {START_OR_UNSET}")
    if rank >= world:
        raise ConfigError(
            f"RANK is {rank}, but WORLD_SIZE {world} counts ranks from 0 to {world - 1}. {START_OR_UNSET}"
        )
    if local_world is not None and not (local_rank or 0) < local_world <= world:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank or 0} and LOCAL_WORLD_SIZE {local_world}, which WORLD_SIZE {world} does not allow. "
            f"{START_OR_UNSET}"
        )
    local_rank, local_world = local_rank or 0, local_world or 1
    # torchrun numbers processes like this when all machines have n each: n consecutive ranks are one machine.
    in_order = world % local_world == 0 and rank % local_world == local_rank
    return Launch(rank, world, local_rank, local_world if in_order and "TORCHELASTIC_RUN_ID" in os.environ else 1)


START_OR_UNSET = "Start all processes with torchrun or accelerate launch, or unset WORLD_SIZE."


def unreachable(error: BaseException) -> str:
    """Return the message for a launch whose processes cannot connect to each other."""
    return (
        f"WORLD_SIZE is {world_size()}, but the other processes cannot be reached ({error}). Start all of them with "
        "torchrun or accelerate launch, or unset WORLD_SIZE."
    )


def settle_launch(*, shards: bool = False) -> Launch:
    """Return the launch, and remove every environment variable that contradicts it or the options.

    Call it before the libraries are imported, and again in functions that may be called without the commands. Logs a
    warning for each removed variable that would have changed a result.

    Args:
        shards: weights may be sharded over ranks, as accelerate's settings say.

    Raises:
        ConfigError: see `read_launch`; a setting of accelerate is neither true nor false; or libraries cannot be imported
            in this environment.
    """
    _check_importable()
    launch, sharding = read_launch(), sharding_asked_for()
    warnings = [*_clear_launcher(launch, sharding=bool(sharding)), *_clear_settings(kept=sharding if shards else [])]
    if launch.is_first:
        for line in warnings:
            warn(line)
    return launch


def _check_importable() -> None:
    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python runs without docstrings (PYTHONOPTIMIZE=2, python -OO), which transformers needs to be imported. "
            "Unset PYTHONOPTIMIZE."
        )
    for name, kind in _NUMBERS_OF_LIBRARIES.items():
        try:
            kind(os.environ.get(name, "0"))
        except ValueError:
            raise ConfigError(
                f"{name} is {_shown(name)!r} in the environment, which is not a number. Set a number, or unset it."
            ) from None


def sharding_asked_for() -> list[str]:
    """Return the sharding method that accelerate's settings name, as a list of none or one.

    Raises:
        ConfigError: a setting is neither true nor false.
    """
    return [way for way, (name, _) in _SHARDING.items() if _flag(name)]


def gpus_sharing_weights() -> int | None:
    """Return the number of GPUs that share one copy of weights, gradients and moments; 1 without sharding.

    None if it is unknown: DeepSpeed shards what its stage says, and FSDP may keep its shards on the host.
    """
    ways = sharding_asked_for()
    offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "").strip().lower() in _TRUE
    if not ways:
        return 1
    return None if offloads or "FSDP" not in ways else world_size()


def reads_weights() -> bool:
    """Return whether this process reads a model's weights: with accelerate's `fsdp_cpu_ram_efficient_loading` one of each
    machine does, and the others get their parts when the model is sharded.
    """
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").strip().lower() in _TRUE
    return not (efficient and "FSDP" in sharding_asked_for()) or read_launch().local_rank == 0


def _clear_launcher(launch: Launch, *, sharding: bool) -> list[str]:
    """Remove the launcher's variables unless this is a launch, and return warnings."""
    sizes = [name for name in _MPI_SIZES if re.fullmatch("[0-9]{1,6}", _shown(name)) and int(_shown(name)) > 1]
    for name in [name for name in os.environ if _OF_MPI.fullmatch(name)]:
        del os.environ[name]
    if launch.world_size > 1:
        # Not every launcher sets it, and without it accelerate assumes a single process.
        os.environ["LOCAL_RANK"] = str(launch.local_rank)
        return []
    if not (sharding and _is_launch_of_one()):
        for name in (*_NUMBERS, *_SIZES, *_MEETING_POINT):
            os.environ.pop(name, None)
    return [
        f"{name} is ignored: this is a single process; torchrun starts several that work together" for name in sizes
    ]


def _is_launch_of_one() -> bool:
    """Return whether a launcher started this process alone. FSDP and DeepSpeed require a launch, even of one."""
    found = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return found == ["0", "0", "1"] and all(os.environ.get(name) for name in _MEETING_POINT)


def _clear_settings(*, kept: list[str]) -> list[str]:
    """Remove library settings that an option decides or that nothing here uses, and return warnings.

    Args:
        kept: sharding methods whose settings are kept.
    """
    said = []
    for name in sorted(os.environ):
        why = next((why for names, why in _DECIDED_BY.items() if names.fullmatch(name)), None)
        value = os.environ[name].lower()
        if why is None or (name in _HARMLESS and value and value in (*_TRUE, *_FALSE)):
            continue
        way = next((way for way, (asks, names) in _SHARDING.items() if name == asks or names.match(name)), None)
        if way in kept:
            continue
        detail = way is not None and name != _SHARDING[way][0]
        if not detail and value not in _NEUTRAL and not (value == "1" and name.endswith("_STEPS")):
            said.append(f"{name}={_shown(name)} is ignored: {why}")
        del os.environ[name]
        if name == _TF32 and "torch" in sys.modules:  # torch read it on import
            sys.modules["torch"].set_float32_matmul_precision("highest")
    for way in kept:
        os.environ[_SHARDING[way][0]] = "true"  # accelerate accepts no other word
    return said


def _number(name: str, *, least: int) -> int | None:
    """Return a launcher's variable as a number; None if it is not set, or for a rank of -1, which means the same."""
    text = os.environ.get(name)
    if text is None or (least == 0 and text.strip() == "-1"):
        return None
    if not re.fullmatch(r"\s*[0-9]{1,6}\s*", text) or int(text) < least:
        raise ConfigError(
            f"{name} is {_shown(name)!r} in the environment, which is no {'number of processes' if least else 'rank'}. "
            f"Launchers set it; in a process that you start yourself, unset it."
        )
    return int(text)


def _flag(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise ConfigError(
            f"{name} is {_shown(name)!r} in the environment: expected true or false. Set one, or unset it."
        )
    return text in _TRUE


def _shown(name: str) -> str:
    return printable(os.environ.get(name, ""), 40)
