"""What the learned skips cost and save, and whether they follow the theory."""
