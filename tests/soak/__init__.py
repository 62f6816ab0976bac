"""Long runs: ``python -m tests.soak``, lives of compiled models; ``python -m tests.soak.models``, models by the ten
thousand.
"""
