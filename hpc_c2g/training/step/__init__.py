"""One training step: the objective, the sharding of a batch, and the metrics of a step."""
