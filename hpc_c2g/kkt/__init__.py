"""The KKT conditions of the maximum-margin problem as pure functions: no config, no distributed code."""
