"""The reference VLM: a small, real LLaVA that reads grids of handwritten digits."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
