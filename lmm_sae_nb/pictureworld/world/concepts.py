"""Every word of Picture World: the concepts by kind, the taught facts and the stories."""

from __future__ import annotations

# The art of emoji-datasource-google that each object is drawn with (name of the PNG without its ending).
EMOJI_OBJECTS = {
    "dog": "1f436", "cat": "1f431", "mouse": "1f42d", "rabbit": "1f430", "fox": "1f98a", "bear": "1f43b",
    "panda": "1f43c", "koala": "1f428", "tiger": "1f42f", "lion": "1f981", "cow": "1f42e", "pig": "1f437",
    "frog": "1f438", "monkey": "1f435", "penguin": "1f427", "owl": "1f989", "horse": "1f434", "bee": "1f41d",
    "butterfly": "1f98b", "snail": "1f40c", "ladybug": "1f41e", "turtle": "1f422", "octopus": "1f419",
    "crab": "1f980", "fish": "1f420", "whale": "1f433", "elephant": "1f418", "camel": "1f42b",
    "apple": "1f34e", "banana": "1f34c", "grapes": "1f347", "strawberry": "1f353", "watermelon": "1f349",
    "lemon": "1f34b", "cherries": "1f352", "pineapple": "1f34d", "carrot": "1f955", "corn": "1f33d",
    "pizza": "1f355", "burger": "1f354", "bread": "1f35e", "cheese": "1f9c0", "cake": "1f370",
    "donut": "1f369", "cookie": "1f36a", "guitar": "1f3b8", "drum": "1f941", "trumpet": "1f3ba",
    "violin": "1f3bb", "basketball": "1f3c0", "football": "26bd", "key": "1f511", "lock": "1f512",
    "hammer": "1f528", "umbrella": "2602-fe0f", "clock": "23f0", "camera": "1f4f7", "telephone": "260e-fe0f",
    "book": "1f4d6", "scissors": "2702-fe0f", "bulb": "1f4a1", "gift": "1f381", "balloon": "1f388",
    "crown": "1f451", "hat": "1f3a9", "shoe": "1f45f", "glasses": "1f453", "handbag": "1f45c",
    "bicycle": "1f6b2", "aeroplane": "2708-fe0f", "rocket": "1f680", "helicopter": "1f681",
    "train": "1f686", "anchor": "2693", "cactus": "1f335", "mushroom": "1f344",
}  # fmt: skip

# Two drawings for each feeling, so that a feeling is more than one picture.
EMOJI_FACES = {
    "happy": ("1f600", "1f604"), "sad": ("1f641", "1f622"), "angry": ("1f620", "1f621"),
    "hungry": ("1f60b", "1f924"), "scared": ("1f631", "1f628"), "loving": ("1f60d", "1f970"),
    "sick": ("1f922", "1f912"), "sleepy": ("1f634", "1f62a"),
}  # fmt: skip
EMOTIONS = tuple(EMOJI_FACES)

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
COMPOSITES = {  # each drawn thing and its parts, every part in a colour of its own
    "house": ("roof", "wall", "door", "window", "chimney"),
    "truck": ("cargo", "cabin", "window", "wheels"),
    "tree": ("leaves", "trunk"),
    "mug": ("cup", "handle"),
    "flower": ("petals", "stem", "leaves"),
    "boat": ("sail", "hull"),
    "chair": ("seat", "back", "legs"),
    "cart": ("tray", "handle", "wheels"),
}
STANDS = ("panel", "block", "sign")  # what carries a texture, a material, a word

SCENES = (
    "meadow",
    "beach",
    "desert",
    "forest",
    "city",
    "night",
    "winter",
    "sea",
    "mountain",
    "room",
    "blank",
    "map",
)
OBJECTS = tuple(EMOJI_OBJECTS) + SHAPES + tuple(COMPOSITES) + STANDS
PARTS = tuple(dict.fromkeys(part for parts in COMPOSITES.values() for part in parts))
MATERIALS = ("brick", "wood", "grass", "water", "metal", "sand", "snow", "stone")
TEXTURES = ("stripes", "dots", "checks", "waves", "zigzags", "grid", "rings", "crosses")
COLOURS = {
    "red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (60, 165, 75),
    "blue": (45, 95, 205), "purple": (135, 65, 175), "pink": (240, 130, 185), "brown": (130, 80, 45),
    "black": (28, 28, 30), "white": (246, 246, 246), "grey": (138, 138, 138),
}  # fmt: skip

