"""Tell a run that has too few optimizer steps to learn, and the batch that would give it more."""

FEW_STEPS = 30  # below, the warmup and one fall of the rate are most of the run


def advise_steps(steps: int, batch: int, smallest: int = 1) -> str:
    """Return a clause on a run of few steps, or nothing.

    batch: rows or packs of a step (--global_batch_size); smallest: of them, what all processes take at a time.
    """
    if steps >= FEW_STEPS:
        return ""
    smaller = batch
    while smaller % 2 == 0 and smaller // 2 >= smallest and steps * batch // smaller < FEW_STEPS:
        smaller //= 2
    if smaller == batch:
        return "few: train more rows or --num_train_epochs"
    return f"few: --global_batch_size {smaller} makes about {steps * batch // smaller:,} of them"
