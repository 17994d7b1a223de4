"""Scores of weights and inputs, and their sums over coupled units."""
