"""What changed between two datasets, or in one record of them."""

from omniprep.diff.compare import diff, diff_record
from omniprep.diff.record import RecordDiff, describe_record
from omniprep.diff.report import DatasetDiff, describe

__all__ = ["DatasetDiff", "RecordDiff", "describe", "describe_record", "diff", "diff_record"]
