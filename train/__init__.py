"""Training, data preparation and evaluation of querier-aware LLMs."""
