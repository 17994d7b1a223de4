"""Attention that reads less: key blocks at several resolutions, chosen for each block of queries."""
