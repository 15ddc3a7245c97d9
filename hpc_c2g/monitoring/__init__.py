"""Watching runs: metrics.jsonl, TensorBoard, progress, image grids."""
