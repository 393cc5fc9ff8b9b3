"""Choose class weights, and warn about settings outside published ranges with the value to use."""

from offline_kto.kto_core.errors import TrainingError
from offline_kto.train.config import USUAL_RATE, USUAL_RATE_OF_LORA, TrainConfig
from offline_kto.train.loss_traits import LOSS_TRAITS

# KTO paper, section 4.2, eq. 8: lambda_D n_D : lambda_U n_U is between 1:1 and 4:3.
BALANCE = (1.0, 4 / 3)
_MIDDLE = (BALANCE[0] * BALANCE[1]) ** 0.5

# Ranges of published KTO runs.
_BETA = (0.01, 0.5)
_BETA_SIMPO = (2.0, 10.0)  # per nat of a log-prob per token; SimPO's released configurations
_RATE = (5e-7, 5e-6)
_RATE_LORA = (5e-6, 2e-4)


def class_weight_values(config: TrainConfig, desirable: float, undesirable: float) -> tuple[float, float]:
    """Return lambda_D and lambda_U, with `auto` resolved.

    `auto` is 1 if the ratio is already in the published range. Otherwise it moves lambda_D n_D : lambda_U n_U to the
    middle of that range. If both are auto, the weight of the rarer class is raised.

    Args:
        desirable, undesirable: rows of each class in training, or their masses.

    Raises:
        TrainingError: auto next to a weight of 0.
    """
    weights = [config.desirable_weight, config.undesirable_weight]
    fixed = [1.0 if isinstance(weight, str) else float(weight) for weight in weights]
    automatic = [isinstance(weight, str) for weight in weights]
    if not any(automatic) or not desirable or not undesirable:
        return fixed[0], fixed[1]
    if 0.0 in fixed:
        raise TrainingError(
            "A class weight of auto cannot be balanced against a weight of 0. Give both weights as numbers."
        )
    ratio = fixed[0] * desirable / (fixed[1] * undesirable)
    if BALANCE[0] <= ratio <= BALANCE[1]:
        return fixed[0], fixed[1]
    raise_desirable = automatic[0] and (not automatic[1] or ratio < _MIDDLE)
    if raise_desirable:
        return fixed[0] * _MIDDLE / ratio, fixed[1]
    return fixed[0], fixed[1] * ratio / _MIDDLE


def warnings_for(
    config: TrainConfig, desirable: float, undesirable: float, weights: tuple[float, float], *, by_mass: bool = False
) -> list[str]:
    """Return one line, with the value to use, for each setting outside the published ranges.

    Args:
        desirable, undesirable: rows of each class in training, or their masses.
        by_mass: whether they are masses.
    """
    lines = class_warnings(desirable, undesirable, weights, by_mass=by_mass)
    (least, most), usual_beta = (_BETA_SIMPO, 2.0) if config.loss == "simpo" else (_BETA, 0.1)
    if not least <= config.beta <= most:
        lines.append(f"--beta {config.beta:g} is outside the published {least:g} to {most:g}; {usual_beta:g} is usual.")
    low, high = _RATE_LORA if config.lora_rank else _RATE
    if config.peak_rate == 0:
        lines.append("--learning-rate 0: nothing will be learned; this only checks the pipeline.")
    elif (usual := usual_rate(config)) is not None:
        kind = "LoRA" if config.lora_rank else "full fine-tuning"
        lines.append(
            f"--learning-rate {config.peak_rate:g} is outside the published {low:g} to {high:g} for {kind}; {usual:g} is usual."
        )
    if config.batch_size < 8 and LOSS_TRAITS[config.loss].needs_mismatched:
        lines.append(
            f"--batch-size {config.batch_size} leaves {config.batch_size} mismatched pairs for each estimate of z0; 32 is "
            "usual. Memory does not depend on it."
        )
    return lines


def usual_rate(config: TrainConfig) -> float | None:
    """Return the usual learning rate if that of a run is outside the published range; None if it is inside, or 0."""
    low, high = _RATE_LORA if config.lora_rank else _RATE
    if low <= config.peak_rate <= high or config.peak_rate == 0:
        return None
    return USUAL_RATE_OF_LORA if config.lora_rank else USUAL_RATE


def class_warnings(
    desirable: float, undesirable: float, weights: tuple[float, float], *, by_mass: bool = False
) -> list[str]:
    """Return warnings about the classes: only one class, or weights that do not balance them. Arguments: see `warnings_for`."""
    if not desirable or not undesirable:
        only = "desirable" if desirable else "undesirable"
        return [f"every training row is {only}: KTO learns from the contrast of two classes. Check the labels."]
    weighted = weights[0] * desirable, weights[1] * undesirable
    if weighted[1] and BALANCE[0] * 0.99 <= weighted[0] / weighted[1] <= BALANCE[1] * 1.01:
        return []
    return [_imbalance(desirable, undesirable, weights, by_mass=by_mass)]


def _imbalance(desirable: float, undesirable: float, weights: tuple[float, float], *, by_mass: bool) -> str:
    low = BALANCE[0] * weights[1] * undesirable / desirable
    high = BALANCE[1] * weights[1] * undesirable / desirable
    found = f"{in_digits(desirable)} desirable and {in_digits(undesirable)} undesirable"
    what = f"masses of {found}" if by_mass else f"{found} rows"
    return (
        f"{what} with weights {weights[0]:g} and {weights[1]:g} are outside the range 1:1 to 4:3; use --desirable-weight auto (or "
        f"{low:.3g} to {high:.3g})."
    )


def in_digits(rows: float) -> str:
    """Return a number of rows, or a mass, with thousands separators and at most one digit after the point."""
    return f"{rows:,.0f}" if rows == int(rows) else f"{rows:,.1f}"
