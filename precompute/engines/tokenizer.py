"""Load the reference's tokenizer, with the template and the settings that options name."""

from pathlib import Path

from offline_kto.kto_core.library_types import Tokenizer, Transformers
from offline_kto.kto_core.models.tokenizer_files import load_tokenizer, use_template
from offline_kto.precompute.config import PrecomputeConfig


def reference_tokenizer(
    auto_tokenizer: Transformers, config: PrecomputeConfig, folder: Path
) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer in a model folder, and messages for the user.

    Args:
        auto_tokenizer: `transformers.AutoTokenizer`.

    Raises:
        ModelError: the folder has no tokenizer that can be loaded.
        ConfigError: a template that cannot be read.
    """
    notes: list[str] = []
    tokenizer = load_tokenizer(
        auto_tokenizer,
        folder,
        trust_remote_code=config.trust_remote_code,
        options=config.tokenizer_options,
        notes=notes,
    )
    if config.chat_template is not None or config.template_settings:
        notes += use_template(tokenizer, config.chat_template, config.template_settings)
    return tokenizer, notes
