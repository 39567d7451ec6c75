"""Every private name of transformers, TRL, accelerate, PyTorch or DeepSpeed that this package leans on, and why.

tests/docs/test_private_names.py says which of them an upgrade has taken away, and finds uses that do not stand here. A
module-level name that is replaced for the run counts as private too.
"""

PRIVATE_NAMES = {  # where it is defined: what for
    "transformers.PreTrainedConfig._attn_implementation": "read and set: the attention that trains, and that is probed",
    "transformers.Trainer._save_checkpoint": "overridden: a checkpoint is sealed before an older one is deleted, which "
    "no callback sees in time (on_save comes after the deletion)",
    "transformers.Trainer._push_from_checkpoint": "overridden: a checkpoint is pushed once it is sealed",
    "transformers.Trainer._run_epoch": "overridden: transformers 5.23 trains one step more of a finished run",
    "transformers.Trainer._get_num_items_in_batch": "overridden: rows that accelerate repeats do not count",
    "transformers.Trainer._get_grad_norm": "overridden: the one place that sees the norm before the weights change",
    "transformers.Trainer._load_optimizer_and_scheduler": "overridden: a resume with another learning rate, where that "
    "is allowed, gives it to the optimizer once the checkpoint's state is loaded",
    "transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE": "replaced: code that comes with a model is refused, not "
    "asked about for 15 seconds",
    "trl.SFTTrainer._prepare_dataset": "called: rows as TRL tokenizes and masks them, to count truncated answers and "
    "to name the rows of a bad step",
    "deepspeed.utils.groups._get_sequence_parallel_group": "called: tokens of a row that lies on several ranks",
}
