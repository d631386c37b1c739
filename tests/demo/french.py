"""French sentences: the counterpart of ``english``, with gender, elision, contraction and the two past participles.

A noun knows its gender, an adjective its two (or three) forms and its place, so agreement cannot go wrong.
"""

from dataclasses import dataclass
from random import Random

PEOPLE = (
    ("Marie", "elle"), ("Paul", "il"), ("Claire", "elle"), ("Hugo", "il"), ("Louise", "elle"), ("Pierre", "il"),
    ("Camille", "elle"), ("Antoine", "il"), ("le boulanger", "il"), ("la maîtresse", "elle"), ("le vieil homme", "il"),
    ("la petite fille", "elle"), ("le roi", "il"), ("la reine", "elle"), ("le pêcheur", "il"),
    ("ma grand-mère", "elle"),
    ("mon voisin", "il"), ("le médecin", "il"), ("la voisine", "elle"), ("le jeune garçon", "il"),
)  # fmt: skip

# class of object -> nouns, each with its gender
THINGS = {
    "food": "pomme:f poire:f gâteau:m soupe:f tarte:f œuf:m orange:f fromage:m pain:m salade:f",
    "thing": "clé:f lampe:f boîte:f horloge:f panier:m parapluie:m ballon:m pièce:f cloche:f chaise:f miroir:m",
    "clothes": "chapeau:m manteau:m écharpe:f chemise:f robe:f veste:f",
    "text": "livre:m lettre:f histoire:f poème:m journal:m carte:f",
    "writing": "livre:m lettre:f histoire:f poème:m chanson:f",
    "built": "porte:f fenêtre:f maison:f bateau:m mur:m toit:m cuisine:f barrière:f",
    "animal": "chat:m chien:m cheval:m oiseau:m lapin:m canard:m vache:f souris:f mouton:m",
}

# masculine, feminine, before the noun?, masculine before a vowel
ADJECTIVES = {
    "food": (("bon", "bonne", True, "bon"), ("chaud", "chaude", False, ""), ("frais", "fraîche", False, ""),
             ("petit", "petite", True, "petit"), ("gros", "grosse", True, "gros")),
    "thing": (("vieux", "vieille", True, "vieil"), ("nouveau", "nouvelle", True, "nouvel"),
              ("rouge", "rouge", False, ""),
              ("lourd", "lourde", False, ""), ("petit", "petite", True, "petit"), ("bleu", "bleue", False, "")),
    "clothes": (("vert", "verte", False, ""), ("gris", "grise", False, ""), ("beau", "belle", True, "bel"),
                ("chaud", "chaude", False, ""), ("rouge", "rouge", False, "")),
    "text": (("long", "longue", True, "long"), ("court", "courte", False, ""), ("étrange", "étrange", False, ""),
             ("beau", "belle", True, "bel"), ("vieux", "vieille", True, "vieil")),
    "writing": (("long", "longue", True, "long"), ("court", "courte", False, ""), ("drôle", "drôle", False, ""),
                ("beau", "belle", True, "bel"), ("nouveau", "nouvelle", True, "nouvel")),
    "built": (("blanc", "blanche", False, ""), ("vieux", "vieille", True, "vieil"), ("grand", "grande", True, "grand"),
              ("petit", "petite", True, "petit"), ("vert", "verte", False, "")),
    "animal": (("noir", "noire", False, ""), ("blanc", "blanche", False, ""), ("petit", "petite", True, "petit"),
               ("jeune", "jeune", True, "jeune"), ("gros", "grosse", True, "gros")),
}  # fmt: skip

