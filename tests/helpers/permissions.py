"""What only a process that permissions hold for can test: root may do anything."""

import ctypes

_OVERRIDES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_VERSION = 0x20080522


def obey_permissions() -> None:
    """From now on permissions hold for this process, whoever it belongs to. To be called before it has threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    keep = ~sum(1 << number for number in _OVERRIDES)
    for number in range(6):  # effective, permitted and inheritable, twice; only the first three hold these
        data[number] &= keep if number < 3 else 0xFFFFFFFF
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")
