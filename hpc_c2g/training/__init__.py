"""Generator training: engine, step, loop, checkpoints."""