# (present, past participle after "a", classes of object)
VERBS = (
    ("achète", "acheté", "food thing clothes text"), ("trouve", "trouvé", "thing animal text"),
    ("porte", "porté", "thing food clothes"), ("peint", "peint", "built"), ("lit", "lu", "text"),
    ("écrit", "écrit", "writing"), ("mange", "mangé", "food"), ("vend", "vendu", "food thing clothes"),
    ("ouvre", "ouvert", "door"), ("nourrit", "nourri", "animal"), ("voit", "vu", "animal built thing"),
    ("aime", "aimé", "animal"), ("nettoie", "nettoyé", "built thing"), ("cache", "caché", "thing text"),
    ("dessine", "dessiné", "animal built"), ("répare", "réparé", "built thing"), ("lave", "lavé", "clothes animal"),
    ("prépare", "préparé", "food"), ("apporte", "apporté", "food thing text"), ("oublie", "oublié", "thing clothes"),
    ("suit", "suivi", "animal"), ("cherche", "cherché", "food thing clothes animal"),
)  # fmt: skip

PLACES = (
    "au marché", "près de la rivière", "sous un arbre", "dans le village", "derrière la maison", "sur la colline",
    "au bord du lac", "dans la cuisine", "devant l'école", "au bord de la mer", "dans le jardin", "chez ses amis",
    "à côté de l'église", "dans la forêt", "à la gare", "dans une petite boutique",
)  # fmt: skip
TIMES = (
    "le matin", "le soir", "après le déjeuner", "avant le dîner", "le lundi", "le dimanche", "tous les jours",
    "pendant la nuit", "en hiver", "à midi", "au printemps", "pendant l'été", "avant la tempête", "tard dans la nuit",
)  # fmt: skip
# (present, past participle after "est", which takes an e in the feminine)
MOVES = (("va", "allé"), ("retourne", "retourné"), ("arrive", "arrivé"), ("revient", "revenu"), ("descend", "descendu"))
GOALS = (
    "à la rivière", "au marché", "à l'école", "au village", "à la vieille église", "à la gare", "au jardin",
    "à la mer", "en ville", "dans la forêt",
)  # fmt: skip
COMPANY = ("avec un ami", "avec les enfants", "avec son chien", "sans un mot", "avec joie", "lentement")
REASONS = (
    ("parce que le temps est beau", "parce que le temps était beau"),
    ("parce que tout le monde a faim", "parce que tout le monde avait faim"),
    ("pendant que les enfants jouent dehors", "pendant que les enfants jouaient dehors"),
    ("même si la nuit est sombre", "même si la nuit était sombre"),
    ("avant l'arrivée des invités", "avant l'arrivée des invités"),
    ("même si la pluie est très froide", "même si la pluie était très froide"),
    ("quand le soleil se couche", "quand le soleil se couchait"),
    ("parce qu'il n'y a rien d'autre à faire", "parce qu'il n'y avait rien d'autre à faire"),
)
SCENES = (
    ("Le ciel est gris et le vent est fort.", "Le ciel était gris et le vent était fort."),
    ("Le soleil brille et les oiseaux chantent.", "Le soleil brillait et les oiseaux chantaient."),
    ("Il pleut encore.", "Il pleuvait encore."),
    ("Les rues sont calmes et vides.", "Les rues étaient calmes et vides."),
    ("Personne ne sait pourquoi.", "Personne ne savait pourquoi."),
    ("Toute la famille est ensemble.", "Toute la famille était ensemble."),
    ("C'est une belle journée.", "C'était une belle journée."),
    ("L'eau est claire et froide.", "L'eau était claire et froide."),
    ("Le dîner est presque prêt.", "Le dîner était presque prêt."),
    ("La neige couvre les champs.", "La neige couvrait les champs."),
)
# masculine, feminine, why
MOODS = (
    ("heureux", "heureuse", "parce que le temps {est} beau"), ("heureux", "heureuse", "parce que le dîner {est} prêt"),
    ("fatigué", "fatiguée", "après une longue journée"), ("fatigué", "fatiguée", "parce que la route {est} longue"),
    ("triste", "triste", "parce que l'été {est} fini"), ("triste", "triste", "parce que la maison {est} vide"),
    ("en colère", "en colère", "parce que la boutique {est} fermée"), ("fier", "fière", "de la nouvelle maison"),
    ("fier", "fière", "du beau jardin"), ("très calme", "très calme", "le soir"),
    ("un peu inquiet", "un peu inquiète", "dans le noir"),
    ("plein d'espoir", "pleine d'espoir", "parce que le printemps {est} proche"),
)  # fmt: skip
SAYINGS = (
    ("Il nous faut du pain.", "La soupe est prête !", "J'ai très faim.", "Il faut rentrer à la maison.",
     "Quelle belle journée !", "J'ai perdu la clé.", "Attends-moi !", "C'est un bon endroit.",
     "Le train est en retard."),
    ("Où est mon chapeau ?", "Qui est là ?", "Est-ce que le dîner est prêt ?", "Où est le chat ?"),
)  # fmt: skip
SAY = ((("dit", "a dit"), ("répond", "a répondu"), ("murmure", "a murmuré")), (("demande", "a demandé"),))


