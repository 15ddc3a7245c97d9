"""The error of a finished run's KKT sum against the batch size, beside its bound."""
