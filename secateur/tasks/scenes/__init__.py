"""Drawn scenes with questions, and the small vision-language models that answer them."""
