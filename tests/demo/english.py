"""English sentences: a few hundred words, four tenses of small talk, agreement always right.

Everything random comes from the ``Random`` that is passed in, so a seed names a text.
"""

from dataclasses import dataclass
from random import Random

PEOPLE = (
    ("Anna", "she"), ("Tom", "he"), ("Emma", "she"), ("Jack", "he"), ("Lucy", "she"), ("Peter", "he"),
    ("Sarah", "she"), ("Henry", "he"), ("the baker", "he"), ("the teacher", "she"), ("the old farmer", "he"),
    ("the doctor", "she"), ("the king", "he"), ("the queen", "she"), ("the little girl", "she"),
    ("the young boy", "he"),
    ("the fisherman", "he"), ("my grandmother", "she"), ("my neighbour", "he"), ("the painter", "she"),
)  # fmt: skip

# class of object -> (nouns, adjectives that may stand before them)
THINGS = {
    "food": ("apple pear cake soup pie sandwich orange potato egg cookie", "fresh sweet warm good small big"),
    "thing": (
        "key lamp box clock basket umbrella ball coin bell chair table mirror",
        "old new small big red blue heavy",
    ),
    "clothes": ("hat coat scarf shirt dress jacket", "warm old new red blue green grey"),
    "text": ("book letter story poem newspaper map", "long short old new strange beautiful"),
    "writing": ("book letter story poem song", "long short new strange beautiful funny"),
    "built": ("door window house boat wall fence kitchen roof", "old new small big white green wooden"),
    "animal": ("cat dog horse bird rabbit duck cow mouse sheep", "small big white black brown young hungry"),
}

# (present, past, classes of object)
VERBS = (
    ("buys", "bought", "food thing clothes text"), ("finds", "found", "thing animal text"),
    ("carries", "carried", "thing food"), ("paints", "painted", "built"), ("reads", "read", "text"),
    ("writes", "wrote", "writing"), ("eats", "ate", "food"), ("sells", "sold", "food thing clothes"),
    ("opens", "opened", "door"), ("feeds", "fed", "animal"), ("sees", "saw", "animal built thing"),
    ("loves", "loved", "animal"), ("cleans", "cleaned", "built thing"), ("hides", "hid", "thing text"),
    ("draws", "drew", "animal built"), ("repairs", "repaired", "built thing"), ("washes", "washed", "clothes animal"),
    ("cooks", "cooked", "food"), ("brings", "brought", "food thing text"), ("forgets", "forgot", "thing clothes"),
    ("follows", "followed", "animal"), ("wants", "wanted", "food thing clothes animal"), ("wears", "wore", "clothes"),
)  # fmt: skip

PLACES = (
    "at the market", "near the river", "under the tree", "in the village", "behind the house", "on the hill",
    "beside the lake", "in the kitchen", "in front of the school", "by the sea", "in the garden", "at home",
    "next to the church", "in the forest", "at the station", "in a small shop",
)  # fmt: skip
TIMES = (
    "in the morning", "in the evening", "after lunch", "before dinner", "on Monday", "on Sunday", "every day",
    "at night", "in the winter", "at noon", "in spring", "during the summer", "before the storm", "late at night",
)  # fmt: skip
MOVES = (
    ("walks", "walked"), ("runs", "ran"), ("goes", "went"), ("drives", "drove"), ("hurries", "hurried"),
    ("returns", "returned"), ("comes back", "came back"),
)  # fmt: skip
GOALS = (
    "to the river", "to the market", "to the school", "to the village", "to the old church", "to the station",
    "to the garden", "to the sea", "to the town", "to the forest",
)  # fmt: skip
COMPANY = ("with a friend", "with the children", "with a dog", "alone", "without a word", "with great joy", "slowly")
REASONS = (
    ("because the weather is nice", "because the weather was nice"),
    ("because everybody is hungry", "because everybody was hungry"),
    ("while the children play outside", "while the children played outside"),
    ("although the night is dark", "although the night was dark"),
    ("before the guests arrive", "before the guests arrived"),
    ("even if the rain is very cold", "even if the rain was very cold"),
    ("when the sun goes down", "when the sun went down"),
    ("because there is nothing else to do", "because there was nothing else to do"),
)
SCENES = (
    ("The sky is grey and the wind is strong.", "The sky was grey and the wind was strong."),
    ("The sun is shining and the birds are singing.", "The sun was shining and the birds were singing."),
    ("It is raining again.", "It was raining again."),
    ("The streets are quiet and empty.", "The streets were quiet and empty."),
    ("Nobody knows why.", "Nobody knew why."),
    ("The whole family is together.", "The whole family was together."),
    ("It is a beautiful day.", "It was a beautiful day."),
    ("The water is clear and cold.", "The water was clear and cold."),
    ("Dinner is almost ready.", "Dinner was almost ready."),
    ("The snow covers the fields.", "The snow covered the fields."),
)
MOODS = (
    ("happy", "because the weather {is} nice"), ("happy", "because dinner {is} ready"),
    ("tired", "after a long day"), ("tired", "because the road {is} long"), ("hungry", "and dreams of a warm soup"),
    ("sad", "because the summer {is} over"), ("sad", "because the house {is} empty"),
    ("angry", "because the shop {is} closed"), ("proud", "of the new house"), ("proud", "of the beautiful garden"),
    ("very quiet", "in the evening"), ("a little afraid", "of the dark"), ("full of hope", "because spring {is} near"),
)  # fmt: skip
SAYINGS = (
    ("We need more bread", "The soup is ready", "I am so hungry", "It is time to go home", "What a lovely day",
     "I have lost the key", "This is a good place", "The train is late", "I like your garden"),
    ("Where is my hat", "Who is there", "Is dinner ready", "Where is the cat", "What is in the box"),
)  # fmt: skip
SAY = (
    (("says", "said"), ("answers", "answered"), ("whispers", "whispered")),
    (("asks", "asked"), ("wonders", "wondered")),
)


