"""Reports of a study: curves, tables, pictures and figures, for TensorBoard and as a page to send."""
