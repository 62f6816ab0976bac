"""The documents of the tasks that ship with fxfuse: drawn from small tables by a seed, the same on every machine.

Each function takes a source of random numbers and returns documents for lm_eval: ``prompt``, then either ``choices``
and the place of the right ``answer`` among them, or the ``answer`` as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TypeAlias

Document: TypeAlias = Mapping[str, str | int | list[str]]

CHOICES = 4

_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Russia Moscow, Greece Athens, Cuba Havana, "
    "Kenya Nairobi, Peru Lima, China Beijing, Ireland Dublin, Austria Vienna, Norway Oslo, Portugal Lisbon, "
    "Poland Warsaw, Hungary Budapest, Sweden Stockholm, Finland Helsinki, Germany Berlin"
)
_OPPOSITES = (
    "hot cold, big small, up down, early late, rich poor, wet dry, young old, open closed, empty full, happy sad, "
    "hard soft, light dark, fast slow, strong weak, high low, near far, loud quiet, true false, left right, clean dirty"
)
_KINDS = (
    "rose flower, oak tree, salmon fish, eagle bird, violin instrument, hammer tool, carrot vegetable, apple fruit, "
    "football sport, gold metal, shirt garment, chair furniture, wasp insect, cobra snake, spaniel dog, "
    "sedan car, physics science, Spanish language, June month, Tuesday day"
)
_PASTS = (
    "go went, eat ate, see saw, take took, run ran, write wrote, begin began, drive drove, speak spoke, buy bought, "
    "give gave, know knew, find found, think thought, bring brought, sing sang, teach taught, catch caught, "
    "fly flew, leave left"
)
_USES = (
    "cut paper|scissors, see far-away stars|telescope, tell the time|clock, open a locked door|key, "
    "keep food cold|refrigerator, stay dry in the rain|umbrella, sweep the floor|broom, eat soup|spoon, "
    "dig a hole in the garden|shovel, write on a blackboard|chalk, measure how hot it is|thermometer, "
    "find which way is north|compass, brush your hair|comb, take a photograph|camera, boil water for tea|kettle, "
    "carry your books to school|backpack, look at tiny cells|microscope, drive in a nail|hammer, "
    "dry yourself after a bath|towel, sew on a button|needle"
)

_CLOZES = (
    (_CAPITALS, "The capital of {} is"),
    (_OPPOSITES, "The opposite of {} is"),
    (_KINDS, "A question about words: what is {}? The answer: {} is a kind of"),
    (_PASTS, 'The past tense of the verb "{}" is'),
    (_USES, "What you need to {} is a"),
)

_NAMES = (
    "Anna Boris Clara David Emma Felix Greta Henry Irene Jacob Karen Louis Maria Nora Oscar Paula Quentin Rosa Simon "
    "Tina Ursula Victor Wendy Xavier Yara Zoe Alice Bruno Cecil Diana Edgar Fiona George Helen Ivan Julia Kevin Laura "
    "Martin Nina Oliver Peter Rachel Samuel Teresa Vera Walter Andrew Brian Carol Daniel Ellen Frank Grace"
).split()
_THINGS = (
    "apple ball bell book bottle bowl box brush cake camera candle card chair clock coat coin cup doll drum egg fan "
    "flag flower flute fork glass globe guitar hammer hat horn jar kettle key knife lamp letter map mask mirror needle "
    "pen phone piano plate pot radio ring rope ruler sword shell shoe spoon stamp stone table tent ticket towel toy "
    "violin wheel whistle window"
).split()
_PLACES = "cupboard drawer garage garden kitchen attic cellar office bag car".split()
_FILLERS = (
    "The {} was late again that morning.|bus train ferry tram taxi",
    "It had {} for most of the night.|rained snowed thundered hailed frozen",
    "Nobody could remember who had locked the {}.|gate stable shed barn shop",
    "A {} wind came down from the hills.|cold warm dry sharp gentle",
    "Lunch was served a little before {}.|noon one two eleven twelve",
    "The children were told to be {}.|quiet patient careful kind brave",
    "Two {} came with the morning post.|papers bills parcels magazines invitations",
    "In the village they spoke of the {} for weeks.|wedding flood market election harvest",
)


def cloze(random: Random) -> list[Document]:
    """A sentence of common knowledge, and four ends of the same kind to choose from."""
    made: list[Document] = []
    for table, sentence in _CLOZES:
        pairs = _pairs(table)
        ends = [end for _, end in pairs]
        for subject, end in pairs:
            wrong = random.sample([other for other in ends if other != end], CHOICES - 1)
            made.append(_choice(random, sentence.replace("{}", subject), end, wrong))
    random.shuffle(made)  # the first ones are of all kinds, too
    return made


def copying(random: Random, count: int = 80, length: int = 12, words: int = 2) -> list[Document]:
    """Random words, and their first ones again: what comes next? Right if all words are."""
    made: list[Document] = []
    for _ in range(count):
        drawn = [*random.sample(_THINGS, length)]
        start = random.randrange(2, length - words)
        prompt = f"{' '.join(drawn)}\n{' '.join(drawn[:start])}"
        made.append({"prompt": prompt, "answer": " " + " ".join(drawn[start : start + words])})
    return made


def arithmetic(random: Random, count: int = 120) -> list[Document]:
    """Sums and differences of small numbers, after four examples. Right if all digits are."""
    made: list[Document] = []
    for number in range(count):
        lines = [_sum(random, plus=(number + line) % 2 == 0) for line in range(5)]
        prompt = "".join(f"{left} {right}\n" for left, right in lines[:-1]) + lines[-1][0]
        made.append({"prompt": prompt, "answer": f" {lines[-1][1]}"})
    return made


def retrieval(random: Random, count: int = 40, sentences: int = 112) -> list[Document]:
    """Some 1,000 tokens of small talk, in which four sentences say who keeps which thing, and one of them again."""
    made: list[Document] = []
    for _ in range(count):
        people, things = random.sample(_NAMES, CHOICES), random.sample(_THINGS, CHOICES)
        lines = [_filler(random) for _ in range(sentences)]
        places = sorted(random.sample(range(sentences), CHOICES))
        for place, person, thing in zip(places, people, things, strict=True):
            lines[place] = f"{person} keeps a {thing} in the {random.choice(_PLACES)}."
        asked = random.randrange(CHOICES)
        wrong = [thing for thing in things if thing != things[asked]]
        made.append(_choice(random, f"{' '.join(lines)} {people[asked]} keeps a", things[asked], wrong))
    return made


def rewriting(random: Random, count: int = 50) -> list[Document]:
    """A sentence to be written as a record, after three examples: the model writes, and all of it must be right."""
    made: list[Document] = []
    for _ in range(count):
        lines = [_record(random) for _ in range(4)]
        shown = "".join(f"Sentence: {sentence}\nRecord: {record}\n\n" for sentence, record in lines[:-1])
        made.append({"prompt": f"{shown}Sentence: {lines[-1][0]}\nRecord:", "answer": lines[-1][1]})
    return made


def _choice(random: Random, prompt: str, right: str, wrong: Sequence[str]) -> Document:
    choices = [right, *wrong]
    random.shuffle(choices)
    return {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "answer": choices.index(right)}


def _pairs(table: str) -> list[tuple[str, str]]:
    made = []
    for entry in table.split(", "):
        subject, _, end = entry.rpartition("|" if "|" in entry else " ")
        made.append((subject, end))
    return made


def _filler(random: Random) -> str:
    sentence, _, words = random.choice(_FILLERS).partition("|")
    return sentence.format(random.choice(words.split()))


def _sum(random: Random, plus: bool) -> tuple[str, str]:
    one, other = random.randrange(2, 13), random.randrange(2, 10)
    return (f"{one} + {other} =", str(one + other)) if plus else (f"{one + other} - {one} =", str(other))


def _record(random: Random) -> tuple[str, str]:
    (giver, taker), thing, place = random.sample(_NAMES, 2), random.choice(_THINGS), random.choice(_PLACES)
    return f"{giver} took the {thing} from the {place} and gave it to {taker}.", f"{thing}, {place}, {giver}, {taker}"