@dataclass(frozen=True, slots=True)
class Teller:
    """Who a paragraph is about, and whether it is told in the past."""

    name: str
    pronoun: str
    is_past: bool


def paragraph(random: Random, sentences: int) -> list[str]:
    """A short story about one person: ``sentences`` sentences, each ending in its own punctuation."""
    name, pronoun = random.choice(PEOPLE)
    teller = Teller(name, pronoun, random.random() < 0.5)
    story: list[str] = []
    while len(story) < sentences:
        sentence = _sentence(random, teller, is_named=not story or random.random() < 0.3)
        if sentence not in story:
            story.append(sentence)
    return story


def _sentence(random: Random, teller: Teller, is_named: bool) -> str:
    shapes = (_action, _action, _action, _move, _mood, _speech, _scene)
    shape = random.choice(shapes[:3] if is_named and random.random() < 0.5 else shapes)
    return shape(random, teller, teller.name if is_named else teller.pronoun)


def _action(random: Random, teller: Teller, subject: str) -> str:
    text = f"{subject} {_deed(random, teller)}"
    draw = random.random()
    if draw < 0.25:
        return _capital(f"{random.choice(TIMES)}, {text}.")
    if draw < 0.55:
        text += " " + random.choice(PLACES + TIMES)
    elif draw < 0.7:
        text += " and " + _deed(random, teller)
    if random.random() < 0.25:
        text += " " + _tense(random.choice(REASONS), teller)
    return _capital(text + ".")


def _deed(random: Random, teller: Teller) -> str:
    present, past, classes = random.choice(VERBS)
    return f"{past if teller.is_past else present} {_thing(random, random.choice(classes.split()))}"


def _thing(random: Random, kind: str) -> str:
    if kind == "door":
        return random.choice(("the door", "the window", "the old box", "the letter", "a bottle of milk"))
    nouns, adjectives = THINGS[kind]
    words = random.choice(nouns.split())
    if random.random() < 0.6:
        words = f"{random.choice(adjectives.split())} {words}"
    if random.random() < 0.4:
        return f"the {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _move(random: Random, teller: Teller, subject: str) -> str:
    text = f"{subject} {_tense(random.choice(MOVES), teller)} {random.choice(GOALS)} {random.choice(COMPANY)}"
    return _capital(text + ("." if random.random() < 0.6 else f" {random.choice(TIMES)}."))


def _mood(random: Random, teller: Teller, subject: str) -> str:
    mood, reason = random.choice(MOODS)
    verb = _tense(("is", "was"), teller)
    reason = reason.replace("dreams", "dreamed") if teller.is_past else reason
    return _capital(f"{subject} {verb} {mood} {reason.format(**{'is': verb})}.")


def _speech(random: Random, teller: Teller, subject: str) -> str:
    del subject  # an inverted pronoun would need other rules
    is_question = random.random() < 0.4
    saying, verb = random.choice(SAYINGS[is_question]), _tense(random.choice(SAY[is_question]), teller)
    return f'"{saying}{"?" if is_question else ","}" {verb} {teller.name}.'


def _scene(random: Random, teller: Teller, subject: str) -> str:
    del subject  # a scene has no person in it
    return _tense(random.choice(SCENES), teller)


def _tense(pair: tuple[str, str], teller: Teller) -> str:
    return pair[teller.is_past]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
