"""The receipt: what was applied. Field names are the same on both sides; a test compares them."""

from __future__ import annotations

from dataclasses import asdict

from saeguard.v1 import receipt_pb2 as pb
from saeguard_server.reply import InterventionReceipt, Receipt, TriggerReceipt


def receipt(of: Receipt) -> pb.Receipt:
    """A receipt as a message."""
    return pb.Receipt(
        model_digest=of.model_digest,
        steering_digest=of.steering_digest,
        interventions=[_intervention(one) for one in of.interventions],
        forward_passes=of.forward_passes,
        triggers=[_trigger(one) for one in of.triggers],
    )


def _intervention(one: InterventionReceipt) -> pb.InterventionReceipt:
    return pb.InterventionReceipt(**asdict(one))


def _trigger(one: TriggerReceipt) -> pb.TriggerReceipt:
    # Its maximum stays here: who does not write policies must not learn how near a threshold was.
    told = asdict(one)
    del told["maximum"]
    return pb.TriggerReceipt(**told)
