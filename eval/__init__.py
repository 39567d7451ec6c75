"""Measure models before and after training, a command a step: python -m eval.NAME."""

from data_prep.common.quiet import silence

silence()  # before transformers is imported: it brings bitsandbytes along, which says at once what it lacks
