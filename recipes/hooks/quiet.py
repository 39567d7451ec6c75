"""Library messages that nobody who runs a recipe can act on are left out, each by its own words.

What is not in WARNINGS or LOGGED still shows, so a new message is seen. Out of reach: messages of accelerate's launcher
before it starts the recipe.
"""

import os
import sys

from data_prep.common import quiet

WARNINGS = quiet.WARNINGS | {  # how the message of a Python warning begins: why there is nothing to do about it
    "Paged optimizers are not supported on CPU": "a recipe's 8-bit AdamW; on a CPU it trains the same, unpaged",
    "`torch.distributed.all_gather_into_tensor` is deprecated": "DeepSpeed calls it in every step",
    "`torch.distributed.reduce_scatter_tensor` is deprecated": "DeepSpeed calls it in every step",
    "`use_liger_kernel=True` is deprecated": "what TRL advises instead downloads kernels; the recipes pin TRL",
    "`pad_token` is deprecated": "the recipes pin TRL; as a setting it can be read, and passed as a flag",
}
LOGGED = quiet.LOGGED | {  # logger: how its messages begin
    "accelerate.accelerator": ["Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1,"],  # never else
    "transformers.trainer_utils": ["mtime may not be reliable on this filesystem"],  # then it counts, which is right
    # a compiled set comes in packs, one to a micro-batch: there is nothing to gain from more
    "trl.trainer.sft_trainer": ["You are using a per_device_train_batch_size of 1 with padding-free training."],
}


def silence() -> None:
    """Leave out what WARNINGS and LOGGED name."""
    quiet.silence(WARNINGS, LOGGED)


def hide_progress_bars() -> None:
    """Leave progress bars to a terminal and to one process of a machine; in a file they would be one long line."""
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
