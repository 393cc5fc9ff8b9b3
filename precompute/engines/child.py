"""The child process of `engine_process`: load an engine and send its scores to the parent."""

import json
from collections.abc import Sequence

from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.kto_core.streams import encode_all
from offline_kto.precompute.engines.child_process import channel_to_parent
from offline_kto.precompute.engines.protocol import EngineSettings, Scorer, serve


def main() -> None:
    """Serve the parent process at the other end of standard input."""
    encode_all()
    channel = channel_to_parent()
    settings = json.loads(channel.recv_bytes())
    with shown_lines():  # standard output is the log
        serve(channel, lambda sequences: _load(settings, sequences))


def _load(settings: EngineSettings, sequences: Sequence[TokenIds]) -> Scorer:
    if settings["engine"] == "vllm":
        from offline_kto.precompute.engines.vllm_scorer import VllmScorer

        return VllmScorer(**settings["options"])
    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.engines.backend import load_transformers
    from offline_kto.precompute.engines.reference import Reference

    reference = Reference.find(PrecomputeConfig(**settings["options"]))
    return load_transformers(reference, sequences, save_to=settings.get("save_to"))
