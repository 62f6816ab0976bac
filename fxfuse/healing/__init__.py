"""Healing: the weights of a model are changed so that, under a plan, it computes again what it computed without.

``maps`` finds what can be fitted, ``pair`` runs a model under its plan beside the original, ``ridge`` solves, ``fit``
goes from the front to the back, and ``heal`` is the verb. ``distill`` trains with gradients, through Hugging Face's
Trainer. May import everything below planning.
"""
