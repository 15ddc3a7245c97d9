"""What a training run costs: operators counted on the meta device, and the micro-batch that fits."""
