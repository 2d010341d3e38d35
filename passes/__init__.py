"""Graph to graph, nothing else: one pass a file, in the order of :func:`default_passes`."""

from __future__ import annotations

from collections.abc import Mapping

from ._infra import Graphs, Pass, PassResult, run_pipeline, verify
from .cast_where_read import CastWhereRead
from .channels_last import ChannelsLast
from .chunk_feed_forward import ChunkFeedForward
from .chunk_loss import ChunkLoss
from .insert_codecs import InsertCodecs
from .keep_inputs import KeepInputs
from .lower_codecs import LowerCodecs
from .native_embedding import NativeEmbedding
from .place_decodes import PlaceDecodes
from .place_encodes import PlaceEncodes
from .split_decodes import SplitDecodes

__all__ = [
    "CastWhereRead",
    "ChannelsLast",
    "ChunkFeedForward",
    "ChunkLoss",
    "NativeEmbedding",
    "Graphs",
    "InsertCodecs",
    "KeepInputs",
    "LowerCodecs",
    "Pass",
    "PassResult",
    "PlaceDecodes",
    "PlaceEncodes",
    "SplitDecodes",
    "default_passes",
    "run_pipeline",
    "verify",
]


def default_passes(codecs: Mapping[str, str], kind: str | None = None) -> tuple[Pass, ...]:
    """The pipeline for a plan that stores each named saved tensor with the given codec.

    Args:
        kind: type of device that every value is planned as being on; None: what each is on. Codecs are
            lowered for what each is on.
    """
    gpus = {None: ("cuda",), "cuda": ("cuda", "cpu")}.get(kind, ())
    return (
        KeepInputs(),  # lossless, as the next: anywhere before the last pass
        NativeEmbedding(
            devices=gpus
        ),  # lossless, touches no saved tensor: anywhere before the markers expand
        InsertCodecs(codecs, kind),  # first: the others only move and expand what it inserts
        ChannelsLast(kind),  # behind it: what is encoded keeps the order that its codec wants
        PlaceEncodes(),  # before lowering: one marker moves more simply than the nodes it becomes
        SplitDecodes(gpus),  # before the decodes are placed: each then stands before the kernel that reads it
        PlaceDecodes(),
        CastWhereRead(),  # gradients alone; once every value has the readers that it will have
        LowerCodecs(),  # last: needs the final readers to choose between kernel and fused aten
    )
