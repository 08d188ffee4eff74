"""The reference VLM: a small, real LLaVA that reads grids of handwritten digits."""
