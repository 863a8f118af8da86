"""What a run shows and records: metrics.jsonl and TensorBoard, a picture of expert load, progress, peak FLOP/s."""

from default_moe.metrics.heat_map import load_heat_map
from default_moe.metrics.peak_flops import peak_flops
from default_moe.metrics.progress import Progress
from default_moe.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter", "Progress", "load_heat_map", "peak_flops"]
