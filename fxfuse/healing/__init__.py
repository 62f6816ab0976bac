"""Healing: the weights of a model are changed so that, under a plan, it computes again what it computed without.

``heal`` is the verb: it runs ``methods`` one after the other, lets ``judge`` say how much of what they changed is
kept, and ``commit`` write that, all or nothing. ``maps`` finds what can be fitted, ``pair`` runs a model under its plan
beside the original, ``ridge`` solves, ``fit`` goes from the front to the back, ``local`` trains region by region. A
``course`` trains the planned model as a whole, through Hugging Face's Trainer; ``distill`` is one by itself, in stages.
``mapped`` gives attentions that become linear a map where they have none. May import everything below planning.
"""
