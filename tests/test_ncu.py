"""What Nsight Compute prints is read, in both of its layouts. No GPU and no ncu are needed."""

from __future__ import annotations

import pytest

from benchmarks import ncu

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
RANGES = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
RANGE = "<default domain>:cell[forward float32 65536x4096 alpha=0.01]:none:none:none:none:none:none"
COLUMNS = (  # name, unit, and the values of two kernels
    ("ID", "", "0", "1"),
    ("Process ID", "", "71", "71"),
    ("Process Name", "", "python3.12", "python3.12"),
    (RANGES, "", f'""{RANGE}""', ""),
    ("Kernel Name", "", "void softtopk::forward_kernel<float, Warps<4>>(Args)", "backward_kernel(Args)"),
    ("Block Size", "", "(128, 1, 1)", "(128, 1, 1)"),
    (ncu.READ, "byte", "1,073,741,824", "2,000,000"),
    (ncu.WRITTEN, "byte", "1,000,000,000", "1,000,000"),
    (ncu.PEAK, "%", "84.5", "n/a"),
    (ncu.DURATION, "ns", "500,000", "1,000"),
    ("launch__block_size", "", "128", "128"),
    ("launch__grid_size", "", "65,536", "65,536"),
    ("launch__registers_per_thread", "register/thread", "64", "40"),
    ("launch__shared_mem_per_block_dynamic", "byte/block", "0", "0"),
    ("launch__shared_mem_per_block_static", "byte/block", "2,048", "0"),
    (ncu.POSSIBLE, "%", "75", "100"),
    (ncu.ACHIEVED, "%", "70.5", "90"),
    (STALLED.format("barrier_not_issued"), "inst", "2.9", "0"),
    (STALLED.format("barrier"), "inst", "3", "0"),
    (STALLED.format("long_scoreboard"), "inst", "6", "0"),
    (STALLED.format("selected"), "inst", "1", "1"),
)
PRINTED = "==PROF== Connected to process 71\n==PROF== Profiling: 0%....50%....100% - 12 passes\n" + "".join(
    ",".join(f'"{value}"' for value in line) + "\n" for line in zip(*COLUMNS, strict=True)
)


def test_a_column_for_each_metric():
    first, second = ncu.parse(PRINTED)
    assert first["label"] == "forward float32 65536x4096 alpha=0.01" and second["label"] is None
    assert first[ncu.READ] == 1073741824 and ncu.PEAK not in second
    assert ncu.stalls(first) == [("long_scoreboard", 0.6), ("barrier", 0.3)]
    assert ncu.describe(first).splitlines() == [
        "forward float32 65536x4096 alpha=0.01: void softtopk::forward_kernel",
        "  0.500 ms, 1074 MB read and 1000 MB written, 4.15 TB/s (84% of the peak)",
        "  occupancy 70% of 75% possible, 64 registers, 2.0 KiB shared, 128 threads a block, 65536 blocks",
        "  warps wait for: long_scoreboard 60%, barrier 30%",
    ]


def test_a_value_that_is_missing_is_not_a_number():
    assert "nan% of the peak" in ncu.describe(ncu.parse(PRINTED)[1])


def test_a_line_for_each_metric():
    lines = ['"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"']
    for name, value in ((ncu.DURATION, "1,234.5"), (ncu.READ, "10")):
        lines.append(f'"0","71","k<float>(int)","Command line profiler metrics","{name}","ns","{value}"')
    assert ncu.parse("\n".join(lines)) == [
        {"kernel": "k<float>(int)", "label": None, ncu.DURATION: 1234.5, ncu.READ: 10.0}
    ]


def test_no_table_is_an_error():
    with pytest.raises(ValueError, match="permission"):
        ncu.parse("==ERROR== permission denied")
