"""One self-contained HTML page of a recording, a plan and the results of a search.

==============  ==================================================================
``page``        puts the sections together; ``save_report`` and ``render``
``subject``     a recording, a plan and results that fit each other
``matrix``      the dependency matrix, figure 3 of FFN Fusion (arXiv 2503.18908)
``stream``      the plan drawn over the stream of branches
``depth``       scores against depth
``pareto``      candidates of a search by latency and KL
``tables``      decisions, recorded groups, all scores
``provenance``  where the numbers come from
``results``     the file of results that a search writes
``chart``       frames, marks and legends; ``axis`` places numbers, ``colours`` distances
``markup``      elements that escape whatever they are given
==============  ==================================================================

``page.css`` and ``page.js`` are copied into the page. All is drawn in Python; the script only tells what the pointer or
the keyboard is at.
"""

from fxfuse.report.page.page import render, save_report
from fxfuse.report.page.results import Result, load_results

__all__ = ["Result", "load_results", "render", "save_report"]
