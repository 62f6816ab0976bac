"""What each pass does to a small graph, before and after, as pages to read: ``tests/golden/<pass>.txt``.

page.py         a graph as text, the same on every machine
cases.py        the passes, each with the model that shows best what it does
test_golden.py  the pages are what the passes do; ``pytest tests/golden --update-golden`` writes them anew
"""
