"""What may be skipped, and what it costs: measures, bounds, the profile of a model, and gates made from it."""
