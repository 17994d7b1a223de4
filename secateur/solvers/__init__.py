"""Closed-form repair and searches."""
