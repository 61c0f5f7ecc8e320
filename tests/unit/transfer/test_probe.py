from disagg.transfer.probe import find_lane, to_result

PROTO_INFO = """\
[1.2] [vm:1:0]   +--------+
[1.2] [vm:1:0]   | a self cfg#0                                             |
[1.2] [vm:1:0]   | remote memory write by ucp_put* from host memory to host |
[1.2] [vm:1:0]   | 0..inf | zero-copy   | cma/memory |
[1.2] [vm:1:0]   | a intra-node cfg#1                                       |
[1.2] [vm:1:0]   | active message by ucp_am_send* from host memory |
[1.2] [vm:1:0]   | 16516..inf | multi-frag copy-in | sysv/memory |
[1.2] [vm:1:0]   | a intra-node cfg#1                                       |
[1.2] [vm:1:0]   | remote memory write by ucp_put*(multi) from host memory to host |
[1.2] [vm:1:0]   |    0..2000 | short       | posix/memory |
[1.2] [vm:1:0]   | 2001..inf | zero-copy   | 50% on tcp/lo |
pushed 1000 0.5
"""


def test_lane_is_that_of_large_writes_to_another_process() -> None:
    """Not of writes to itself, of messages, or of small writes."""
    assert find_lane(PROTO_INFO) == "tcp"


def test_what_ucx_did_not_choose_has_no_lane() -> None:
    assert to_result("cuda_ipc", PROTO_INFO).transport == "cuda_ipc"


def test_lane_without_tables_is_unknown() -> None:
    assert find_lane("pushed 1 1.0") == "unknown"


def test_result_is_read_from_the_last_line() -> None:
    result = to_result("nixl", PROTO_INFO)
    assert (result.num_bytes, result.seconds, result.lane) == (1000, 0.5, "tcp")
    assert result.gigabytes_per_s == 2e-6
    assert result.transport == "nixl (UCX tcp)"
