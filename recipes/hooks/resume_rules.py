"""What a change of a setting means on a resume. A name that stands in no table here makes another run."""

from collections.abc import Mapping

FREE = {  # changes nothing of what is trained
    # found by its contents: tokens, template, tokenizer, weights, number of steps
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
    *("dataset_num_proc", "eval_rows", "chat_template_path", "eos_token", "pad_token"),
    *("model_name_or_path", "model_revision", "num_train_epochs", "max_steps"),
    *("lora_target_modules", "lora_target_parameters", "ignore_bias_buffers", "trust_remote_code"),
    "adapter",
    # derived from global_batch_size
    "gradient_accumulation_steps",
    # what hooks do
    *("hooks", "allow"),
    # output, logging, saving
    *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("report_to", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
    *("logging_nan_inf_filter", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen"),
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
    *("hub_always_push", "hub_revision", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    # validation
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
    *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics", "eval_packing", "bf16_full_eval", "fp16_full_eval"),
    *("do_train", "do_eval", "do_predict"),
    # how batches come to the device, and how processes talk; engines are compared by themselves
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "local_rank", "fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    *("use_cache", "debug", "skip_memory_metrics", "torch_empty_cache_steps"),
    # deprecated names of others
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
}
ROUNDING = {  # the same function, computed in another order: the same rows a step, other last digits
    *("per_device_train_batch_size", "processes", "padding_free", "pad_to_multiple_of", "auto_find_batch_size"),
    *("use_cpu", "full_determinism", "attn_implementation", "use_liger_kernel", "liger_kernel_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
}
NOT_LOADABLE = {  # the checkpoint cannot be loaded into such a run
    "use_peft": "the checkpoint holds other weights",
    "lora_r": "the checkpoint's adapters have another shape",
    "lora_target_modules": "the checkpoint's adapters lie on other layers",
    "lora_target_parameters": "the checkpoint's adapters lie on other weights",
    "lora_modules_to_save": "the checkpoint holds other weights",
    "use_dora": "the checkpoint's adapters have other weights",
    "optim": "the checkpoint holds another optimizer's state",
    "optim_args": "the checkpoint holds the optimizer's own",
    "optim_target_modules": "the checkpoint holds another optimizer's state",
    "peft_type": "the checkpoint's adapters are of another kind",
}
SAME_STATE = ({"adamw_torch", "adamw_torch_fused"}, {"adamw_8bit", "paged_adamw_8bit"})  # values of optim
DATA_SETTINGS = (  # where one of these is allowed to change, so are the tokens and the number of steps that follow
    *("max_length", "packing", "packing_strategy", "truncation_mode", "shuffle_dataset", "dataset_text_field"),
    *("dataset_kwargs", "assistant_only_loss", "completion_only_loss", "one_stream", "whole_steps"),
)
CARRIED = {  # the checkpoint's optimizer brings its own value: names in its param_groups
    "learning_rate": ("lr", "initial_lr"),
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}
ADAPTER_FLAGS = {  # name in PEFT's config: the flag
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "r": "lora_r",
    "modules_to_save": "lora_modules_to_save",
}


def rounding_names(settings: Mapping[str, object], has_router_loss: bool) -> set[str]:
    """Return which names of ROUNDING change nothing but rounding in a run with these settings.

    A mean over micro-batches, and a router's loss, depend on what is in a micro-batch; a sampler that sorts by length
    depends on how many there are in a step.
    """
    names = set(ROUNDING)
    if settings.get("micro_batch_mean") or has_router_loss:
        names -= {"per_device_train_batch_size", "auto_find_batch_size", "processes"}
    if settings.get("train_sampling_strategy") not in ("random", "sequential"):
        names -= {"per_device_train_batch_size", "auto_find_batch_size", "processes"}
    return names
