"""What methods need from data: statistics of layers, gathered in one streamed pass."""
