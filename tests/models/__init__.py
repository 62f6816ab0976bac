"""The models that tests are about, in plain torch, and eager references of what a plan does to them.

For a test of one mechanism, written by hand and small:

    blocks.py      the parts of a transformer on a stream of width 8, the graph of what is built from them, and `ready`,
                   which makes a model's weights tell when one is lost
    decoders.py    streams and decoders of those parts with the habits that make rewriting hard: shared keys, caches,
                   taps, tied layers, writes in place
    tiny.py        a stream of FFNs and nothing else (`Tower`); Hugging Face's Llama and Gemma 3, tiny, under a plan by
                   their own modules
    well_known.py  decoders in the manner of well-known small repositories: nanoGPT, torchtune

For a test of a property, drawn at random:

    spec.py        what a random model is, as data that can be printed and pasted
    strategies.py  hypothesis' strategies for such models, and for plans of them
    model.py       the model of a spec, put together of bodies.py, norms.py and edits.py (edits in place)
    reference.py   what a plan makes of it, told by its own modules
    updates.py     ways to change weights between two calls

For both: capture.py (graphs, by every road), checks.py (how close is close). All but blocks.py and decoders.py know
nothing of fxfuse, so that a reference shares no code with the library.
"""

from tests.models.capture import as_tuple, capture, exported
from tests.models.checks import assert_exact, error
from tests.models.model import ResidualModel, build, make_input
from tests.models.reference import reference

__all__ = [
    "ResidualModel",
    "as_tuple",
    "assert_exact",
    "build",
    "capture",
    "error",
    "exported",
    "make_input",
    "reference",
]
