"""Tied embeddings: a model that uses one matrix for its embeddings and its head is trained as one, or not there."""

from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..messages import UsageError

if TYPE_CHECKING:
    from ..trainer import SFTTrainer


def check_tied_embeddings(trainer: "SFTTrainer") -> None:
    """Raise UsageError where training would part what the model ties.

    PEFT's modules_to_save trains a copy of the embeddings or of the head, or one of each, and its weights drift away
    from the other's; with ensure_weight_tying both are one parameter.
    """
    if not isinstance(trainer.model, PeftModel):
        return
    model = trainer.model.get_base_model()
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if embeddings is None or head is None or original_weight(embeddings) is not original_weight(head):
        return
    if trained_weight(embeddings) is trained_weight(head):
        return
    copied = []
    for name, module in model.named_modules():
        if module in (embeddings, head) and isinstance(module, ModulesToSaveWrapper):
            copied.append(name.split(".")[-1])
    raise UsageError(
        f"{model.config.model_type} ties its embeddings and its head, and training would part them: a copy of "
        f"{' and one of '.join(copied)} is trained: leave {' and '.join(copied)} out of --lora_modules_to_save, or "
        "copy the recipe and set ensure_weight_tying=True in its peft_config"
    )


def original_weight(module: nn.Module) -> nn.Parameter:
    """Return the weight that the model was loaded with, whatever PEFT has put around it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module.weight


def trained_weight(module: nn.Module) -> nn.Parameter:
    """Return the weight that the model computes with; of an adapter on it, the weight below."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]].weight
    return original_weight(module)
