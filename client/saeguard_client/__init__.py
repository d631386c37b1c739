"""Saeguard's client: text from a language model, steered by its features, over gRPC.

    with Client("localhost:50051") as client:
        for chunk in client.generate_stream("Once", steer=[Clamp("resid4", 4021, 6.0)]):
            ...

AsyncClient has the same methods for asyncio. Failures are subclasses of SaeguardError.
"""

from saeguard_client.activations import ActivationPart, Activations, TokenText, merge
from saeguard_client.async_client import AsyncClient
from saeguard_client.catalog import (
    Feature,
    FeatureExample,
    FeatureRef,
    Limits,
    Model,
    PromotedToken,
    Quantile,
    Sae,
    SaeConvention,
    SaeQuality,
    ServerInfo,
)
from saeguard_client.client import Client
from saeguard_client.conditions import Condition, Term, Window
from saeguard_client.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    ReceiptMismatch,
    SaeguardError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from saeguard_client.inputs import ChatMessage, Input
from saeguard_client.interventions import Add, Cap, Clamp, Floor, Intervention, Scale, Zero
from saeguard_client.policies import (
    Activation,
    PolicyChange,
    PolicyFinding,
    PolicyHistory,
    PolicySet,
    PolicySummary,
    Revision,
)
from saeguard_client.results import (
    Comparison,
    Completion,
    FeatureReading,
    InterventionReceipt,
    PolicyFacts,
    Receipt,
    StoppedBy,
    StreamChunk,
    Timings,
    Token,
    TokenLogprob,
    TriggerReceipt,
    Usage,
)
from saeguard_client.scopes import Scope
from saeguard_client.triggers import Apply, Flag, Stop, Trigger

__all__ = [
    "Activation",
    "ActivationPart",
    "Activations",
    "Add",
    "Apply",
    "AsyncClient",
    "Cancelled",
    "Cap",
    "ChatMessage",
    "Clamp",
    "Client",
    "Comparison",
    "Completion",
    "Condition",
    "Conflict",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Feature",
    "FeatureExample",
    "FeatureReading",
    "FeatureRef",
    "FieldViolation",
    "Flag",
    "Floor",
    "Input",
    "InternalError",
    "Intervention",
    "InterventionReceipt",
    "InvalidRequest",
    "Limits",
    "Model",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PolicyChange",
    "PolicyFacts",
    "PolicyFinding",
    "PolicyHistory",
    "PolicySet",
    "PolicySummary",
    "PromotedToken",
    "Quantile",
    "Receipt",
    "ReceiptMismatch",
    "Revision",
    "Sae",
    "SaeConvention",
    "SaeQuality",
    "SaeguardError",
    "Scale",
    "Scope",
    "ServerInfo",
    "Stop",
    "StoppedBy",
    "StreamChunk",
    "Term",
    "Timings",
    "Token",
    "TokenLogprob",
    "TokenText",
    "Trigger",
    "TriggerReceipt",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "Window",
    "Zero",
    "merge",
]
