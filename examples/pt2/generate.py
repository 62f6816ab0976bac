"""Greedy text from a folder that ``fxfuse export --format pt2`` wrote, with torch and neither fxfuse nor transformers.

    python generate.py FOLDER COUNT ID [ID ...] [/ ID ...]

Prints the tokens that follow, a line for each prompt; prompts are separated by ``/``, and shorter ones are padded on
the left.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.export.pt2_archive._package import load_pt2


class Model:
    """Two compiled graphs, the weights that both read, and what caches look like."""

    def __init__(self, folder: Path) -> None:
        graphs = load_pt2(str(folder / "model.pt2")).aoti_runners
        self.prefill, self.decode = graphs["prefill"], graphs["decode"]
        self._weights = torch.load(folder / "weights.pt", mmap=True, weights_only=True)
        for graph in (self.prefill, self.decode):
            own = {name: self._weights[name] for name in graph.get_constant_fqns()}
            graph.load_constants(own, check_full_update=True, user_managed=True)
        told = self.prefill.get_metadata()
        numbers = list(map(int, told["caches"].split()))
        self._caches = [numbers[start : start + 3] for start in range(0, len(numbers), 3)]  # heads, key, value
        self._dtype = getattr(torch, told["cache_dtype"])

    def caches(self, room: int, batch: int) -> list[Tensor]:
        """Keys and values of each layer that has any, for sequences of so many tokens."""
        return [
            torch.zeros(room, batch, heads, width, dtype=self._dtype)
            for heads, key, value in self._caches
            for width in (key, value)
        ]

    def generate(self, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        """The tokens that follow: ``[batch, count]`` for prompts ``[batch, length]`` where ``mask`` is true."""
        batch, length = ids.shape
        caches, mask = self.caches(length + count, batch), torch.nn.functional.pad(mask, (0, count), value=True)
        made: list[Tensor] = []
        total = length
        while len(made) < count:
            step = self.prefill if ids.shape[1] > 1 else self.decode
            logits = step(ids, mask[:, :total].contiguous(), [cache[:total] for cache in caches])[0]
            made.append(logits.argmax(-1))
            ids, total = made[-1][:, None], total + 1
        return torch.stack(made, 1)


def main() -> None:
    folder, count, *rest = sys.argv[1:]
    prompts = [[int(each) for each in prompt.split()] for prompt in " ".join(rest).split("/")]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    for row in Model(Path(folder)).generate(ids, mask, int(count)).tolist():
        print(*row)


if __name__ == "__main__":
    main()
