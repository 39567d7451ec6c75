"""Hook: library messages that nobody who runs a recipe can act on are left out, each by its own words.

What is not in WARNINGS or LOGGED still shows, so a new message is seen. What comes before any hook is out of reach
here: messages of a recipe's own imports, and of accelerate's launcher before it starts the recipe.
Progress bars are drawn on a terminal, by one process of a machine; in a file they would be one long line.
"""

import logging
import os
import re
import sys
import warnings

import datasets
import transformers

WARNINGS = {  # how the message of a Python warning begins: why there is nothing to do about it
    "`is_gradient_checkpointing` is deprecated": "TRL and PEFT read the old name, which transformers still serves",
    "Paged optimizers are not supported on CPU": "a recipe's 8-bit AdamW; on a CPU it trains the same, unpaged",
    "`torch.distributed.all_gather_into_tensor` is deprecated": "DeepSpeed calls it in every step",
    "`torch.distributed.reduce_scatter_tensor` is deprecated": "DeepSpeed calls it in every step",
    "`use_liger_kernel=True` is deprecated": "what TRL advises instead downloads kernels; the recipes pin TRL",
}
LOGGED = {  # logger: how its message begins, but for accelerate's [RANK 0]
    "accelerate.accelerator": "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1,",  # never else
    "DeepSpeed": "Setting accelerator to CPU.",  # known: without a GPU a recipe stops unless --use_cpu true is given
    # two hooks may each have done their work in callback() and return a bare one
    "transformers.trainer_callback": "You are adding a <class 'transformers.trainer_callback.TrainerCallback'>",
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",  # then it counts, which is right too
}

for words in WARNINGS:
    warnings.filterwarnings("ignore", message=re.escape(words))
for logger, words in LOGGED.items():
    logging.getLogger(logger).addFilter(
        lambda record, words=words: not re.sub(r"^\[RANK \d+\] ", "", record.getMessage()).startswith(words)
    )
if not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
