"""What every room may use: files written whole, bounds of options, progress. Imports `fxfuse.errors` alone."""
