"""Models in the engines that serve them: the original and its exports in the same engine, by turns."""
