"""The parser of a recipe: TRL's, whose refusals name what to write instead, and which keeps what was resolved."""

import difflib
import sys
from dataclasses import field, fields, make_dataclass

import trl
import yaml

from data_prep.common.errors import UsageError
from data_prep.common.yaml_text import load_yaml

from .messages import refuse

RENAMED = {  # names that other versions, trainers and tutorials use: what to do here
    "batch_size": "pass --global_batch_size",
    "dataset": "pass --dataset_name",
    "epochs": "pass --num_train_epochs",
    "evaluation_strategy": "pass --eval_strategy",
    "gradient_accumulation_steps": "it is derived, pass --global_batch_size",
    "group_by_length": "pass --train_sampling_strategy group_by_length",
    "lora_rank": "pass --lora_r",
    "lr": "pass --learning_rate",
    "max_seq_length": "pass --max_length",
    "micro_batch_size": "pass --per_device_train_batch_size",
    "model": "pass --model_name_or_path",
    "model_name": "pass --model_name_or_path",
    "overwrite_output_dir": "a folder in use is never overwritten: pass another --output_dir or remove the folder, or "
    "--resume_from_checkpoint true to go on there",
    "rank": "pass --lora_r",
    "resume": "pass --resume_from_checkpoint true",
    "save_safetensors": "weights are always saved so, leave it out",
    "skip_bad_rows": "write a set without them: python -m data_prep.check ROWS --recipe RECIPE --fix --out OUT",
    "torch_dtype": "pass --dtype",
    "warmup_ratio": "pass --warmup_steps, which is a share of the steps below 1",
}


KL_WEIGHT = "weight of KL(base || model) a trained token, which holds the model near its base; 0: none"
ADAPTER = "folder of a run or a checkpoint whose adapter to train on from, on the same base; none: a new adapter"
FIELDS = [
    ("kl_weight", float, field(default=0.0, metadata={"help": KL_WEIGHT})),
    ("adapter", str | None, field(default=None, metadata={"help": ADAPTER})),
]


def add_fields(script_arguments: type) -> type:
    """Return a recipe's script arguments with those that these hooks bring; a copy without them refuses the names."""
    return make_dataclass(script_arguments.__name__, FIELDS, bases=(script_arguments,))


