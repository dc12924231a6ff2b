"""The words that documents and charts print: sixty, invented ones, and some to transfer to."""

import random
from string import ascii_lowercase


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    milk bread paper apple tea salt rice soup cake fish
    lamp chair clock glass plate knife spoon cup pen book
    bag hat coat shoe sock belt ring soap towel brush
    comb rope nail drum bell tent hammer ladder bucket candle
    mirror pillow carpet basket bottle butter cheese honey pepper sugar
    coffee lemon onion carrot pencil ticket wallet blanket mustard umbrella
    """
)
TRANSFER_NAMES = _words(
    """
    melon grape bacon juice olive scarf glove stove
    fork bean jam kite vase razor sponge kettle
    """
)
# Said in questions, where the name of an item has to stand out.
_SAID = _words(
    "the what which how much does has have price cost costs value item total sum high bar next"
)
# Sixty words alone are learned as wholes, and no other is read; those of these pictures, which are
# new on each, have to be read by their letters.
INVENTED_SHARE = 0.7
SHORTEST, LONGEST = 3, 7
_VOWELS = _words(
    "a e i o u a e i o u a e i o u y ai au ay ea ee ei eu ew ey ia ie io oa oe oi oo ou ow ua ue ui"
)
_CONSONANTS = _words(
    "b c d f g h j k l m n p r s t v w z b c d f g k l m n p r s t v bb bl br ch ck cl cr ct dd dl "
    "dr ff fl fr ft gg gl gr ll ld lf lk lm lp lt mb mm mp nd ng nk nn ns nt pl pp pr pt qu rb rc "
    "rd rf rg rk rl rm rn rp rs rt rv sc sh sk sl sm sn sp ss st str sw tch th tl tr tt tw wh x zz"
)
# How often a sound is any letter instead: no two letters are to be taken for granted.
_ANY = 0.2


def names_of(split: str, seed: int, index: int) -> tuple[str, ...]:
    """What may be printed on a picture."""
    if split == "transfer":
        return TRANSFER_NAMES
    # A generator of its own: what else is drawn is the same for all names.
    rng = random.Random(f"names {seed} {index}")
    if split == "train" and rng.random() < INVENTED_SHARE:
        return _invented(rng, len(NAMES))
    return NAMES


def _invented(rng: random.Random, count: int) -> tuple[str, ...]:
    """Different words of sounds, none of them in a list."""
    known, found = {*_SAID, *NAMES, *TRANSFER_NAMES}, []
    while len(found) < count:
        sounds = (_VOWELS, _CONSONANTS) if rng.random() < 0.15 else (_CONSONANTS, _VOWELS)
        parts = (
            ascii_lowercase if rng.random() < _ANY else sounds[part % 2]
            for part in range(rng.randint(2, 5))
        )
        word = "".join(rng.choice(part) for part in parts)
        if SHORTEST <= len(word) <= LONGEST and word not in known:
            known.add(word)
            found.append(word)
    return tuple(found)
