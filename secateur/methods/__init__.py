"""One file a published system. A file that fails to import raises: nothing is skipped silently."""
