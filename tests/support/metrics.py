"""The text format of `/metrics`."""

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_in(text: str) -> Samples:
    """Parse every sample, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample_of(samples: Samples, name: str, labels: Mapping[str, str] | None = None) -> float:
    """Return the value of a sample, or 0 if there is none."""
    return samples.get((name, frozenset((labels or {}).items())), 0)
