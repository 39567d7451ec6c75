"""The one GPU of a process, and how often attention may be compiled for it."""

import torch.compiler
from accelerate.utils import DistributedType
from trl import SFTConfig

from ..messages import UsageError

# Flex attention is compiled anew for a mask of another kind, for autocast on or off, gradients or none, one query
# token, one block of 128, a batch of one. Training and evaluation take up to 8, which is Dynamo's own limit; with
# generation between them it was 15 to 19. Past the limit Dynamo logs a warning and runs uncompiled, where flex
# attention holds every score in memory.
RECOMPILE_LIMIT = 64


def check_visible_gpus(training_args: SFTConfig) -> None:
    """Raise UsageError for one process with several GPUs, unless `--model_init_kwargs` says where layers lie.

    TRL loads with device_map "auto": the layers would lie on all of them, and the GPUs work one after the other.
    """
    gpus = training_args.n_gpu  # 1 where there are several processes, 0 on a CPU
    init_kwargs = training_args.model_init_kwargs or {}
    if gpus <= 1 or "device_map" in init_kwargs:
        return
    raise UsageError(
        f"{gpus} GPUs are visible to one process: to train on all of them, accelerate launch --config_file "
        f"accelerate_configs/ddp_8gpu.yaml --num_processes {gpus}; on one, CUDA_VISIBLE_DEVICES=0 before the command; "
        'to spread a model that is too big for one over all, slowly, --model_init_kwargs \'{"device_map": "auto"}\''
    )


def prepare_gpu(training_args: SFTConfig) -> None:
    """Set where the model is loaded, and how often flex attention may be compiled; call it before the model is loaded.

    `training_args.model_init_kwargs` holds the recipe's attention.
    """
    set_device_map(training_args)
    if training_args.model_init_kwargs["attn_implementation"] == "flex_attention":
        config = torch.compiler.config
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)


def set_device_map(training_args: SFTConfig) -> None:
    """Have one process load the whole model on its GPU.

    TRL's "auto" goes by the memory that is free: of a GPU in use, layers would go to main memory, where 4-bit layers
    are refused and others are trained without a word. With several processes TRL loads on each GPU by itself.
    """
    device = training_args.device
    if device.type != "cuda" or training_args.distributed_state.distributed_type != DistributedType.NO:
        return
    training_args.model_init_kwargs.setdefault("device_map", {"": device.index or 0})
