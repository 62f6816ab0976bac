"""Healing: the weights of a model are changed so that, under a plan, it computes again what it computed without.

``maps`` finds what can be fitted, ``pair`` runs a model beside itself without the plan, ``ridge`` solves, ``fit`` goes
from the front to the back, ``healing`` is the verb. May import everything below planning.
"""
