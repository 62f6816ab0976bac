"""The command ``fxfuse``: what each of its commands takes, and how the result is shown. May import every other room."""
