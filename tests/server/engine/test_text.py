"""Stop strings across tokens: the text is what comes before the first one, and nothing of it leaks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from saeguard_server.engine.tokenizer import Detokenizer, Tokenizer
from support.models import VOCAB, tokenizer


def letter(token: int) -> str:
    return chr(97 + token)


letters = st.lists(st.integers(0, 2), max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(letters, stops)
def test_the_text_ends_before_the_first_stop_string(tokens: list[int], found: list[str]) -> None:
    text = Detokenizer(letter, tuple(found))
    out, read = "", ""
    for token in tokens:
        out += text.push(token)
        read += letter(token)
        assert not any(stop in out for stop in found), "a stop string was sent"
        assert read.startswith(out)
        if text.stopped_by:
            break
    if text.stopped_by:
        assert read.startswith(out + text.stopped_by)
        assert min(read.find(stop) for stop in found if stop in read) == len(out)
        assert text.flush() == ""
    else:
        assert not any(stop in read for stop in found)
        assert out + text.flush() == read


@given(letters)
def test_without_stop_strings_nothing_waits(tokens: list[int]) -> None:
    text = Detokenizer(letter, ())
    assert [text.push(token) for token in tokens] == [letter(token) for token in tokens]


@given(st.text(max_size=60).filter(lambda text: text.isprintable()))
def test_streamed_tokens_give_the_text_back(text: str) -> None:
    ours = Tokenizer(tokenizer(), VOCAB)
    ids = ours._backend.encode(text, add_special_tokens=False).ids
    out = ours.detokenizer(())
    assert "".join(map(out.push, ids)) == text
