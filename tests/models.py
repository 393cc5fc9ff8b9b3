"""Tiny models, tokenizers and rows with random but fixed content, built from nothing: no network, no files.

Weights are large enough that logits are far from flat (a token costs 1 to 10 nats), so that a wrong position, scale
or bias moves a number by much more than rounding does. Biases and norms are random too: at 0 and 1 they would hide.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

VOCABULARY = 97

_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GPT2: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 1024,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_OPT: dict[str, Any] = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "init_std": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

# What each family has that the others have not: tied weights, absolute positions, softcaps, scales, experts, windows,
# routers that draw lots, a body of another name, tables of slots.
_FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _LLAMA),
    "llama-tied": (transformers.LlamaConfig, {**_LLAMA, "tie_word_embeddings": True}),
    "gpt2": (transformers.GPT2Config, _GPT2),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **_LLAMA,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": (transformers.CohereConfig, {**_LLAMA, "logit_scale": 1.7}),
    "granite": (transformers.GraniteConfig, {**_LLAMA, "logits_scaling": 0.6}),
    "mixtral": (
        transformers.MixtralConfig,
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "mistral": (transformers.MistralConfig, {**_LLAMA, "sliding_window": 4}),
    "opt": (transformers.OPTConfig, _OPT),
    "phimoe": (transformers.PhimoeConfig, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        transformers.Llama4TextConfig,
        {**_LLAMA, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 512},
    ),
    "gpt-neo": (
        transformers.GPTNeoConfig,
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "initializer_range": 0.4,
        },
    ),
    "mpt": (
        transformers.MptConfig,
        {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 512, "initializer_range": 0.4},
    ),
    "xglm": (
        transformers.XGLMConfig,
        {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "pad_token_id": 1, "init_std": 0.4},
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A causal language model in float32 and eval mode, without a scoring forward.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights.
        overrides: fields of the family's configuration.
    """
    config_class, fields = _FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_class(**{"vocab_size": VOCABULARY, **fields, **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            parameters, saved = dict(model.named_parameters()), model.state_dict()
            constants = [constant for name, constant in saved.items() if name not in parameters]
            for vector in [*parameters.values(), *constants]:
                if vector.ndim == 1 and vector.is_floating_point():
                    vector.add_(0.2 * torch.randn_like(vector))
    return model.eval()


def random_rows(
    count: int, *, longest: int = 24, vocabulary: int = VOCABULARY, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, completion ids), int32, of mixed lengths; `longest` bounds the two together."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        total = int(random.integers(2, longest + 1))
        ids = random.integers(0, vocabulary, total).astype(np.int32)
        cut = int(random.integers(1, total))
        rows.append((ids[:cut], ids[cut:]))
    return rows


BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% if mood is defined %}{{ '<|im_start|>mood\n' + mood + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# "\u0120" is the byte-level alphabet's space.
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w"), ("o", "r"), ("\u0120w", "or"))


def tiny_tokenizer(
    *,
    bos: bool = False,
    eos: bool = True,
    closes: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    merges: Sequence[tuple[str, str]] = MERGES,
) -> Any:
    """A byte-level BPE tokenizer that merges wherever its rules match: no regular expression cuts words beforehand.

    Args:
        bos: it has a BOS token and puts it before whatever it encodes.
        eos: it has an EOS token.
        closes: it puts that EOS token behind whatever it encodes.
        chat_template: ChatML-like; None for a base model's tokenizer.
        merges: pairs of tokens, each made of earlier ones.
    """
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, START, END]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos or closes:
        around = [token for token, wanted in ((BOS, bos), ("$A", True), (EOS, closes)) if wanted]
        ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS if bos else None,
        eos_token=EOS if eos else None,
        pad_token=PAD,
        chat_template=chat_template,
    )


def save_tiny(folder: Path, family: str = "llama", *, tokenizer: Any = None, seed: int = 0, **overrides: Any) -> Path:
    """A model folder as the hub would hold it (safetensors, config, tokenizer); returns `folder`.

    Args:
        folder: made if it does not exist.
        family, seed, overrides: as for `tiny_model`.
        tokenizer: from `tiny_tokenizer`; None for one with all defaults.
    """
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    model = tiny_model(
        family,
        seed=seed,
        **{
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **overrides,
        },
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
