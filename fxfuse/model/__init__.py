"""The user's model under a plan: what leaves it, and that the plan is in force wherever its code runs.

Imports `fxfuse.plan` and `fxfuse.graph`, and asks `fxfuse.passes` where an attention ends; knows no compiler.
"""
