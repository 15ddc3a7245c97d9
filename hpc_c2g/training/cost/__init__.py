"""Cost of a training run: operators counted on the meta device, and the micro-batch that fits."""
