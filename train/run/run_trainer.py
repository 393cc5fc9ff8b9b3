"""Build the Trainer of a run for its loaded policy."""

import torch
import transformers

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.logps import sees_whole_passes
from offline_kto.kto_core.scoring.output_layer import whole_shape
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.saved_model import ModelWriter
from offline_kto.train.run.arguments import accepted_by_trainer
from offline_kto.train.run.optimizer import own_optimizer
from offline_kto.train.run.start_check import tolerance_for
from offline_kto.train.trainer.compiled_layers import Compiling, compile_layers
from offline_kto.train.trainer.gradient_sums import BUCKET_BYTES, Sending
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.liger_layers import check_liger_supports
from offline_kto.train.trainer.memory import Meter, meter_of
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.sharding import prepare_sharding

# Tokens of a pass where memory is not measured.
_MAX_TOKENS_CPU = 1024


def make_trainer(
    config: TrainConfig,
    args: transformers.TrainingArguments,
    data: TrainingData,
    model: Model,
    files: PolicyFiles,
    objective: Objective,
    precision: Precision,
    callbacks: list[transformers.TrainerCallback],
) -> KTOTrainer:
    """Return the Trainer for a loaded policy."""
    if args.use_liger_kernel:
        check_liger_supports(model)
    if (compiling := Compiling.of(config.training)) is not None:
        compile_layers(model, compiling)
    reduce_dtype: torch.dtype = getattr(torch, config.reduce_dtype)
    bucket_mb = args.ddp_bucket_cap_mb
    with accepted_by_trainer(config):
        trainer = KTOTrainer(
            model=model,
            args=args,
            rows=data.rows,
            batches=data.batches(config),
            objective=objective,
            max_tokens=_max_tokens(config, model, args.device),
            dtype=precision.dtype,
            rounding=tolerance_for(data.rows.manifest, precision),
            held_out=data.held_out,
            may_checkpoint=config.gradient_checkpointing is None,
            keeps_best=config.keeps_best,
            optimizer_cls_and_kwargs=own_optimizer(config, args),
            writer=ModelWriter.of(files.folder, files.tokenizer, model, trust_remote_code=config.trust_remote_code),
            sending=Sending(reduce_dtype, bucket_mb * 2**20 if bucket_mb else BUCKET_BYTES),
            callbacks=callbacks,
        )
    trainer.remove_callback(transformers.PrinterCallback)
    prepare_sharding(
        trainer.accelerator,
        precision.dtype,
        merges=bool(config.lora_rank and files.adapter),
        reduce_dtype=reduce_dtype,
    )
    return trainer


def _max_tokens(config: TrainConfig, model: Model, device: torch.device) -> int | Meter:
    """Return the tokens of one pass, or a meter that measures how many fit once the model is prepared."""
    if sees_whole_passes(model):
        return 1
    if not isinstance(config.max_tokens, str):
        return config.max_tokens
    meter = meter_of(device)
    return _MAX_TOKENS_CPU if meter is None else meter


def check_vocabulary(model: Model, rows: CacheRows) -> None:
    """Check that the policy has an embedding for every token id in the cache."""
    size = whole_shape(model.get_input_embeddings().weight)[0]
    if rows.largest_id >= size:
        raise TrainingError(
            f"The cache contains token id {rows.largest_id}, but the policy's vocabulary has {size} tokens, so it is another model."
        )
