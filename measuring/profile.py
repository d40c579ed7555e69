"""The kernels of a measured pass: their number, their times, the share in which one runs."""
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from measuring.benchmark import synchronize

PASSES, LINES = 3, 40


def profile_pass(run, protocol):
    """Profile a few passes; → a table as text.

    Its first line has the number of kernels in a pass, and the share of the time in which at least one of them ran. On
    a CPU, operators count as kernels. The kernels that take longest follow.

    Args:
        run: what `measured_pass` returns.
        protocol: its Protocol.
    """
    on_gpu = protocol.device.type == 'cuda'
    run()                                              # warms up
    synchronize(protocol.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        for _ in range(PASSES):
            run()
        synchronize(protocol.device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = sorted((event.time_range.start, event.time_range.end) for event in record.events()
                   if event.device_type == kind and (on_gpu or event.cpu_parent is None))          # in μs
    duration = max(end for _, end in spans) - spans[0][0]
    table = record.key_averages().table(sort_by=f'self_{protocol.device.type}_time_total', row_limit=LINES,
                                        max_name_column_width=80)
    return (f'{len(spans) / PASSES:.0f} kernels in a pass of {duration / PASSES / 1e3:.2f} ms, at least one of them '
            f'running in {100 * covered(spans) / duration:.0f} % of it; {protocol}\nall of {PASSES} passes:\n{table}\n')


def covered(spans):
    """How much of the time the spans (start, end) cover, which are sorted and may overlap."""
    total, reached = 0, float('-inf')
    for start, end in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
