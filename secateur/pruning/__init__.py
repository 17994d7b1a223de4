"""Pruning a trained model: targets, budgets, plans, and the two kinds of method."""
