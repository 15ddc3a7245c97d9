"""Engines that own the generator's weights and optimizer: DeepSpeed and plain Adam."""
