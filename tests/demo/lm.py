"""The demonstration's tokenizer and language model: a stock Llama that is trained on the corpus."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import corpus
from demo.corpus import Document
from saeguard_sae.train.quality.evaluation_data import EvaluationRow, pad_rows

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PAD_ID, BOS_ID, EOS_ID = (corpus.SPECIAL.index(token) for token in (corpus.PAD, corpus.BOS, corpus.EOS))
N_SPECIAL = len(corpus.SPECIAL)
"""Special tokens have the first ids; SAEs neither learn from them nor are read on them."""


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
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


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


def as_row(ids: Sequence[int]) -> EvaluationRow:
    """The ids as the product's evaluator reads them: special tokens are not ordinary."""
    row = torch.tensor(ids)
    return EvaluationRow(row, row >= N_SPECIAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSettings:
    """The model's shape and its training."""

    vocab_size: int = 2048
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 2
    d_mlp: int = 448
    context: int = 256
    steps: int = 1400
    batch_tokens: int = 2048
    """Tokens of one step, padding included; a batch holds documents of about the same length."""
    learning_rate: float = 2.5e-3
    seed: int = 11


def new_model(settings: LlamaSettings) -> LlamaForCausalLM:
    """An untrained model of this shape."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.d_model,
            intermediate_size=settings.d_mlp,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=settings.n_heads,
            num_key_value_heads=settings.n_kv_heads,
            max_position_embeddings=settings.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def train_model(settings: LlamaSettings, documents: list[Tokens]) -> LlamaForCausalLM:
    """AdamW, warm-up, cosine to a tenth; returned in evaluation mode with weights rounded to bfloat16 values."""
    model = new_model(settings).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    batches = batches_of(documents, settings.batch_tokens, Random(settings.seed))
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        loss = _loss(model, next(batches))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == settings.steps - 1:
            logger.info("language model step %d of %d: loss %.3f", step, settings.steps, loss.item())
    return round_weights(model.eval())


def round_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every weight at its nearest bfloat16 value, kept in float32: what is measured is what is shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def batches_of(documents: list[Tokens], batch_tokens: int, random: Random) -> Iterator[Tensor]:
    """Without end: pad_rows ids [documents, longest], documents of like length together, batches shuffled."""
    while True:
        order = sorted(documents, key=lambda document: (len(document.ids), random.random()))
        rows: list[list[Tokens]] = [[]]
        for document in order:
            if (len(rows[-1]) + 1) * len(document.ids) > batch_tokens:
                rows.append([])
            rows[-1].append(document)
        random.shuffle(rows)
        yield from (pad_rows([as_row(document.ids) for document in row]).ids for row in rows)


def _loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next token, padding left out."""
    logits: Tensor = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def save_model(folder: Path, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Config, bfloat16 weights, tokenizer and chat template; a chat ends at the end of the assistant's turn."""
    folder.mkdir(parents=True)
    end = token_id(tokenizer, corpus.END)
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, end], pad_token_id=PAD_ID
    )
    # The weights already have bfloat16 values, so this loses nothing.
    nn.Module.to(network, torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
