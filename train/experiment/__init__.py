"""Methods side by side under one budget: the paper's table, in one command."""
