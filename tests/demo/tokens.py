"""The demonstration's tokenizer, and documents as token ids that still know their concepts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo import corpus
from demo.corpus import Document

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PAD_ID, BOS_ID, EOS_ID = (corpus.SPECIAL.index(token) for token in (corpus.PAD, corpus.BOS, corpus.EOS))


def train_tokenizer(documents: Iterable[Document], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text encodes; BOS is put before a text, and the chat template writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(corpus.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((span.text for document in documents for span in document.spans), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT, corpus.END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of these ids, special tokens included."""
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document as ids, BOS first; ``concepts`` names each token's concept, "markup" for special tokens."""

    kind: str
    ids: tuple[int, ...]
    concepts: tuple[str, ...]


def tokenise(tokenizer: PreTrainedTokenizerFast, document: Document, context: int) -> Tokens:
    """At most ``context`` tokens of the document; EOS ends it where it fits."""
    encoded = tokenizer(document.text, return_offsets_mapping=True, truncation=True, max_length=context)
    owner = [span.concept for span in document.spans for _ in span.text]
    ids, concepts = [], []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids.append(int(token))
        # A token is its last character's: a leading space belongs to the word behind it.
        concepts.append("markup" if start == end else owner[end - 1])
    return Tokens(document.kind, (*ids, EOS_ID)[:context], (*concepts, "markup")[:context])
