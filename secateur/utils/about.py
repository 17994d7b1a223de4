"""What the package is called in reports and on the command line."""

__version__ = "0.1.0"
