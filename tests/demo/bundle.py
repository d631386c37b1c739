"""What the build has in hand once model and SAEs are trained, and one way to steer it."""

from dataclasses import dataclass

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import END, EOS
from demo.steering import LayerEdits
from demo.tokens import token_id
from saeguard_client import ChatMessage
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.edits import KINDS, Affine, Scale, Zero
from saeguard_server.demo.scenarios import ScenarioEdit


@dataclass(frozen=True, slots=True, eq=False)
class Sae:
    """A trained SAE, its layer (its site is that layer's output), and each feature's maximum."""

    layer: int
    dictionary: Dictionary
    maximum: tuple[float, ...]
    """0 where the feature never fired."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Model, tokenizer and SAEs by name."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    saes: dict[str, Sae]

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        return token_id(self.tokenizer, EOS), token_id(self.tokenizer, END)

    def prompt_ids(self, prompt: str | tuple[ChatMessage, ...]) -> list[int]:
        """A text after BOS, or a chat in the tokenizer's template with the assistant's turn begun."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        chat = [{"role": turn.role, "content": turn.content} for turn in prompt]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def edits(self, interventions: tuple[ScenarioEdit, ...]) -> tuple[LayerEdits, ...]:
        """The interventions, sorted by SAE."""
        return tuple(
            LayerEdits(
                layer=sae.layer,
                dictionary=sae.dictionary,
                features=tuple(one.feature for one in own),
                maps=tuple(affine(one, sae.maximum[one.feature]) for one in own),
            )
            for name, sae in self.saes.items()
            if (own := [one for one in interventions if one.sae == name])
        )


def affine(one: ScenarioEdit, maximum: float) -> Affine:
    """The intervention as a map of raw activations."""
    scale = maximum if one.unit == "max" else 1.0
    if one.kind == "zero":
        return Zero().affine(scale)
    if one.value is None:
        raise ValueError(f"{one.kind} of feature {one.feature} needs a value")
    if one.kind == "scale":
        return Scale(one.value).affine(scale)
    return KINDS[one.kind](one.value).affine(scale)  # type: ignore[call-arg]
