"""A plan in words."""

from typing import Any

from default_moe.hardware import peak_flops
from default_moe.model.size import parameter_counts
from default_moe.plan.collectives import summary
from default_moe.plan.step_plan import StepPlan

_GIB = 2**30


def text(plan: StepPlan) -> str:
    """All that a plan tells, in lines."""
    return "\n".join([*_what(plan), *_memory(plan), *(_work(plan) if plan.costs else ())])


def as_json(plan: StepPlan) -> dict[str, Any]:
    """The same as plain values: bytes, seconds and operations of a device and a step."""
    config, seconds = plan.config, plan.seconds
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
        result["exchanges"] = [
            {"kind": kind, "axes": axes, "count": count, "bytes_sent": size}
            for kind, axes, count, size in summary(list(plan.exchanges))
        ]
    if seconds:
        result["estimated_seconds"] = list(seconds)
        result["limited_by"] = limit(plan)
    return result


def limit(plan: StepPlan) -> str:
    """What keeps the step from being larger or faster."""
    if not plan.fits:
        state_alone = plan.topology.hardware and sum(plan.state) > plan.topology.hardware.memory
        return "memory: parameters and optimizer state alone" if state_alone else "memory: activations and temporaries"
    if plan.costs is None or plan.seconds is None:
        return "not known"
    if plan.exchange_seconds > plan.busy_seconds:
        kind, axes, _, _ = summary(list(plan.exchanges))[0]
        return f"exchanges, most of all {kind} over {' and '.join(axes)}"
    part, seconds = max(plan.costs.seconds_of.items(), key=lambda item: item[1])
    share = seconds / plan.costs.busy_seconds
    computing = (
        plan.costs.computing_seconds > plan.costs.busy_seconds / 2 or plan.busy_seconds > plan.costs.busy_seconds
    )
    return f"{'arithmetic' if computing else 'memory traffic'}, most of all of {part} ({share:.0%})"


def speed(plan: StepPlan) -> str:
    """The estimated time of a step, tokens/s and MFU, each from the slowest to the fastest bound."""
    if plan.seconds is None:
        return "unknown: there are no figures for this device"
    least, most = plan.seconds
    peak = peak_flops(plan.topology.devices[0])
    shares = f", MFU {plan.model_flops / most / peak:.0%} to {plan.model_flops / least / peak:.0%}" if peak else ""
    tokens = f"{plan.tokens / most:,.0f} to {plan.tokens / least:,.0f} tokens/s"
    return f"{_seconds(least)} to {_seconds(most)}, {tokens}{shares}"


def _what(plan: StepPlan) -> list[str]:
    config, program = plan.config, plan.program
    counts = parameter_counts(config, program.vocab_size)
    devices = plan.topology.devices
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    form = f" over devices by {program.expert_parallel!r}" if program.expert_parallel else ""
    train = config.train
    a_device = train.batch_size // train.grad_accum_steps // program.num_batch_shards
    return [
        f"{plan.topology.name}: {len(devices)} x {devices[0].device_kind}, mesh {mesh}, remat {config.model.remat!r}, "
        f"experts by {program.matmul!r}{form}, attention by {program.attention!r}",
        f"model: {counts.total / 1e6:,.2f} M parameters, {counts.active / 1e6:,.2f} M active, "
        f"{config.moe.num_experts} experts, top {config.moe.experts_per_token}",
        f"batch: {train.batch_size:,} sequences of {train.sequence_length:,} tokens"
        + (f" in {train.grad_accum_steps} microbatches" if train.grad_accum_steps > 1 else "")
        + f", {a_device} a device at a time",
        "",
    ]


def _memory(plan: StepPlan) -> list[str]:
    hardware, state = plan.topology.hardware, plan.state
    there = f" of {hardware.memory / _GIB:.2f}" if hardware else ""
    if plan.memory is None:
        total = f"does not fit{there} GiB: {plan.too_large}"
    else:
        verdict = "fits" if plan.fits else "does not fit"
        total = f"{plan.memory.total / _GIB:.2f}{there} GiB" + (f": {verdict}" if hardware else "")
    lines = [
        f"memory of a device: {total}",
        f"  {'parameters':<36}{state.parameters / _GIB:8.2f} GiB",
        f"  {'optimizer state':<36}{state.optimizer / _GIB:8.2f} GiB",
        f"  {'default vectors, counters, batch':<36}{state.rest / _GIB:8.2f} GiB",
    ]
    if plan.memory:
        lines.append(f"  {'activations and temporaries':<36}{plan.memory.temporaries / _GIB:8.2f} GiB")
    return lines


def _work(plan: StepPlan) -> list[str]:
    costs = plan.costs
    assert costs is not None
    lines = [
        "",
        f"operations of a device and a step: {plan.model_flops / 1e12:,.2f} TFLOP of the model, "
        f"{costs.flops / 1e12:,.2f} as compiled (with padding and recomputation, without kernels that do not tell)",
        f"memory traffic: {costs.bytes / 1e9:,.1f} GB",
    ]
    if costs.open_loops:
        lines.append(f"  {costs.open_loops} loops whose turns depend on the data are counted as one turn")
    lines.append("exchanges, by what a device sends in a step:" if plan.exchanges else "exchanges: none")
    for kind, axes, count, size in summary(list(plan.exchanges)):
        lines.append(f"  {kind:<20}{'+'.join(axes):<16}{count:7,} times{size / 1e9:10.3f} GB")
    if plan.seconds:
        shares = sorted(costs.seconds_of.items(), key=lambda item: -item[1])[:4]
        lines += [
            "",
            "estimate of a step, from a roofline of data-sheet speeds; nothing was run:",
            f"  {speed(plan)}",
            f"  computing and memory {_seconds(plan.busy_seconds)}: "
            + ", ".join(f"{part} {seconds / costs.busy_seconds:.0%}" for part, seconds in shares),
            f"  exchanges {_seconds(plan.exchange_seconds)}, from wholly hidden to not at all",
        ]
    lines.append(f"limited by {limit(plan)}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
