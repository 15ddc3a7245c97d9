"""Monitoring of runs: metrics.jsonl, TensorBoard, progress, image grids."""
