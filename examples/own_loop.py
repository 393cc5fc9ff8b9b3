"""Use KTO in your own training loop: cache, scoring forward and loss are this project's, the rest is yours.

python examples/own_loop.py refs/ path/to/base out/
"""

import sys

import torch
import transformers

import offline_kto as kto
from offline_kto.kto_core.losses.preference_losses import kl_reference_point, kto_losses
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences, sum_rows


def train(cache, base, *, batch_size=32, learning_rate=1e-6, beta=0.1):
    """Train for one pass over the rows, in the cache's order, and return the model."""
    rows = kto.open_cache(cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()  # no dropout
    add_scoring_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    def logratios(sequences):
        batch = pad_sequences([sequence.ids for sequence in sequences])
        logps = sum_rows(token_logps(model, batch).token_logps, batch.row_of_token, batch.rows)
        return logps - torch.tensor([sequence.ref_logps for sequence in sequences])  # nats, (rows,)

    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        labels = torch.tensor([row.label for row in batch])
        with torch.no_grad():  # z0: the mismatched completions of the whole batch
            kl, _ = kl_reference_point(logratios([row.mismatched for row in batch]).sum(), len(batch))
        losses = kto_losses(
            logratios([row.matched for row in batch]), labels, kl, beta=beta, weights=torch.ones(len(batch))
        )
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{start + len(batch)} of {len(rows)} rows  loss {losses.mean():.4f}  kl {kl:.4f}")
    return model


if __name__ == "__main__":
    train(*sys.argv[1:3]).save_pretrained(sys.argv[3])
