"""Learning which objects stand out: connectivity, several opinions, and what they are judged by."""
