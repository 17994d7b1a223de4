"""What a run says about itself, and pages written from the code."""
