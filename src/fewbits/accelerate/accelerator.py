"""``Accelerator``: the one method of Accelerate's that the recipe uses, and directions for the rest."""

from __future__ import annotations

from os import PathLike
from typing import Any, NoReturn

from torch import nn

from fewbits.errors import UnsupportedError
from fewbits.save import save

# the public methods and properties of accelerate 1.15's Accelerator: where each is to be had
_ELSEWHERE = dict.fromkeys(
    (
        "accumulate", "autocast", "backward", "clip_grad_norm_", "clip_grad_value_", "deepspeed_ulysses_dl_adapter",
        "distributed_type", "end_training", "free_memory", "clear", "gather", "gather_for_metrics", "get_state_dict",
        "get_tracker", "init_trackers", "is_composable_parallelism_enabled", "is_fsdp2", "is_last_process",
        "is_local_main_process", "is_main_process", "join_uneven_inputs", "load_state", "local_main_process_first",
        "local_process_index", "log", "lomo_backward", "main_process_first", "mixed_precision", "no_sync",
        "num_processes", "on_last_process", "on_local_main_process", "on_local_process", "on_main_process",
        "on_process", "optimizer_step_was_skipped", "pad_across_processes", "prepare", "prepare_data_loader",
        "prepare_model", "prepare_optimizer", "prepare_scheduler", "print", "process_index", "profile", "project_dir",
        "reduce", "register_for_checkpointing", "register_load_state_pre_hook", "register_save_state_pre_hook",
        "save_state", "set_trigger", "check_trigger", "skip_first_batches", "split_batches", "split_between_processes",
        "sync_gradients", "gradient_accumulation_steps", "trigger_sync_in_backward", "unscale_gradients",
        "unwrap_model", "use_distributed", "verify_device_map", "wait_for_everyone", "device", "logging_dir", "save",
        "even_batches", "dispatch_batches", "use_seedable_sampler", "non_blocking", "fp8_backend", "multi_device",
        "parallelism_config", "torch_device_mesh", "torch_tp_mesh", "tensor_parallel_rank", "pipeline_parallel_rank",
        "context_parallel_rank", "data_parallel_rank", "data_parallel_shard_rank", "is_main", "maybe_context_parallel",
        "should_save_model", "prepare_fsdp",
    ),
    "accelerate.Accelerator, which takes fewbits models",
)  # fmt: skip


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
            raise UnsupportedError(f"fewbits.accelerate.Accelerator has no {name}", hint=f"use {_ELSEWHERE[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
