"""``Accelerator``: the one method of Accelerate's that the recipe uses, and directions for the rest."""

from __future__ import annotations

from os import PathLike
from typing import Any, NoReturn

from torch import nn

from fewbits.errors import UnsupportedError
from fewbits.save import save

# the other public methods, properties and attributes of accelerate 1.15's Accelerator
_ELSEWHERE = frozenset((
    "accumulate", "ao_recipe_handler", "autocast", "autocast_handler", "backward", "check_trigger", "clear",
    "clip_grad_norm_", "clip_grad_value_", "context_parallel_rank", "data_parallel_rank",
    "data_parallel_shard_rank", "dataloader_config", "ddp_handler", "deepspeed_plugin",
    "deepspeed_ulysses_dl_adapter", "delayed_fp8_autocast", "device", "device_placement", "dispatch_batches",
    "distributed_type", "end_training", "even_batches", "flag_tensor", "fp8_backend", "fp8_enabled",
    "fp8_recipe_handler", "free_memory", "gather", "gather_for_metrics", "get_state_dict", "get_tracker",
    "gradient_accumulation_steps", "gradient_state", "has_fp8_handler", "has_lomo_optimizer", "init_handler",
    "init_trackers", "is_composable_parallelism_enabled", "is_fsdp2", "is_last_process", "is_local_main_process",
    "is_main_process", "join_uneven_inputs", "load_state", "local_main_process_first", "local_process_index", "log",
    "log_with", "logging_dir", "lomo_backward", "main_process_first", "maybe_context_parallel", "mixed_precision",
    "msamp_recipe_handler", "multi_device", "native_amp", "no_sync", "non_blocking", "num_processes",
    "on_last_process", "on_local_main_process", "on_local_process", "on_main_process", "on_process",
    "optimizer_step_was_skipped", "pad_across_processes", "parallelism_config", "pipeline_parallel_rank", "prepare",
    "prepare_data_loader", "prepare_model", "prepare_optimizer", "prepare_scheduler", "print", "process_index",
    "profile", "profile_handler", "project_configuration", "project_dir", "reduce", "register_for_checkpointing",
    "register_load_state_pre_hook", "register_save_state_pre_hook", "rng_types", "save", "save_iteration",
    "save_state", "scaler", "scaler_handler", "set_trigger", "should_save_model", "skip_first_batches",
    "split_batches", "split_between_processes", "state", "step", "step_scheduler_with_optimizer", "sync_gradients",
    "te_recipe_handler", "tensor_parallel_rank", "torch_device_mesh", "trackers", "trigger_sync_in_backward",
    "unscale_gradients", "unwrap_model", "use_distributed", "use_seedable_sampler", "use_stateful_dataloader",
    "verify_device_map", "wait_for_everyone",
))  # fmt: skip


class Accelerator:
    """Saves models; everything else that Accelerate's class of this name does is Accelerate's to do.

    Arguments of the constructor are those of training loops and are not used here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | PathLike[str],
        max_shard_size: str | int = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Save a model's weights so that ``load_and_quantize_model`` and ``fewbits.load`` load them again.

        Args:
            model: quantized or not.
            save_directory: made if it does not exist; an earlier checkpoint there is replaced as one step.
            max_shard_size: bytes of a file, such as ``"10GB"``.
            safe_serialization: safetensors, or ``False`` for ``torch.save`` files.

        Raises:
            SaveError: it could not be written; an earlier checkpoint is untouched.
        """
        save(model, save_directory, max_shard_size=max_shard_size, safe_serialization=safe_serialization)

    def __getattr__(self, name: str) -> NoReturn:
        if name in _ELSEWHERE:
            raise UnsupportedError(
                f"fewbits.accelerate.Accelerator has no {name}",
                hint=f"use accelerate.Accelerator().{name}: Accelerate's own class takes fewbits models",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
