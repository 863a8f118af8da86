"""What a run shows and records: metrics.jsonl and TensorBoard, a picture of expert load and progress."""

from default_moe.metrics.heat_map import load_heat_map
from default_moe.metrics.progress import Progress
from default_moe.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter", "Progress", "load_heat_map"]
