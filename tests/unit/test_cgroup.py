"""The memory limits of containers, as the files of cgroups say them, and the cache that fits them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from cupaged.engine import EngineConfig
from cupaged.engine.model import cache_size, cgroup
from cupaged.engine.model.kv_cache import KVShape

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


class Machine:
    """``proc`` and the mounts of a machine in a directory."""

    def __init__(self, root, version: int, path: str, shown: str = "/", mount: str | None = None) -> None:
        mount = mount or ("/sys/fs/cgroup" if version == 2 else "/sys/fs/cgroup/memory")
        self.version, self.top = version, root / mount.lstrip("/")
        self.top.mkdir(parents=True, exist_ok=True)
        (root / "proc/self").mkdir(parents=True, exist_ok=True)
        escaped = mount.replace(" ", "\\040")
        if version == 2:
            processes = f"0::{path}\n"
            mounts = f"30 23 0:26 {shown} {escaped} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        else:
            processes = f"12:pids:/other\n4:cpuacct,memory:{path}\n1:name=systemd:/x\n0::/\n"
            mounts = (
                f"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
                f"36 31 0:33 {shown} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
                f"35 31 0:32 {shown} {escaped} rw shared:9 master:3 - cgroup cgroup rw,memory\n"
            )
        (root / "proc/self/cgroup").write_text(processes)
        (root / "proc/self/mountinfo").write_text("22 1 0:21 / / rw - ext4 /dev/sda rw\n" + mounts)

    def group(self, path: str, limit, used: int = 0, cached: int = 0) -> None:
        """A group with a limit, what it uses, and of that what is page cache."""
        directory = self.top / path.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        limit_file, usage, statistic = NAMES[self.version]
        (directory / limit_file).write_text(f"{limit}\n")
        (directory / usage).write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 5\n{statistic} {cached}\nactive_file 7\n")


def unlimited(version: int):
    return "max" if version == 2 else UNLIMITED_V1


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request):
    return request.param


def test_what_is_in_use_is_no_longer_there_and_page_cache_is(tmp_path, version):
    machine = Machine(tmp_path, version, "/box")
    machine.group("/box", 2 * GIB, used=GIB, cached=GIB // 4)
    assert cgroup.available_bytes(tmp_path) == 2 * GIB - GIB + GIB // 4
    machine.group("/box", 2 * GIB, used=3 * GIB)
    assert cgroup.available_bytes(tmp_path) == 0
    machine.group("/box", 2 * GIB, used=0, cached=GIB)
    assert cgroup.available_bytes(tmp_path) == 2 * GIB


def test_no_limit(tmp_path, version):
    assert cgroup.available_bytes(tmp_path) is None  # no proc: another system
    machine = Machine(tmp_path, version, "/box")
    assert cgroup.available_bytes(tmp_path) is None
    machine.group("/box", unlimited(version), used=GIB)
    found = cgroup.available_bytes(tmp_path)
    assert found is None if version == 2 else found > 2**60


def test_the_tightest_of_nested_groups_counts(tmp_path, version, seed):
    draw = random.Random(seed)
    depth = draw.randint(1, 5)
    path = "".join(f"/g{i}" for i in range(depth))
    machine = Machine(tmp_path, version, path)
    left = []
    for i in range(depth):
        here = "".join(f"/g{j}" for j in range(i + 1))
        if draw.random() < 0.3:
            machine.group(here, unlimited(version), used=draw.randrange(GIB))
            continue
        used = draw.randrange(8 * GIB)
        limit = used + draw.randrange(8 * GIB)
        machine.group(here, limit, used)
        left.append(limit - used)
    machine.group("/elsewhere", 1, used=0)
    found = cgroup.available_bytes(tmp_path)
    if left:
        assert found == min(left)
    else:
        assert found is None or found > 2**60


def test_a_container_that_sees_its_own_group_as_the_top(tmp_path, version):
    """With a namespace of its own the path is "/", and the mount shows the group itself."""
    machine = Machine(tmp_path, version, "/")
    machine.group("/", 2 * GIB, used=GIB)
    assert cgroup.available_bytes(tmp_path) == GIB


def test_a_container_that_sees_the_path_of_the_host(tmp_path, version):
    machine = Machine(tmp_path, version, "/docker/abc/inner", shown="/docker/abc")
    machine.group("/", 3 * GIB, used=GIB)
    machine.group("/inner", 2 * GIB, used=GIB // 2)
    assert cgroup.available_bytes(tmp_path) == 2 * GIB - GIB // 2


@pytest.mark.parametrize("path", ["/docker/abc", "/../../elsewhere", "/docker/abcd"])
def test_a_path_that_is_not_shown(tmp_path, version, path):
    machine = Machine(tmp_path, version, path, shown="/docker/abc" if path.endswith("d") else "/")
    machine.group("/", 2 * GIB)
    assert cgroup.available_bytes(tmp_path) == 2 * GIB


def test_a_mount_with_a_space_in_its_name(tmp_path, version):
    machine = Machine(tmp_path, version, "/box", mount="/my groups/memory")
    machine.group("/box", GIB)
    assert cgroup.available_bytes(tmp_path) == GIB


def test_a_limit_that_slows_down_counts_too(tmp_path):
    machine = Machine(tmp_path, 2, "/box")
    machine.group("/box", 4 * GIB, used=GIB)
    (machine.top / "box/memory.high").write_text(f"{2 * GIB}\n")
    assert cgroup.available_bytes(tmp_path) == GIB


def test_the_planned_cache_fits_the_container(tmp_path, version, monkeypatch):
    """A container of 2 GiB on a machine of 256 GiB."""
    machine = Machine(tmp_path, version, "/box")
    machine.group("/box", 2 * GIB, used=GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=256 * GIB))
    read = cgroup.available_bytes
    monkeypatch.setattr(cgroup, "available_bytes", lambda: read(tmp_path))
    shape = KVShape(num_layers=30, num_kv_heads=3, block_size=16, head_size=64, dtype=torch.bfloat16)
    runner = SimpleNamespace(device=torch.device("cpu"))

    def planned() -> int:
        return cache_size.num_gpu_blocks(EngineConfig(), runner, shape, 8192) * shape.block_bytes

    assert GIB // 4 - shape.block_bytes < planned() <= GIB // 4
    machine.group("/box", 512 * GIB, used=GIB)
    assert 4 * GIB - shape.block_bytes < planned() <= 4 * GIB
    machine.group("/box", GIB, used=GIB)
    with pytest.raises(ValueError, match="raise the container's limit"):
        planned()


def test_this_machine_is_read():
    found = cgroup.available_bytes()
    assert found is None or found >= 0