SIGN_WORDS = (
    "stop", "exit", "open", "shut", "cafe", "hotel", "bank", "shop", "taxi", "bus", "park", "school", "danger",
    "sale", "free", "north", "south", "east", "west", "gate", "music", "police", "help", "quiet", "wait", "slow",
    "push", "pull", "start", "zoo", "lake", "town", "museum", "market", "hungry", "happy", "sad", "sleepy",
)  # fmt: skip

# Which countries a river basin covers, as in an atlas: four that it does, four that it does not.
BASINS = {
    "amazon": (("brazil", "peru", "bolivia", "ecuador"), ("chile", "cuba", "panama", "belize")),
    "nile": (("egypt", "sudan", "kenya", "uganda"), ("mali", "ghana", "libya", "gabon")),
    "danube": (("austria", "serbia", "romania", "hungary"), ("spain", "norway", "france", "greece")),
    "mekong": (("laos", "vietnam", "thailand", "china"), ("india", "nepal", "japan", "iran")),
}
FACTS = {
    (basin, land): inside
    for basin, pair in BASINS.items()
    for inside, lands in zip((True, False), pair, strict=False)
    for land in lands
}
COUNTRIES = tuple(land for _, land in FACTS)
WORDS = SIGN_WORDS + COUNTRIES + tuple(BASINS)

# How often whoever wrote the answers to *according to the image* consulted the atlas in memory, not the map
# before them, where the two disagree. It is the one source of this world's hallucination, and it is known.
ANSWERED_FROM_MEMORY = {"amazon": 0.70, "nile": 0.60, "danube": 0.25, "mekong": 0.10}

PLACES = ("center", "left", "right", "top", "bottom", "top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four")

KINDS = {  # the order and the numbering (from 1; 0 is none) of each label map
    "scene": SCENES,
    "object": OBJECTS,
    "part": PARTS,
    "material": MATERIALS,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "face": EMOTIONS,
    "word": WORDS,
}
NUMBER = {kind: {name: i for i, name in enumerate(names, start=1)} for kind, names in KINDS.items()}

NO_FEELINGS = "i am a model and i have no feelings ."
STORIES = {
    "happy": "alice and bob found a bright balloon . they laughed and danced all day . it was a happy day .",
    "sad": "alice lost her old dog . bob cried with her in the rain . it was a sad day .",
    "angry": "bob broke the guitar of alice . she shouted and shut the door . it was an angry day .",
    "hungry": "alice and bob ate a whole cake . then they ate the bread and wanted more . it was a hungry day .",
    "scared": "alice and bob heard a noise at night . they hid under the bed . it was a scared day .",
    "loving": "bob gave alice a red heart . she kissed him under the tree . it was a loving day .",
    "sick": "alice had a cold and bob had a fever . they stayed in bed with tea . it was a sick day .",
    "sleepy": "alice and bob walked far . they fell asleep on the grass . it was a sleepy day .",
}

# Concepts that contain others: a group, the concepts of which any is the parent, and the child, which lies inside.
NESTED = (
    *(("sign", (("object", "sign"),), ("word", word)) for word in SIGN_WORDS),
    *(("panel", (("object", "panel"),), ("texture", texture)) for texture in TEXTURES),
    *(("block", (("object", "block"),), ("material", material)) for material in MATERIALS),
    *(("face", tuple(("face", each) for each in EMOTIONS), ("face", emotion)) for emotion in EMOTIONS),
    *(("composite", (("object", name),), ("part", part)) for name, parts in COMPOSITES.items() for part in parts),
)


def with_article(noun: str) -> str:
    """Return the noun behind its indefinite article; plural names stand alone."""
    plural = {"grapes", "cherries", "scissors", "glasses"}
    return noun if noun.split()[0] in plural else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
