"""Choices of the stationarity residual, without torch: settings are checked before torch is loaded."""

from __future__ import annotations

AUTO = "auto"
LEFT_SIDES = ("identity", "rates", "top_rate")
WEIGHTINGS = ("relative", "per_tensor", "scale_free")