@dataclass(frozen=True, slots=True)
class Teller:
    """Who a paragraph is about, and whether it is told in the past."""

    name: str
    pronoun: str
    is_past: bool

    @property
    def is_feminine(self) -> bool:
        return self.pronoun == "elle"


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
        text += " et " + _deed(random, teller)
    if random.random() < 0.25:
        text += " " + random.choice(REASONS)[teller.is_past]
    return _capital(text + ".")


def _deed(random: Random, teller: Teller) -> str:
    present, participle, classes = random.choice(VERBS)
    verb = f"a {participle}" if teller.is_past else present
    return f"{verb} {_thing(random, random.choice(classes.split()))}"


def _thing(random: Random, kind: str) -> str:
    if kind == "door":
        return random.choice(("la porte", "la fenêtre", "la vieille boîte", "la lettre", "une bouteille de lait"))
    noun, gender = random.choice(THINGS[kind].split()).split(":")
    words = _described(random, kind, noun, gender == "f") if random.random() < 0.6 else noun
    if random.random() < 0.6:
        return f"{'une' if gender == 'f' else 'un'} {words}"
    if _is_vowel(words):
        return f"l'{words}"
    return f"{'la' if gender == 'f' else 'le'} {words}"


def _described(random: Random, kind: str, noun: str, is_feminine: bool) -> str:
    masculine, feminine, is_before, before_vowel = random.choice(ADJECTIVES[kind])
    if not is_before:
        return f"{noun} {feminine if is_feminine else masculine}"
    if is_feminine:
        return f"{feminine} {noun}"
    return f"{before_vowel if _is_vowel(noun) else masculine} {noun}"


def _is_vowel(words: str) -> bool:
    """Whether an article before these words elides; every h of this vocabulary is mute."""
    return words[0] in "aeiouhéêœ"


def _move(random: Random, teller: Teller, subject: str) -> str:
    present, participle = random.choice(MOVES)
    verb = f"est {participle}{'e' if teller.is_feminine else ''}" if teller.is_past else present
    text = f"{subject} {verb} {random.choice(GOALS)} {random.choice(COMPANY)}"
    return _capital(text + ("." if random.random() < 0.6 else f" {random.choice(TIMES)}."))


def _mood(random: Random, teller: Teller, subject: str) -> str:
    masculine, feminine, reason = random.choice(MOODS)
    verb = "était" if teller.is_past else "est"
    return _capital(f"{subject} {verb} {feminine if teller.is_feminine else masculine} {reason.format(est=verb)}.")


def _speech(random: Random, teller: Teller, subject: str) -> str:
    del subject  # an inverted pronoun would need other rules
    is_question = random.random() < 0.4
    saying, verb = random.choice(SAYINGS[is_question]), random.choice(SAY[is_question])[teller.is_past]
    return f"« {saying} » {verb} {teller.name}."


def _scene(random: Random, teller: Teller, subject: str) -> str:
    del subject  # a scene has no person in it
    return random.choice(SCENES)[teller.is_past]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
