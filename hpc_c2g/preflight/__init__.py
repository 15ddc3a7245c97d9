"""What would stop a study on a cluster, checked before it starts (the verb ``doctor``)."""
