"""The launch environment, the device mesh and the sums over processes."""
