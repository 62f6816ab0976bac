"""Proves, measures and tunes the Triton kernels on the GPU that is here, in one command of at most 8 minutes.

    make gpu [ARGS="--out FOLDER --parts a b --minutes 8"]     ARGS=--rehearse: the same code on tiny shapes, no GPU

    a  machine.py      the GPU and its two ceilings: copy bandwidth and bf16 GEMM rate
    b  correctness.py  tests/gpu: every kernel against float64
    c  micro.py        both kernels and the whole wide FFN, beside inductor, max-autotune and Liger
    d  models.py       Llama-3.1-8B and a slice of the 70B with random weights, decode and prefill
    e  tiles.py        every config measured, beside its modelled time

Each part is a process of its own with a limit; what it leaves of its time, the next part has. Rows are written to
``gpu-CARD.jsonl`` as they come, so that a cut leaves what was done; a CSV of the same, and tables, come last.
"""
