"""Files that are copied into exported folders, and run there without fxfuse, on torch and transformers alone."""
