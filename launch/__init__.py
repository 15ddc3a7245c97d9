"""Command line: one short module per verb."""
