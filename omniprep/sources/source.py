"""The kinds of source that a recipe may name."""

from typing import Annotated

from pydantic import Field

from omniprep.sources.huggingface import HuggingFaceSource
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.parquet import ParquetSource
from omniprep.sources.webdataset import WebDatasetSource

Source = Annotated[JsonlSource | ParquetSource | HuggingFaceSource | WebDatasetSource, Field(discriminator="kind")]
