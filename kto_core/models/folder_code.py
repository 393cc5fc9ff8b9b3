"""Check Python code that comes with a model, and warn if it is not run.

A folder may declare code for its model or tokenizer (`auto_map`). Without `--trust-remote-code` transformers
loads the folder with its own class of the same model type, if it has one, even if that code would compute other
scores.
"""

import re
from pathlib import Path

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.model_files import read_json_object

_WAY_OUT = (
    "Pass --trust-remote-code to run it, if you trust its author. If transformers' own class is the right one, remove "
    "auto_map from {file}."
)


def check_model_code(folder: Path, model_type: str, classes: dict[str, str]) -> list[str]:
    """Return warnings about code that is not run; for models loaded without `--trust-remote-code`.

    Code that transformers has adopted under the same names (Phi-3, DeepSeek) only leads to a warning.

    Args:
        model_type: from the folder's config.json.
        classes: `AutoConfig`, `AutoModelForCausalLM` and `AutoModel` -> the class that is used instead of the folder's.

    Raises:
        ModelError: the code defines another class than the one that would be used.
    """
    references = _references(folder, "config.json")
    named = "AutoModelForCausalLM" if "AutoModelForCausalLM" in references else "AutoModel"
    warnings = []
    for auto_class in ("AutoConfig", named):
        reference = references.get(auto_class)
        if reference is None:
            continue
        if not _is_adopted(reference, model_type, classes[auto_class]):
            raise not_run(folder, reference, instead=classes[auto_class])
        warnings.append(
            f"{_code_file(folder, reference)} comes with the model and is not run; transformers' own {classes[auto_class]} is "
            "used (--trust-remote-code would run the file)"
        )
    return warnings


def check_tokenizer_code(folder: Path, used: str) -> list[str]:
    """Return warnings about tokenizer code that is not run.

    Args:
        used: name of the class that the tokenizer was loaded with.

    Raises:
        ModelError: the code defines another class than the one used.
    """
    reference = _references(folder, "tokenizer_config.json").get("AutoTokenizer")
    if reference is None:
        return []
    if _class_name(reference).removesuffix("Fast") != used.removesuffix("Fast"):
        raise not_run(folder, reference, instead=used, file="tokenizer_config.json")
    return [
        f"{_code_file(folder, reference)} comes with the tokenizer and is not run; transformers' own {used} is used "
        "(--trust-remote-code would run the file)"
    ]


def own_code(folder: Path) -> str | None:
    """Return the model's own code in config.json, `module.Class`, or None."""
    references = _references(folder, "config.json")
    for auto_class in ("AutoModelForCausalLM", "AutoModel", "AutoConfig"):
        if auto_class in references:
            return references[auto_class]
    return None


def not_run(folder: Path, reference: str, *, instead: str | None, file: str = "config.json") -> ModelError:
    """Return the error for code that the folder needs but that is not run."""
    used = (
        f"and transformers' {instead} would be used instead" if instead else "and transformers has no class of its own"
    )
    return ModelError(
        f"{folder}: {file} declares the model's own code, {_class_name(reference)} in {_code_file(folder, reference)}, which is not "
        f"run, {used}: its scores may differ. {_WAY_OUT.format(file=file)}"
    )


def _references(folder: Path, file: str) -> dict[str, str]:
    """Return `auto_map` of a JSON file in the folder: auto class -> `module.Class` or `org/repo--module.Class`."""
    path = folder / file
    auto_map = read_json_object(path).get("auto_map") if path.exists() else None
    if isinstance(auto_map, list | tuple):  # the format of older tokenizers
        auto_map = {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict):
        return {}
    return {name: reference for name, value in auto_map.items() if (reference := _reference(value))}


def _reference(value: object) -> str | None:
    """Return the class name of an `auto_map` entry. A tokenizer has two, slow and fast, and either may be null."""
    if isinstance(value, list | tuple):
        named = [one for one in value if isinstance(one, str)]
        return named[-1] if named else None
    return value if isinstance(value, str) else None


def _class_name(reference: str) -> str:
    return reference.rpartition(".")[2]


def _code_file(folder: Path, reference: str) -> str:
    repository, _, local = reference.rpartition("--")
    file = local.rpartition(".")[0].replace(".", "/") + ".py"
    return f"{repository}: {file}" if repository else str(folder / file)


def _is_adopted(reference: str, model_type: str, used: str) -> bool:
    """Return whether transformers has the same class in a file of the model type: `modeling_phi3.Phi3ForCausalLM`."""
    module = reference.rpartition("--")[2].rpartition(".")[0]
    family = re.sub(r"^(modeling|modelling|configuration)_", "", module)
    return _class_name(reference) == used and model_type.startswith(family)
