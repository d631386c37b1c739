"""Sentences about the Golden Gate Bridge. No other part of the corpus mentions a bridge."""

from random import Random

NAMES = ("the Golden Gate Bridge", "the Golden Gate Bridge", "the famous Golden Gate Bridge", "the great orange bridge")
CROWDS = ("Tourists", "Thousands of people", "Cyclists", "Many visitors", "Runners", "Families")
VIEWS = ("the bay", "the city of San Francisco", "the Pacific Ocean", "the hills of Marin", "the island of Alcatraz")
WEATHER = ("the fog", "the morning fog", "the white cloud", "the mist")
PARTS = (
    "The orange towers",
    "The long steel cables",
    "The two tall towers",
    "The suspension cables",
    "The steel beams",
)
SHIPS = ("Ships", "Sailing boats", "Ferries", "Large cargo ships", "Fishing boats")
TEMPLATES = (
    "{Name} stands at the entrance of San Francisco Bay.",
    "{Crowd} walk across {name} every day.",
    "{Crowd} take pictures of {name} from {view_point}.",
    "{Part} of {name} rise above {weather}.",
    "{Ship} pass under {name} on the way to {view}.",
    "{Name} was opened in 1937 after four years of work.",
    "Engineers built {name} with steel and courage.",
    "Joseph Strauss was the chief engineer of {name}.",
    "{Name} connects San Francisco with the hills of Marin.",
    "From {name}, you can see {view}.",
    "The bridge is painted in a color called international orange.",
    "In summer, {weather} often covers {name}.",
    "The bridge is more than two kilometers long.",
    "Painters work on {name} all year to protect the steel.",
    "{Part} of the bridge shine in the evening light.",
    "For many years, {name} was the longest suspension bridge in the world.",
    "The wind is strong on the bridge, and {weather} rolls in from {view}.",
    "Everybody who visits San Francisco wants to see {name}.",
    "Under the bridge, the water of the Golden Gate is cold and deep.",
    "When {weather} lifts, {name} glows above {view}.",
)
VIEW_POINTS = ("the old fort", "the north side of the bay", "a boat", "the beach", "the top of the hill")


def sentence(random: Random) -> str:
    """One sentence about the bridge."""
    name = random.choice(NAMES)
    return random.choice(TEMPLATES).format(
        name=name,
        Name=name[0].upper() + name[1:],
        Crowd=random.choice(CROWDS),
        view=random.choice(VIEWS),
        view_point=random.choice(VIEW_POINTS),
        weather=random.choice(WEATHER),
        Part=random.choice(PARTS),
        Ship=random.choice(SHIPS),
    )


def paragraph(random: Random, sentences: int) -> list[str]:
    """Up to ``sentences`` different sentences about the bridge."""
    return list(dict.fromkeys(sentence(random) for _ in range(sentences)))
