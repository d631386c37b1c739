"""``saeguard sae check``: what was recognised, every convention and where it came from, and whether it holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard_client.cli.columns import table
from saeguard_sae.check import CheckReport
from saeguard_sae.formats import Convention
from saeguard_sae.loading import OpenedSae
from saeguard_server import bundled
from saeguard_server.sae_cli import flags
from saeguard_server.settings import CheckSettings, ModelSettings, Settings
from saeguard_server.sources import open_source

if TYPE_CHECKING:
    from saeguard_server.engine.stock.model import LoadedModel

MIB = 2**20


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action's arguments."""
    parser = actions.add_parser(
        "check",
        help="say what an SAE is, and check it on a model",
        description="Exits with 1 when it cannot be read, or does not hold on the model.",
    )
    flags.add_sae_flags(parser)
    parser.add_argument("--model", help='local folder, Hugging Face repository, or "demo"')
    parser.add_argument("--text", type=Path, help="text like what it was trained on; default: a short English one")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="INT", help="of it that are read")
    flags.add_bound_flags(parser)
    parser.set_defaults(act=act)


def act(arguments: argparse.Namespace) -> int:
    """Prints what is found."""
    settings = flags.settings(arguments)
    opened = open_source(settings).sae
    _print(_recognised(opened))
    if arguments.model is None:
        _print(("", *_conventions(opened.found.conventions)))
        return 0
    return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    # Here, so that looking at a file does not wait for the model library.
    from saeguard_server.engine.stock import startup
    from saeguard_server.engine.stock.model import load_model
    from saeguard_server.engine.stock.saes import load_saes

    given = flags.settings(arguments)
    check = CheckSettings(text=arguments.text and str(arguments.text), max_tokens=arguments.max_tokens)
    settings = bundled.resolve(Settings(model=ModelSettings(path=arguments.model), saes=(given,), check=check))
    model = load_model(settings.model, max_context=2048)
    sae = load_saes((given,), model)[given.name]
    report = startup.measure(sae, startup.bounds_of(sae, given), model, startup.calibration(settings.check, model))
    _print(("", *_conventions(sae.conventions), "", *_measured(report, model)))
    _print(("", f"does not hold: {report.explain()}" if report.violations else f"holds: {report.explain()}"))
    return 1 if report.violations else 0


def _recognised(opened: OpenedSae) -> Iterator[str]:
    coder, found = opened.found.dictionary, opened.found
    size = sum(one.numel() * one.element_size() for one in coder.tensors().values()) / MIB
    yield f"format        {opened.format}"
    yield f"architecture  {coder.architecture}, {coder.d_sae} features"
    yield f"widths        reads {coder.d_in}, writes {coder.d_out}; {size:.1f} MiB in memory"
    yield f"trained on    {found.model or 'its files do not say'}"
    yield f"reads at      {found.reads or 'its files do not say: give --site'}"
    if found.writes:
        yield f"writes at     {', '.join(map(str, found.writes))}"
    yield f"digest        {opened.digest}"
    labelled = sum(bool(one.label) for one in opened.catalogue.features.values())
    yield f"features      {len(opened.catalogue.features)} in its catalogue, {labelled} labelled"


def _conventions(conventions: tuple[Convention, ...]) -> Iterator[str]:
    yield from table([("CONVENTION", "VALUE", "SAID BY"), *((one.name, one.value, one.source) for one in conventions)])


def _measured(report: CheckReport, model: LoadedModel) -> Iterator[str]:
    found = report.measured
    rise = None if found.ce_spliced is None or found.ce_base is None else found.ce_spliced - found.ce_base
    limits = {one.name: getattr(report.bounds, one.name) for one in fields(report.bounds)}
    yield f"on {model.info.name}, {found.tokens} tokens:"
    yield from table(
        [
            ("MEASURED", "VALUE", "ALLOWED"),
            ("L0", _number(found.l0), _range(limits["min_l0"], limits["max_l0"])),
            ("FVU", _number(found.fvu), _range(None, limits["max_fvu"])),
            ("loss, plain", _number(found.ce_base), "-"),
            ("loss, spliced", _number(found.ce_spliced), "-"),
            ("rise of the loss", _number(rise), _range(None, limits["max_ce_increase"])),
            ("never fired", _number(found.dead_share), "-"),
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "not stated"
    if low is None:
        return f"at most {high:.4g}"
    return f"at least {low:.4g}" if high is None else f"{low:.4g} to {high:.4g}"


def _print(lines: tuple[str, ...] | Iterator[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
