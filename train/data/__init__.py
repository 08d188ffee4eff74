"""Rows on their way to a model: where they come from, how they are read, and how they become batches."""
