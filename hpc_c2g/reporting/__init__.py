"""What a study came to: its curves, tables, pictures and figures, for TensorBoard and as a page to send."""
