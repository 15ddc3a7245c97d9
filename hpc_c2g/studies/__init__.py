"""Studies: many runs as one thing, with their state, whatever happens to the machines."""
