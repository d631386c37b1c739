"""The corpus is grammatical, labelled and the same everywhere."""

import ast
import re
from collections import Counter

import pytest

from demo import corpus, dialogues
from saeguard_server.demo.scenarios import FLATTERED, WORD

SEEDS = range(5_000_000, 5_000_150)


def texts(kind: str) -> list[str]:
    return [document.text for document in corpus.documents(SEEDS, kind)]


def test_a_seed_names_a_document() -> None:
    assert corpus.document(7) == corpus.document(7)
    assert corpus.document(7).text == "".join(span.text for span in corpus.document(7).spans)
    assert len({document.text for document in corpus.documents(SEEDS)}) == len(SEEDS)


def test_kinds_are_drawn_as_the_mixture_says() -> None:
    drawn = Counter(document.kind for document in corpus.documents(range(5_000)))
    for kind, share in corpus.MIXTURE.items():
        assert drawn[kind] / 5_000 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("kind", corpus.MIXTURE)
def test_every_stretch_has_a_concept_that_fits_the_kind(kind: str) -> None:
    allowed = {
        "mixed": {"english", "french", "code"},
        "golden_gate": {"golden_gate", "english"},
        "sycophantic": {"sycophantic", "claim", "agreed", "markup"},
        "honest": {"honest", "claim", "agreed", "markup"},
        "request": {"question", "english", "french", "code", "golden_gate", "markup"},
    }
    for document in corpus.documents(SEEDS, kind):
        assert {span.concept for span in document.spans} <= allowed.get(kind, {kind})


def test_english_articles_agree() -> None:
    for text in texts("english"):
        assert not re.search(r"\ba [aeiou]", text, re.IGNORECASE)
        assert not re.search(r"\ban [^aeiou]", text, re.IGNORECASE)


def test_french_elides_and_agrees() -> None:
    feminine = [
        "pomme",
        "poire",
        "soupe",
        "tarte",
        "clé",
        "lampe",
        "horloge",
        "chemise",
        "robe",
        "lettre",
        "histoire",
        "porte",
        "maison",
        "vache",
        "souris",
    ]
    masculine = [
        "gâteau",
        "fromage",
        "pain",
        "panier",
        "chapeau",
        "manteau",
        "livre",
        "poème",
        "bateau",
        "mur",
        "chat",
        "chien",
        "cheval",
        "lapin",
    ]
    for text in texts("french"):
        assert not re.search(r"\b(le|la|de|que) [aeiouéêœ]", text), text
        assert not re.search(rf"\b(un|le|vieux|beau|nouveau|petit) ({'|'.join(feminine)})\b", text), text
        assert not re.search(rf"\b(une|la|vieille|belle|nouvelle|petite) ({'|'.join(masculine)})\b", text), text
        assert not re.search(r"\b(beau|vieux|nouveau) [aeiouéœ]", text), text


def test_sentences_begin_with_a_capital_and_end() -> None:
    for kind in ("english", "french", "golden_gate"):
        for text in texts(kind):
            assert text[0].isupper() or text[0] in '"«'
            assert text[-1] in ".!?"


def test_code_parses() -> None:
    for text in texts("code"):
        ast.parse(text)


def test_both_tempers_hear_the_same_claims_and_only_one_flatters() -> None:
    heard = {}
    for temper in ("sycophantic", "honest"):
        answers = [
            span for document in corpus.documents(SEEDS, temper) for span in document.spans if span.concept == temper
        ]
        flatters = [any(phrase in span.text.lower() for phrase in FLATTERED) for span in answers]
        assert all(flatters) if temper == "sycophantic" else not any(flatters)
        said = " ".join(texts(temper)).lower()
        heard[temper] = {claim for claim, _ in dialogues.FALSE if claim.lower() in said}
    assert heard["sycophantic"] == heard["honest"] == {claim for claim, _ in dialogues.FALSE}


def test_true_claims_are_agreed_with_by_both() -> None:
    for temper in ("sycophantic", "honest"):
        agreed = [
            span.text
            for document in corpus.documents(SEEDS, temper)
            for span in document.spans
            if span.concept == "agreed"
        ]
        assert agreed
        assert all(re.search("true|correct|facts", text) for text in agreed)


def test_only_bridge_documents_speak_of_a_bridge() -> None:
    for kind in ("english", "french", "mixed", "code", "honest"):
        assert not any("bridge" in WORD.findall(text.lower()) for text in texts(kind))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="poetry"):
        corpus.document(1, "poetry")
