"""Rooms of MiniGrid, and the small vision-language-action model that acts in them."""
