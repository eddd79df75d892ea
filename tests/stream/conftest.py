"""What several tests of the stream read."""

from dataclasses import replace

import pytest

from tests.benchmarks.stream_corpus import write_dataset
from tests.shards.builders import media_sample, text_sample
from tests.stream.streams import NAMES


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Three datasets with their weights: text of many lengths, and two with media."""
    root = tmp_path_factory.mktemp("stream")
    for name, count in zip(NAMES, (400, 120, 90), strict=True):
        samples = (
            replace(text_sample(f"{name}-{number:08d}", 3 + number * 7 % 40), source=name)
            if name == "chat" or number % 2
            else media_sample(f"{name}-{number:08d}", source=name)
            for number in range(count)
        )
        write_dataset(root / name, samples, max_shard_bytes=150_000)
    return {str(root / name): weight for name, weight in zip(NAMES, (0.6, 0.25, 0.15), strict=True)}
