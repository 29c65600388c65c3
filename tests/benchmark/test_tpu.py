"""Compiled for TPUs that are not there: what is in the executables, and that they fit a v5e chip's 16 GB."""

import pytest

from vidar.benchmark.lowering import compile_for, topology_mesh
from vidar.benchmark.workload import Workload
from vidar.errors import ConfigError
from vidar.sharding import MeshConfig

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it exists for Linux only")

V5E = 16e9


@pytest.fixture(scope="module")
def mesh():
    return topology_mesh("v5e:2x4", MeshConfig(fsdp=2, sequence=2, tensor=2))


def assert_splash_trains(compiled):
    """Forward and backward kernels of splash attention, Ulysses around them, the state donated in place."""
    kernels = " ".join(compiled.kernels)
    assert "splash_mha_fwd" in kernels
    assert "splash_mha_dq" in kernels
    assert "splash_mha_dkv" in kernels
    assert compiled.collectives["all-to-all"] >= 6
    assert compiled.memory.aliased > 0.99 * compiled.memory.outputs


def test_a_tiny_training_step_holds_flash_kernels_between_all_to_alls(mesh):
    compiled = compile_for(Workload("train", "tiny", rows=2, backend="splash", remat=True), mesh)
    assert_splash_trains(compiled)
    dense = compile_for(Workload("train", "tiny", rows=2), mesh)
    assert dense.kernels == {}


def test_the_tick_of_wan_fits_with_its_cache_in_place(mesh):
    compiled = compile_for(Workload("stream", "wan_1_3b", window=12, rows=2, backend="splash"), mesh)
    memory = compiled.memory
    # 30 layers of keys and values of 9 frames of 1,560 tokens, bf16, two sessions on eight chips.
    assert compiled.cache == 2 * 30 * 9 * 1560 * 1536 * 2 * 2 // 8
    assert memory.aliased >= compiled.cache
    assert memory.temporary < compiled.cache / 2
    assert memory.total <= V5E
    assert any("splash_mha_fwd" in name for name in compiled.kernels)
    assert compiled.collectives["all-to-all"] >= 4


@pytest.mark.slow
def test_the_teacher_forcing_step_of_wan_fits(mesh):
    """21 frames of 480×832, one clip per fsdp shard, AdamW and an average in fp32; about two minutes of compiling."""
    compiled = compile_for(Workload("train", "wan_1_3b", rows=2, backend="splash", remat=True), mesh)
    assert_splash_trains(compiled)
    # Parameters, their average and two moments in fp32 over fsdp × tensor.
    assert compiled.memory.arguments > 4 * 4 * 1.418e9 / 4
    assert compiled.memory.total <= V5E


@pytest.mark.slow
def test_what_does_not_fit_is_said(mesh):
    """Without recomputation the same step does not fit; about two minutes of compiling."""
    compiled = compile_for(Workload("train", "wan_1_3b", rows=2, backend="splash"), mesh)
    assert compiled.memory is None
    assert "hbm" in compiled.complaint.lower()


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "somewhere"])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ConfigError, match="names look like v5e:2x4") as refusal:
        topology_mesh(name, MeshConfig())
    assert "\n" not in str(refusal.value)


def test_a_mesh_must_fit_the_topology_and_the_network(mesh):
    with pytest.raises(ConfigError, match="needs 4 devices, there are 8"):
        topology_mesh("v5e:2x4", MeshConfig(tensor=4))
    eight = topology_mesh("v5e:2x4", MeshConfig(tensor=8))
    with pytest.raises(ConfigError, match=r"wan_1_3b\.heads=12 .* \[1, 2, 3, 4, 6, 12\]"):
        Workload("stream", "wan_1_3b").program(eight)
    with pytest.raises(ConfigError, match="rows=1 .* use a multiple of 2"):
        Workload("stream", "wan_1_3b").program(mesh)
