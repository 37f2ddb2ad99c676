"""The same task by every method: plan, cells, report."""
