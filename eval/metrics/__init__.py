"""Scores and shares: a pure function of each, and a `torchmetrics.Metric` over it."""
