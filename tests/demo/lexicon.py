"""Words that tell English from French in this corpus."""

from random import Random

from demo import english, french, golden_gate
from saeguard_server.demo.scenarios import WORD, Lexicon

PARAGRAPHS = 3000


def lexicon() -> Lexicon:
    """Words that one language uses and the other never does; names of people are in neither."""
    names = {
        word.lower() for name, _ in english.PEOPLE + french.PEOPLE if name[0].isupper() for word in WORD.findall(name)
    }
    random = Random("lexicon")
    said = {module: _words(random, module) - names for module in (english, french, golden_gate)}
    in_english = said[english] | said[golden_gate]
    return Lexicon(french=frozenset(said[french] - in_english), english=frozenset(in_english - said[french]))


def _words(random: Random, module: object) -> set[str]:
    write = module.paragraph  # type: ignore[attr-defined]
    return {word.lower() for _ in range(PARAGRAPHS) for text in write(random, 6) for word in WORD.findall(text)}
