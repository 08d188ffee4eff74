"""Running models and counting: answers, what was executed, time, and controlled skipping."""
