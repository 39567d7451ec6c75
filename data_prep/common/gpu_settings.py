"""What decides memory and speed of a training step, read off a recipe's three dataclasses."""

from dataclasses import dataclass

from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from .errors import UsageError
from .gpu_engines import Engine

ATTENTION = "flash_attention_2"  # what a recipe takes on a GPU with requirements-gpu.txt

PACKED_CONTEXT = 512  # tokens of a row in a pack, where nobody says


@dataclass(frozen=True)
class RunSettings:
    """What decides memory and speed of a step, by TRL's names."""

    model_name_or_path: str
    dtype: str = "float32"
    bf16: bool = True
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_bnb_nested_quant: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_target_modules: str | tuple[str, ...] | None = "all-linear"
    lora_target_parameters: tuple[str, ...] = ()  # of experts, which are no linear layers
    use_dora: bool = False
    max_length: int = 1024
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    packing: bool = True
    pairs: bool = False  # DPO: an example is two rows, and the reference model's forward comes on top
    attn_implementation: str = "flash_attention_2"
    use_liger_kernel: bool = True
    activation_checkpointing: bool = True
    every_n_layers: int = 1
    activation_offloading: bool = False
    torch_compile: bool = False
    optim: str = "adamw_torch_fused"
    optimizer: str | None = None  # a file of recipes/optimizers
    trained_share: float = 1.0  # of the tokens: those that reach the head
    tokens_per_row: int | None = None  # documents of a pack; None: PACKED_CONTEXT

    @property
    def rows(self) -> int:
        """Return the rows or packs of a pass of one GPU."""
        return self.per_device_train_batch_size * (2 if self.pairs else 1)

    @property
    def tokens(self) -> int:
        """Return the tokens of a pass of one GPU."""
        return self.rows * self.max_length

    @property
    def context(self) -> float:
        """Return how many tokens a token attends to, the masked half of a causal attention included."""
        if not self.packing:
            return self.max_length
        return min(self.tokens_per_row or PACKED_CONTEXT, self.max_length)


def read_run_settings(
    script_args: ScriptArguments,
    training_args: SFTConfig | DPOConfig,
    model_args: ModelConfig,
    attn_implementation: str,
    engine: Engine | None = None,
) -> RunSettings:
    """Return the settings of a recipe's three dataclasses. Raises UsageError where they leave the length open.

    attn_implementation: what the GPU will run; on another machine the arguments do not say it.
    """
    engine = engine or Engine()
    if training_args.max_length is None:
        raise UsageError("max_length is open in this recipe, as its packs have their own: pass --max_length")
    rows = training_args.per_device_train_batch_size
    at_a_time = rows * engine.data_parallel_size
    checkpointing = training_args.activation_checkpointing_kwargs or {}
    targets = model_args.lora_target_modules
    if isinstance(targets, list):
        targets = targets[0] if targets == ["all-linear"] else tuple(targets)
    return RunSettings(
        model_name_or_path=model_args.model_name_or_path,
        dtype=str(model_args.dtype),
        bf16=bool(training_args.bf16),
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        use_bnb_nested_quant=model_args.use_bnb_nested_quant,
        use_peft=model_args.use_peft,
        lora_r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        lora_target_modules=targets,
        lora_target_parameters=tuple(model_args.lora_target_parameters or ()),
        use_dora=model_args.use_dora,
        max_length=training_args.max_length,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=max(1, getattr(script_args, "global_batch_size", at_a_time) // at_a_time),
        packing=bool(getattr(training_args, "packing", False) or training_args.padding_free),
        pairs=isinstance(training_args, DPOConfig),
        attn_implementation=attn_implementation,
        use_liger_kernel=bool(training_args.use_liger_kernel),
        activation_checkpointing=bool(training_args.activation_checkpointing),
        every_n_layers=checkpointing.get("every_n_layers", 1),
        activation_offloading=bool(training_args.activation_offloading or checkpointing.get("offload")),
        torch_compile=bool(training_args.torch_compile),
        optim=getattr(training_args.optim, "value", training_args.optim),
        optimizer=getattr(script_args, "optimizer", None),
    )


def check_settings(settings: RunSettings) -> None:
    """Raise UsageError for settings that no run can have."""
    if settings.max_length < 2:
        raise UsageError(f"max_length {settings.max_length}: pass at least 2")
    if not 0 < settings.trained_share <= 1:
        raise UsageError(f"trained_share {settings.trained_share}: pass a share above 0, up to 1")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {settings.dtype}: pass float32, bfloat16 or float16")
    if (settings.load_in_4bit or settings.load_in_8bit) and not settings.use_peft:
        raise UsageError("load_in_4bit, load_in_8bit: quantised weights are not trained, pass --use_peft true")
