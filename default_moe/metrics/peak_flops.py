"""Peak arithmetic speed of accelerators, the denominator of MFU."""

import jax

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first name found in the device kind counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),  # JAX sees a chip as two devices
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where it is not known, as for CPUs."""
    return next((peak for name, peak in _PEAKS if name.lower() in device.device_kind.lower()), None)
