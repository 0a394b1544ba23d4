"""What keeps a training alive: processes, averages, optimizers, checkpoints, the run folder."""
