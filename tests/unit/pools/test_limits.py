"""Sizes of the host pool, and the limits of the machine and its cgroups (in a made-up /proc)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_core.errors import NotEnoughMemory, SpecError
from hicache_core.pools.limits import check_memory, host_pages, memory_limits

GIB = 1 << 30


def machine(root: Path, available_gib: int = 16, cgroup: str = "") -> Path:
    files = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {available_gib << 20} kB\nHugeTotal: 0",
        "proc/self/cgroup": cgroup,
    }
    return with_files(root, files)


def with_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(directory: str, limit: str, used_gib: int, cache_gib: int = 0) -> dict[str, str]:
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{used_gib * GIB}\n",
        f"{directory}/memory.stat": f"anon 5\ninactive_file {cache_gib * GIB}\n",
    }


def v1(directory: str, limit: int, used_gib: int, cache_gib: int = 0) -> dict[str, str]:
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{used_gib * GIB}\n",
        f"{directory}/memory.stat": f"cache 7\ntotal_inactive_file {cache_gib * GIB}\n",
    }


def left(root: Path) -> int:
    return min(limit.available_nbytes for limit in memory_limits(root))


def test_the_machine_bounds_where_there_is_no_cgroup(tmp_path: Path) -> None:
    root = machine(tmp_path)
    check_memory(16 * GIB, "host pool", root)
    with pytest.raises(NotEnoughMemory, match=r"host pool needs 17.18 GB, but 17.18 GB .*MemAvail"):
        check_memory(16 * GIB + 1, "host pool", root)


def test_a_v2_limit_counts_with_what_is_used_and_without_page_cache(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/pod/box\n")
    with_files(root, v2("sys/fs/cgroup/pod/box", str(8 * GIB), used_gib=5, cache_gib=2))
    assert left(root) == 5 * GIB
    with pytest.raises(NotEnoughMemory, match=r"/sys/fs/cgroup/pod/box/memory.max"):
        check_memory(6 * GIB, "host pool", root)


def test_the_limit_of_a_parent_counts_too(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/pod/box\n")
    with_files(root, v2("sys/fs/cgroup/pod/box", "max", used_gib=1))
    with_files(root, v2("sys/fs/cgroup/pod", str(4 * GIB), used_gib=3))
    assert left(root) == 1 * GIB


def test_in_a_container_the_mount_itself_is_the_cgroup(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/not/visible/here\n")
    with_files(root, v2("sys/fs/cgroup", str(3 * GIB), used_gib=1))
    assert left(root) == 2 * GIB


def test_a_v1_cgroup_without_a_limit_does_not_count(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="4:memory:/box\n")
    with_files(root, v1("sys/fs/cgroup/memory/box", 0x7FFFFFFFFFFFF000, used_gib=1))
    (machine_itself,) = memory_limits(root)
    assert "MemAvailable" in machine_itself.name


def test_a_v1_limit_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="9:cpu,cpuacct:/x\n4:memory:/box\n0::/\n")
    with_files(root, v1("sys/fs/cgroup/memory/box", 8 * GIB, used_gib=6, cache_gib=1))
    assert left(root) == 3 * GIB


def test_v1_without_a_limit_is_the_machine(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="4:memory:/box\n")
    with_files(root, v1("sys/fs/cgroup/memory/box", 2**63 - 4096, used_gib=6))
    assert left(root) == 16 * GIB


def test_a_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/\n")
    with_files(root, v2("sys/fs/cgroup", str(1 * GIB), used_gib=2))
    assert left(root) == 0


def test_where_nothing_can_be_read_nothing_is_refused(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == []
    check_memory(2**60, "host pool", tmp_path)


def test_this_machine_has_a_limit() -> None:
    assert 0 < left(Path("/")) < 2**50


def test_the_ratio_counts_device_pages_and_a_size_overrides_it() -> None:
    assert host_pages(ratio=2.0, size_gb=0, device_pages=100, page_nbytes=1000) == 200
    assert host_pages(ratio=1.55, size_gb=0, device_pages=10, page_nbytes=1000) == 15
    assert host_pages(ratio=2.0, size_gb=1, device_pages=100, page_nbytes=10**6) == 1000
    assert host_pages(ratio=2.0, size_gb=0.5, device_pages=100, page_nbytes=10**6) == 500


def test_pages_without_bytes_are_counted_by_the_ratio() -> None:
    assert host_pages(ratio=2.0, size_gb=1, device_pages=100, page_nbytes=0) == 200
    with pytest.raises(SpecError, match=r"hicache_ratio 0\.001 gives no host page"):
        host_pages(ratio=0.001, size_gb=1, device_pages=10, page_nbytes=0)


@pytest.mark.parametrize(("ratio", "size_gb"), [(0.001, 0), (2.0, 1e-6)])
def test_a_size_of_no_page_is_refused(ratio: float, size_gb: float) -> None:
    with pytest.raises(SpecError, match="gives no host page"):
        host_pages(ratio=ratio, size_gb=size_gb, device_pages=10, page_nbytes=10**6)
