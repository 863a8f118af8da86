"""A plan in words."""

from typing import Any

from default_moe.hardware import peak_flops
from default_moe.model.size import parameter_counts
from default_moe.plan.collectives import summary
from default_moe.plan.step_plan import StepPlan

_GIB = 2**30


def text(plan: StepPlan) -> str:
    """Return all that a plan tells, in lines."""
    return "\n".join([*_what(plan), "", *_memory(plan), *_work(plan)])


def as_json(plan: StepPlan) -> dict[str, Any]:
    """Return the same as plain values: bytes, seconds and operations of a device and a step."""
    config = plan.config
    result: dict[str, Any] = {
        "topology": plan.topology.name,
        "mesh": dict(plan.program.mesh.shape),
        "batch_size": config.train.batch_size,
        "grad_accum_steps": config.train.grad_accum_steps,
        "sequence_length": config.train.sequence_length,
        "remat": config.model.remat,
        "fits": plan.fits,
        "memory_there": plan.topology.hardware.memory if plan.topology.hardware else None,
        "state": plan.state._asdict(),
        "temporaries": plan.memory.temporaries if plan.memory else None,
        "too_large": plan.too_large,
        "model_flops": plan.model_flops,
    }
    if plan.costs:
        result["flops"], result["memory_traffic"] = plan.costs.flops, plan.costs.bytes
        names = ("kind", "axes", "count", "bytes_sent")
        result["exchanges"] = [dict(zip(names, row, strict=True)) for row in summary(plan.exchanges)]
    if plan.seconds:
        result["estimated_seconds"] = list(plan.seconds)
        result["limited_by"] = limit(plan)
    return result


def limit(plan: StepPlan) -> str:
    """Return what keeps the step from being larger or faster."""
    costs = plan.costs
    if not plan.fits:
        state_alone = plan.topology.hardware and sum(plan.state) > plan.topology.hardware.memory
        return "memory: parameters and optimizer state alone" if state_alone else "memory: activations and temporaries"
    if costs is None or plan.seconds is None:
        return "not known"
    if plan.exchange_seconds > plan.busy_seconds:
        kind, axes, _, _ = summary(plan.exchanges)[0]
        return f"exchanges, most of all {kind} over {' and '.join(axes)}"
    part, seconds = max(costs.seconds_of.items(), key=lambda item: item[1])
    computing = costs.computing_seconds > costs.busy_seconds / 2 or plan.busy_seconds > costs.busy_seconds
    what = "arithmetic" if computing else "memory traffic"
    return f"{what}, most of all of {part} ({seconds / costs.busy_seconds:.0%})"


def speed(plan: StepPlan) -> str:
    """Return the estimated time of a step, tokens/s and MFU, each from one bound to the other."""
    if plan.seconds is None:
        return "unknown: there are no figures for this device"
    least, most = plan.seconds
    train, peak = plan.config.train, peak_flops(plan.topology.devices[0])
    tokens = train.batch_size * train.sequence_length
    shares = f", MFU {plan.model_flops / most / peak:.0%} to {plan.model_flops / least / peak:.0%}" if peak else ""
    return f"{_seconds(least)} to {_seconds(most)}, {tokens / most:,.0f} to {tokens / least:,.0f} tokens/s{shares}"


def _what(plan: StepPlan) -> list[str]:
    config, program, train = plan.config, plan.program, plan.config.train
    counts = parameter_counts(config, program.vocab_size)
    devices = plan.topology.devices
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    form = f" over devices by {program.expert_parallel!r}" if program.expert_parallel else ""
    microbatches = f" in {train.grad_accum_steps} microbatches" if train.grad_accum_steps > 1 else ""
    return [
        f"{plan.topology.name}: {len(devices)} x {devices[0].device_kind}, mesh {mesh}, remat {config.model.remat!r}, "
        f"experts by {program.matmul!r}{form}, attention by {program.attention!r}",
        f"model: {counts.total / 1e6:,.2f} M parameters, {counts.active / 1e6:,.2f} M active, "
        f"{config.moe.num_experts} experts, top {config.moe.experts_per_token}",
        f"batch: {train.batch_size:,} sequences of {train.sequence_length:,} tokens{microbatches}, "
        f"{plan.sequences_a_device} a device at a time",
    ]


def _memory(plan: StepPlan) -> list[str]:
    hardware = plan.topology.hardware
    there = f" of {hardware.memory / _GIB:.2f}" if hardware else ""
    if plan.memory is None:
        total = f"does not fit{there} GiB: {plan.too_large}"
    else:
        verdict = f": {'fits' if plan.fits else 'does not fit'}" if hardware else ""
        total = f"{plan.memory.total / _GIB:.2f}{there} GiB{verdict}"
    sizes = dict(
        zip(("parameters", "optimizer state", "default vectors, counters, batch"), plan.state, strict=True),
        **({"activations and temporaries": plan.memory.temporaries} if plan.memory else {}),
    )
    lines = [f"  {name:<36}{size / _GIB:8.2f} GiB" for name, size in sizes.items()]
    return [f"memory of a device: {total}", *lines]


def _work(plan: StepPlan) -> list[str]:
    costs = plan.costs
    if costs is None:
        return []
    lines = [
        "",
        f"operations of a device and a step: {plan.model_flops / 1e12:,.2f} TFLOP of the model, "
        f"{costs.flops / 1e12:,.2f} as compiled (with padding and recomputation, without kernels that do not tell)",
        f"memory traffic: {costs.bytes / 1e9:,.1f} GB",
    ]
    if costs.open_loops:
        lines.append(f"  {costs.open_loops} loops whose turns depend on the data are counted as one turn")
    lines.append("exchanges, by what a device sends in a step:" if plan.exchanges else "exchanges: none")
    for kind, axes, count, size in summary(plan.exchanges):
        lines.append(f"  {kind:<20}{'+'.join(axes):<16}{count:7,} times{size / 1e9:10.3f} GB")
    if plan.seconds:
        largest = sorted(costs.seconds_of.items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{part} {seconds / costs.busy_seconds:.0%}" for part, seconds in largest)
        lines += [
            "",
            "estimate of a step, from a roofline of data-sheet speeds; nothing was run:",
            f"  {speed(plan)}",
            f"  computing and memory {_seconds(plan.busy_seconds)}: {shares}",
            f"  exchanges {_seconds(plan.exchange_seconds)}, from wholly hidden to not at all",
        ]
    return [*lines, f"limited by {limit(plan)}"]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
