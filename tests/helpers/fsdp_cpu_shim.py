"""Test only: `fsdp_cpu_shim.py RECIPE FLAGS` runs a recipe with FSDP2 on CPUs, which accelerate refuses.

accelerate turns an FSDP config into DDP under use_cpu, and into single runs without a GPU: both without a word. Here
its state believes that gloo is a GPU backend. What is proven is sharding and arithmetic, not NCCL.
"""

import runpy
import sys

import torch
import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def set_device(self):
    self.device = self.device or torch.device("cpu")


PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device
transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # bf16 is a GPU matter to it without use_cpu

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