class TrlParser(trl.TrlParser):
    """TRL's parser; refuses unknown names on the command line and in YAML with the nearest known one.

    `settings` holds, once the arguments are parsed, what DEFAULTS, YAML and flags say, as plain values: the names of
    DEFAULTS, and those that differ from TRL's own defaults. `run_settings` are what a resume compares (identity.py),
    once `before_load` has read them.
    """

    def __init__(self, dataclass_types: list[type] | tuple[type, ...], **kwargs: object) -> None:
        dataclass_types = [add_fields(dataclass_types[0]), *dataclass_types[1:]]
        super().__init__(dataclass_types, usage="%(prog)s [--config FILE] [--name value ...]", **kwargs)
        self.known_names = {field.name for dataclass_type in dataclass_types for field in fields(dataclass_type)}
        self.plain_values = vars(self.parse_args([]))
        self.recipe_names: list[str] = []
        self.settings: dict[str, object] = {}
        self.run_settings: dict[str, object] = {}

    def set_defaults_with_config(self, **kwargs: object) -> list[str]:
        """Take DEFAULTS, and later a YAML file; return what nobody knows, as TRL's."""
        if not self.recipe_names:
            self.recipe_names = list(kwargs)
        return super().set_defaults_with_config(**kwargs)

    def parse_args_and_config(self, args: list[str] | None = None, **kwargs: object) -> tuple:
        """Parse as TRL does; every refusal is one sentence, and the exit code is 2."""
        words = self.split_config_flag(sys.argv[1:] if args is None else list(args))
        if "-h" in words or "--help" in words:
            self.print_help()
            sys.exit(0)
        self.check_yaml(words)
        self.check_words(words)
        try:
            parsed = super().parse_args_and_config(words, **kwargs)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            self.error(self.explain(error))
        self.settings = self.resolve(words)
        return parsed

    def split_config_flag(self, words: list[str]) -> list[str]:
        """Turn `--config=run.yaml` into the two words that TRL looks for."""
        split = []
        for word in words:
            if word.startswith("--config="):
                split += ["--config", word.removeprefix("--config=")]
            else:
                split.append(word)
        return split

    def check_yaml(self, words: list[str]) -> None:
        """Refuse a YAML file that cannot be read, and names in it that nobody knows."""
        if "--config" not in words:
            return
        place = words.index("--config") + 1
        if place == len(words) or words[place].startswith("--"):
            self.error("--config: needs a YAML file")
        path = words[place]
        try:
            settings = load_yaml(path)
        except OSError as error:
            self.error(f"--config {path}: cannot be read ({error.strerror})")
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: is no YAML ({' '.join(str(error).split())})")
        except UsageError as error:
            self.error(f"--config {error}")
        if not isinstance(settings, dict):
            self.error(f"--config {path}: is no YAML mapping of names to values")
        for name in settings:
            if name != "env":
                self.check_name(str(name), str(name), f"--config {path}")

    def check_words(self, words: list[str]) -> None:
        """Refuse flags that nobody knows, and words that belong to no flag."""
        for word in words:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag != "--config":
                self.check_name(flag[2:].replace("-", "_"), flag, "the command line")
        if "--gradient_accumulation_steps" in {word.split("=")[0] for word in words}:
            self.error(f"--gradient_accumulation_steps: {RENAMED['gradient_accumulation_steps']}")

    def check_name(self, name: str, written: str, location: str) -> None:
        """Refuse a name that nobody knows. `written`: as it stands there."""
        if name in RENAMED and (name not in self.known_names or name == "gradient_accumulation_steps"):
            self.error(f"{location}: {written}: {RENAMED[name]}")
        if name in self.known_names or name.removeprefix("no_") in self.known_names:
            return
        nearest = difflib.get_close_matches(name, self.known_names | {"config"}, 1)
        if nearest:
            dashes = "--" if written.startswith("--") else ""
            self.error(f"{location}: {written}: no such name, the nearest is {dashes}{nearest[0]}")
        self.error(f"{location}: {written}: no such name; --help lists all")

    def explain(self, error: Exception) -> str:
        """Return a sentence for what TRL, transformers or argparse raise while arguments are parsed."""
        message = " ".join(str(error).split())
        if "bf16/gpu" in message:
            return "no GPU found: --use_cpu true trains on the CPU, slowly (`make demo` shows how)"
        if "not used by the HfArgumentParser" in message:
            words = message.partition("[")[2].rstrip("]").replace("'", "").split(", ")
            if words[0].endswith((".yaml", ".yml")):
                return f"{words[0]}: write --config {words[0]}"
            if words[0].startswith(("--no_", "--no-")):
                return f"{words[0]}: write --{words[0][5:]} false"
            return f"{' '.join(words)}: belongs to no flag"
        return message

    def resolve(self, words: list[str]) -> dict[str, object]:
        """Return the names of DEFAULTS, and those that differ from TRL's defaults, with their plain values."""
        without_config = list(words)
        if "--config" in words:
            place = words.index("--config")
            without_config = words[:place] + words[place + 2 :]
        values = vars(self.parse_args(without_config))
        return {
            name: value
            for name, value in values.items()
            if name in self.recipe_names or value != self.plain_values.get(name)
        }

    def error(self, message: str) -> None:
        """Print one sentence, once a run, and exit with 2."""
        refuse(message, 2)

    def format_help(self) -> str:
        """Return the help, which begins with what the recipe sets; then all that TRL and transformers know."""
        lines = [self.format_usage(), "Set by this recipe (DEFAULTS < --config < flags):", ""]
        for name in self.recipe_names:
            value = self.get_default(name)
            if isinstance(value, list):
                value = " ".join(map(str, value))
            lines.append(f"  --{name} {value}")
        lines += ["", "Everything that RecipeArguments, TRL's SFTConfig and ModelConfig know:", ""]
        everything = super().format_help().partition("\n\n")[2]
        return "\n".join(lines) + "\n" + everything
