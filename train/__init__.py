"""Data preparation, fine-tuning, evaluation and reports for querier-aware models."""
