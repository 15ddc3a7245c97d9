"""What a run will cost on a cluster, before anyone queues for it."""
