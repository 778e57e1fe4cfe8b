"""Merging an adapter into the files of its base, tensor by tensor, each proven as it was written.

merge_adapter ── stream ──> merge_targets     which rows get which fold of the adapter (asked of its kind)
                        ──> requantize        rows as training saw them, made again by their kind and proven
                        ──> sources       rows of the base with their folds (an inspection reads them too)
                        ──> shards ─ background_writer     rows read, folded, written, read back
"""

from lorafit.model.merge.stream import BaseKind, MergeReport, merge_adapter

__all__ = ["BaseKind", "MergeReport", "merge_adapter"]
