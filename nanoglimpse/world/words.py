"""The names that documents and charts print: sixty nouns, invented words, transfer nouns."""

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
# Questions contain these words; a name that is one of them would be ambiguous.
_RESERVED = _words(
    "the what which how much does has have price cost costs value item total sum high bar next"
)
# A model learns sixty fixed words as wholes and then reads no others. On this share of the training
# pictures all names are new, so that they have to be read letter by letter.
INVENTED_SHARE = 0.7
SHORTEST, LONGEST = 3, 7
# Invented names imitate these nouns, none of which is in the lists above.
_MODELS = _words(
    """
    almond apron armchair axe bagel balloon bamboo banana barley barrel basil battery beaker
    beef beetle bench berry bicycle bin biscuit blender board boiler bolt bonnet boot bow bowl
    box bracket branch brass brick bridge brooch broom bubble bulb bun bunk button cabbage
    cabin cable cactus camera canvas cape cart carton cashew castle celery cellar cereal chain
    chalk cherry chess chest chicken chili chisel cider cinnamon clamp clay cloak cloth clove
    coal cobbler cocoa coconut coin collar compass copper cord cork corn cotton couch cradle
    crane crate crayon cream crown cumin curry curtain cushion cymbal daisy date deck desk
    diary dice diesel dish door dough dragon drawer dress drill duck dust duvet easel eggplant
    elastic engine envelope eraser fabric fan feather fender fern fiddle fig filter flag
    flannel flask flour flower flute foil folder frame fruit fudge funnel gadget garlic garment
    gate gauze ginger globe glue goggles gong gravel gravy grill guitar gutter halter ham
    hamper handle hanger harness harp hatch hazelnut heater helmet hinge hook hoop horn hose
    icing ink iron ivory jacket jar jeans jelly jewel jigsaw jug jumper kale kayak keg key kiwi
    knob label lace ladle lantern latch lavender leaf leather leek legging lentil lettuce lever
    lid lime linen lipstick loaf lock locker lotion magnet mallet mango maple marble marker
    mask mat match mattress mayonnaise meat medal mint mitten mixer mobile mop mortar motor
    muffin mug mushroom napkin necklace needle net noodle notebook nut oar oat oil orange
    orchid organ oven oyster paddle padlock paint pan panel parsley pasta paste peach peanut
    pear pebble pedal pickle pie pillar pin pipe pitcher pizza plant plaster pliers plug plum
    poster pot potato powder prawn pump pumpkin puppet purse quilt quince radish raft raisin
    rake raspberry ribbon rivet robe rocket roller rosemary rubber rug ruler rum saddle saffron
    salad salmon sandal sauce saucer sausage saw scale scooter screw seed sesame shampoo shelf
    shirt shovel shower sieve silk skate skirt sled slipper socket sofa spade spice spinach
    spring squash stamp stapler starch steak stencil stool strap straw string suit swing switch
    syrup table tablet tape tart teapot thread thyme tie tile timber tin tinsel toast toaster
    tomato tongs torch toy tractor tray trolley trouser trumpet tuba tulip tumbler tuna tunic
    turkey turnip twine tyre valve vanilla varnish veil velvet vest vinegar violin waffle wagon
    walnut washer water wax wedge wheat wheel whisk whistle wicker wig wine wire wood wool
    wreath wrench yarn yeast yoghurt zip
    """
)
# How often a letter is drawn from those that follow the last two letters in the nouns, or the last
# one; any letter is drawn otherwise.
_AFTER_TWO, _AFTER_ONE = 0.55, 0.35
_EDGE = "^"


def _followers(context: int) -> dict[str, list[str]]:
    """The letters that follow every `context` letters, once per occurrence; _EDGE ends a word."""
    found: dict[str, list[str]] = {}
    for word in (*_MODELS, *NAMES):
        text = _EDGE * context + word + _EDGE
        for i in range(context, len(text)):
            found.setdefault(text[i - context : i], []).append(text[i])
    return found


_ONE, _TWO = _followers(1), _followers(2)


def names_of(split: str, seed: int, index: int) -> tuple[str, ...]:
    """The names that may be printed on a picture."""
    if split == "transfer":
        return TRANSFER_NAMES
    # A separate generator, so that the rest of the picture does not depend on the names.
    rng = random.Random(f"names {seed} {index}")
    if split == "train" and rng.random() < INVENTED_SHARE:
        return _invented(rng, len(NAMES))
    return NAMES


def _invented(rng: random.Random, count: int) -> tuple[str, ...]:
    """Distinct words that look like nouns, in all lengths, and that are in no other list."""
    known, found = {*_RESERVED, *NAMES, *TRANSFER_NAMES}, list[str]()
    while len(found) < count:
        word, length = _word(rng), SHORTEST + len(found) % (LONGEST + 1 - SHORTEST)
        if len(word) == length and word not in known:
            known.add(word)
            found.append(word)
    return tuple(found)


def _word(rng: random.Random) -> str:
    text = _EDGE * 2
    while True:
        chance, follow = rng.random(), list(ascii_lowercase)
        if chance < _AFTER_TWO and text[-2:] in _TWO:
            follow = _TWO[text[-2:]]
        elif chance < _AFTER_TWO + _AFTER_ONE:
            follow = _ONE[text[-1]]
        letter = rng.choice(follow)
        if letter == _EDGE:
            return text[2:]
        text += letter
