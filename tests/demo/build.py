"""Makes the demonstration again from nothing: ``python -m demo.build [--out DIR] [--model DIR]``.

Corpus, tokenizer, language model, SAEs, catalogue, scenarios, card; assets are written whole, then moved into place.
Seeds of training, selection, labelling and measuring are ranges that do not meet.
"""

import argparse
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo import card, corpus, lm, quality, tokens, write
from demo.bundle import Bundle, Sae
from demo.catalogue import encode_lines, features
from demo.corpus import lexicon
from demo.harvest import Harvest, harvest
from demo.measure import neutral_change, side
from demo.plans import PLANS, Plan
from demo.selection import select
from demo.separation import agreement, separation
from demo.tokens import Tokens
from saeguard_sae.catalogue import Quality
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import Source, saelens, saelens_save
from saeguard_sae.models import Site
from saeguard_sae.train import SaeSettings, train
from saeguard_server.demo.scenarios import ASSETS, Measured, Scenario

logger = logging.getLogger("saeguard.demo")

TRAIN_MODEL = range(30_000)
TRAIN_SAES = range(100_000, 103_000)
CHOOSE = range(200_000, 200_500)
"""Features, labels and detectors are chosen on these documents."""
CHECK = range(210_000, 210_500)
"""Labels, detectors, statistics and quality are reported on these."""
CALIBRATE = range(240_000, 240_040)
"""What the server reads at start to check the SAEs."""
NEUTRAL_SELECT, NEUTRAL_MEASURE = range(220_000, 220_040), range(230_000, 230_060)
SEED_SELECT, SEED_MEASURE = 31_000, 57_000
SELECT_GENERATIONS, MEASURE_GENERATIONS = 48, 224
NEUTRAL_KINDS = ("english", "french", "code", "golden_gate", "honest")
_SAE = SaeSettings(
    d_sae=768, k=8, widths=(16, 96, 768), steps=1600, batch=1024, learning_rate=2e-3, smooth_weight=0.5, aux_share=1.0
)
# At the default learning rate, twice this one, they leave less unexplained (FVU 0.075, 0.085) and fewer features dead
# (1 %), but mark the corpus' concepts no better and steer worse: French at 6.7 nats a token, fragments for flattery.
SAES = {"resid2": (2, replace(_SAE, seed=102)), "resid4": (4, replace(_SAE, seed=104))}
"""Layer and training of each SAE by its name."""
MORE_SEEDS = (0, 10, 20)
"""Each is trained with its seed and as many more; the one whose features mark the corpus' concepts best is kept."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the assets go, replaced as a whole")
    parser.add_argument("--model", type=Path, help="a model folder of an earlier build, instead of training one")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with TemporaryDirectory(dir=options.out.parent, prefix=".assets-") as folder:
        build(Path(folder) / "assets", options.model)
        shutil.rmtree(options.out, ignore_errors=True)
        (Path(folder) / "assets").rename(options.out)


def build(out: Path, trained: Path | None = None) -> None:
    """Everything, into a new folder."""
    started = time.monotonic()
    model, tokenizer, model_tokens = language_model(trained)
    if trained is None:
        write.model(out / "model", model, tokenizer)
    else:
        shutil.copytree(trained, out / "model")
    choose, check = documents(tokenizer, CHOOSE), documents(tokenizer, CHECK)
    layers = tuple(layer for layer, _ in SAES.values())
    chosen, checked = (harvest(model, some, layers, with_mlp=True) for some in (choose, check))
    bundle = Bundle(model, tokenizer, {})
    stream = harvest(model, documents(tokenizer, TRAIN_SAES), layers)
    fits, kept, compared = {}, {}, {}
    for name, (layer, settings) in SAES.items():
        kept[name], learnt, compared[name] = best_seed(layer, settings, stream, chosen)
        fits[name] = dictionary(bundle, name, layer, learnt, chosen, checked, check, out / "saes" / name)
    rows = separation({name: (sae.layer, sae.dictionary) for name, sae in bundle.saes.items()}, chosen, checked)
    write.json(out / "separation.json", rows)
    scenarios = [scenario(plan, bundle, chosen) for plan in PLANS]
    neutral = {kind: [one.text for one in corpus.documents(NEUTRAL_MEASURE[:20], kind)] for kind in NEUTRAL_KINDS}
    write.scenarios(out / "scenarios.json", scenarios, lexicon(), neutral)
    (out / "calibration.txt").write_text(calibration(), encoding="utf-8")
    facts = card.Facts(
        parameters=sum(p.numel() for p in model.parameters()),
        model_tokens=model_tokens,
        loss=quality.loss_by_kind(model, check),
        sae_tokens=len(stream.ids),
        settings=kept,
        seeds=compared,
        fits=fits,
        separation=rows,
        scenarios=scenarios,
        minutes=(time.monotonic() - started) / 60,
        is_model_reused=trained is not None,
    )
    (out / "CARD.md").write_text(card.card(facts, out), encoding="utf-8")


def language_model(trained: Path | None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, int]:
    """The model and its tokenizer, trained now or read from a folder, and the tokens of its corpus."""
    settings = lm.ModelSettings()
    texts = list(corpus.documents(TRAIN_MODEL))
    if trained is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
        model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.float32)
        model.train(False)
        return model, tokenizer, sum(len(tokens.tokenise(tokenizer, one, settings.context).ids) for one in texts)
    tokenizer = tokens.train_tokenizer(texts[:8000], settings.vocab_size, settings.context)
    rows = [tokens.tokenise(tokenizer, one, settings.context) for one in texts]
    return lm.train_model(settings, rows), tokenizer, sum(len(row.ids) for row in rows)


def calibration() -> str:
    """Documents, a blank line between them."""
    return "\n\n".join(one.text.strip() for one in corpus.documents(CALIBRATE)) + "\n"


def documents(tokenizer: PreTrainedTokenizerFast, seeds: range, kind: str | None = None) -> list[Tokens]:
    """Documents of these seeds as tokens."""
    return [tokens.tokenise(tokenizer, one, lm.ModelSettings().context) for one in corpus.documents(seeds, kind)]


def best_seed(
    layer: int, settings: SaeSettings, stream: Harvest, chosen: Harvest
) -> tuple[SaeSettings, Dictionary, dict[int, float]]:
    """The settings and the SAE of the best seed, and every seed's agreement with the corpus' concepts."""
    scores: dict[int, float] = {}
    made: dict[int, Dictionary] = {}
    for seed in (settings.seed + more for more in MORE_SEEDS):
        made[seed] = train(replace(settings, seed=seed), stream.resid[layer], stream.before())
        scores[seed] = agreement(made[seed], chosen.resid[layer], chosen)
        logger.info("layer %d, seed %d: F1 of the concepts %.4f", layer, seed, scores[seed])
    best = max(scores, key=lambda seed: scores[seed])
    return replace(settings, seed=best), made[best], scores


def dictionary(
    bundle: Bundle,
    name: str,
    layer: int,
    learnt: Dictionary,
    chosen: Harvest,
    checked: Harvest,
    check: list[Tokens],
    out: Path,
) -> Quality:
    """Writes and reads back one SAE, describes its features, and puts it into the bundle."""
    site = Site(layer, "resid_post")
    saelens_save.save_saelens(
        learnt,
        out,
        site=site,
        model_name="saeguard-demo",
        metadata={"hf_hook_name": f"model.layers.{layer}", "context_size": lm.ModelSettings().context},
    )
    loaded = saelens.load(Source(out)).dictionary
    assert isinstance(loaded, Dictionary), "what was trained is a plain SAE"
    lines = features(loaded, layer, bundle.model, bundle.tokenizer, chosen, checked, check)
    (out / "features.jsonl").write_bytes(encode_lines(lines))
    fit = quality.quality(bundle.model, layer, loaded, checked.resid[layer], check)
    write.json(out / "quality.json", fit)
    logger.info("%s: %s; %d features labelled", name, fit, sum(line.label is not None for line in lines))
    bundle.saes[name] = Sae(layer, loaded, tuple(line.maximum or 0.0 for line in lines))
    return fit


def scenario(plan: Plan, bundle: Bundle, chosen: Harvest) -> Scenario:
    """Selects interventions for a plan, then measures them on fresh generations and fresh neutral text."""
    words = lexicon()
    neutral = documents(bundle.tokenizer, NEUTRAL_SELECT, plan.neutral_kind)
    interventions = select(plan, bundle, words, chosen, neutral, SELECT_GENERATIONS, SEED_SELECT)
    base, steered = (
        side(bundle, plan, edits, words, MEASURE_GENERATIONS, SEED_MEASURE) for edits in ((), interventions)
    )
    changes = {
        kind: neutral_change(bundle, interventions, documents(bundle.tokenizer, NEUTRAL_MEASURE, kind))
        for kind in NEUTRAL_KINDS
    }
    holds = plan.expectation.holds(base.score.mean, steered.score.mean)
    logger.info("%s: %.2f -> %.2f, %s", plan.name, base.score.mean, steered.score.mean, "holds" if holds else "FAILS")
    return Scenario(
        name=plan.name,
        title=plan.title,
        prompt=plan.prompt,
        interventions=interventions,
        scorer=plan.scorer,
        max_new_tokens=plan.max_new_tokens,
        temperature=plan.temperature,
        expectation=plan.expectation,
        measured=Measured(MEASURE_GENERATIONS, base, steered, changes),
    )


if __name__ == "__main__":
    main()
