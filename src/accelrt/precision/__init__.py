"""Numbers: how far outputs may be from right, casts, and calibration for integers. Runs no session."""
