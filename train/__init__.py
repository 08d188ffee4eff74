"""Fine-tuning gates and LoRA for a compute budget."""
