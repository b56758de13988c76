"""CUDA C++ launched on a Hopper GPU.  Without one, its sources are compiled and the model of a swizzle is tested."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_sources import cache_fixture, microseconds, saxpy_fixture  # noqa: F401

from sandbox import nvrtc, target
from sandbox.nvrtc import tensor_map


def _why_no_hopper() -> str:
    if reason := target._why_no_gpu():
        return f"needs a Hopper GPU: {reason}"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return "" if capability[0] == 9 else f"needs a Hopper GPU: {name} has compute capability {capability}"


hopper = pytest.mark.skipif(bool(_why_no_hopper()), reason=_why_no_hopper())

SOURCES = {
    "turn": """
extern "C" __global__ void turn(float *y, int n) {
    extern __shared__ float s[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = i;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = s[n - 1 - i];
}
""",
    "neighbour": r"""
extern "C" __global__ void neighbour(int *y, int *size) {
    __shared__ int mine;
    unsigned rank, blocks, there;
    int value;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    mine = 100 + blockIdx.x;
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(there) : "r"((unsigned)__cvta_generic_to_shared(&mine)), "r"((rank + 1) % blocks));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
    y[blockIdx.x] = value;
    size[blockIdx.x] = blocks;
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
""",
    "tile": r"""
struct alignas(64) Map { unsigned long long opaque[16]; };
extern "C" __global__ void tile(const __grid_constant__ Map map, unsigned char *out, int bytes, int x, int y, int z) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long full;
    const unsigned to = ((unsigned)__cvta_generic_to_shared(dynamic) + 1023) / 1024 * 1024;
    const unsigned barrier = (unsigned)__cvta_generic_to_shared(&full);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];"
                     ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
    }
    __syncthreads();
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra again;\n}"
                 ::"r"(barrier) : "memory");
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) {
        unsigned value;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(to + i) : "memory");
        out[i] = value;
    }
}
""",
}


def load(folder: Path, entry: str) -> nvrtc.Kernel:
    (folder / "f.cu").write_text(SOURCES[entry])
    return nvrtc.Kernel(nvrtc.compile(folder / "f.cu", entry, {}))


@pytest.mark.parametrize("entry", SOURCES)
def test_what_only_a_gpu_runs_compiles_everywhere(entry, tmp_path, cache):
    load(tmp_path, entry)


@pytest.fixture
def on_gpu(saxpy, cache):
    """(launch of y += 2x, x, y)."""
    x, y = torch.arange(1000.0, device="cuda"), torch.ones(1000, device="cuda")
    kernel = nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))
    return kernel.prepare(grid=(3, 1, 1), block=(128, 1, 1), args=[x, y, 2.0, 1000]), x, y


@hopper
def test_gpu_saxpy(on_gpu):
    launch, x, y = on_gpu
    launch()
    assert torch.equal(y, 1 + 2 * x)
    z = torch.zeros(1000, device="cuda")
    launch.update(1, z)
    launch.update(2, -1.0)
    launch.update(3, 10)
    launch()
    assert torch.equal(z, -x * (torch.arange(1000, device="cuda") < 10)) and torch.equal(y, 1 + 2 * x)


@hopper
def test_gpu_counts_the_arguments(saxpy, cache):
    x = torch.ones(8, device="cuda")
    kernel = nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))
    for args in [x, x, 2.0], [x, x, 2.0, 8, 8], [x, x, x, 8]:
        with pytest.raises(TypeError, match=r"saxpy takes \[8, 8, 4, 4\]"):
            kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=args)


@hopper
def test_gpu_refuses_another_architecture(saxpy, cache):
    kernel = nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}, arch="sm_100"))
    with pytest.raises(RuntimeError, match="compiled for sm_100, does not load on .*compute capability 9.0"):
        kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1))


@hopper
def test_gpu_200_kb_of_shared_memory(tmp_path, cache):
    n = 200 << 8
    kernel = load(tmp_path, "turn")
    y = torch.zeros(n, device="cuda")
    kernel.prepare(grid=(1, 1, 1), block=(256, 1, 1), shared=4 * n, args=[y, n])()
    assert torch.equal(y, torch.arange(n - 1.0, -1, -1, device="cuda"))
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    with pytest.raises(ValueError, match=f"can have {most} bytes"):
        kernel.prepare(grid=(1, 1, 1), block=(256, 1, 1), shared=most + 1, args=[y, n])


@hopper
@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_gpu_clusters(cluster, tmp_path, cache):
    """Each block reads its neighbour's shared memory."""
    kernel = load(tmp_path, "neighbour")
    y, size = torch.zeros(2, 32, dtype=torch.int32, device="cuda")
    kernel.prepare(grid=(32, 1, 1), block=(1, 1, 1), cluster=(cluster, 1, 1), args=[y, size])()
    assert y.tolist() == [100 + i // cluster * cluster + (i + 1) % cluster for i in range(32)]
    assert size.tolist() == [cluster] * 32


def swizzled(box: np.ndarray, swizzle: str) -> np.ndarray:
    """The bytes of a box as the engine lays them: 16-byte chunk c goes to c xor the low bits of its 128-byte line.

    [CUDA C++ Programming Guide, Tensor Memory Access: swizzle]
    """
    chunks = np.frombuffer(box.tobytes(), np.uint8).reshape(-1, 16)
    c = np.arange(len(chunks))
    moved = np.empty_like(chunks)
    moved[c ^ (c >> 3 & (0 if swizzle == "none" else int(swizzle[:-1]) // 16 - 1))] = chunks
    return moved.ravel()


@pytest.mark.parametrize("swizzle", tensor_map.SWIZZLE)
def test_the_model_of_a_swizzle(swizzle):
    """The first chunk of the 128-byte line r lands r chunks further, as far as the span goes; nothing is lost."""
    box = np.repeat(np.arange(64, dtype=np.uint8), 16)
    laid = swizzled(box, swizzle)[::16].reshape(8, 8)
    span = 1 if swizzle == "none" else int(swizzle[:-1]) // 16
    assert [list(line).index(8 * r) for r, line in enumerate(laid)] == [r % span for r in range(8)]
    assert sorted(laid.ravel()) == list(range(64))


@hopper
@pytest.mark.parametrize("swizzle", tensor_map.SWIZZLE)
@pytest.mark.parametrize("dtype", tensor_map.ELEMENT)
def test_gpu_a_tile_by_the_copy_engine(dtype, swizzle, tmp_path, cache):
    """Inside the tensor and across its edges, where zeros come; heads are strided.

    Along the last dimension a box starts at a multiple of 16 bytes: else the instruction is illegal on an H200.
    """
    kernel = load(tmp_path, "tile")
    span = 128 if swizzle == "none" else int(swizzle[:-1])
    rows, columns = 40, span // dtype.itemsize
    full = torch.randint(1, 120, (50, 3, 2 * columns), device="cuda", dtype=torch.uint8).to(dtype)
    tensor = full.transpose(0, 1)  # [heads, N, d]
    tile_map = nvrtc.TensorMap.tiled(tensor, (1, rows, columns), swizzle)
    out = torch.zeros(rows * span, dtype=torch.uint8, device="cuda")
    padded = torch.zeros(3, 200, 4 * columns, dtype=dtype)
    padded[:, 60:110, columns : 3 * columns] = tensor.cpu()
    bits = padded.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()
    launch = kernel.prepare(
        grid=(1, 1, 1), block=(128, 1, 1), shared=rows * span + 1024, args=[tile_map, out, rows * span, 0, 0, 0]
    )
    for x, y, z in (0, 0, 0), (columns, 8, 2), (columns + 16 // dtype.itemsize, 25, 1), (-16 // dtype.itemsize, -3, 1):
        for index, coordinate in enumerate((x, y, z), 3):
            launch.update(index, coordinate)
        launch()
        box = bits[z, 60 + y : 60 + y + rows, columns + x : 2 * columns + x]
        np.testing.assert_array_equal(out.cpu().numpy(), swizzled(np.ascontiguousarray(box), swizzle), f"{x, y, z}")


@hopper
def test_gpu_side_stream(on_gpu):
    launch, x, y = on_gpu
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a launch elsewhere would not wait for the fill
        x.fill_(7)
        launch()
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 15))


@hopper
def test_gpu_graph(on_gpu):
    launch, x, y = on_gpu
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    assert torch.equal(y, torch.ones_like(y))
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, 1 + 6 * x)


@hopper
def test_gpu_from_a_new_thread(on_gpu):
    launch, x, y = on_gpu
    torch.cuda.synchronize()
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(y, 1 + 2 * x)


@hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_gpu_the_second(saxpy, cache):
    """On the device of the tensors, whichever is current."""
    kernel = nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))
    x, y = torch.ones(2, 64, device="cuda:1")
    kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[x, y, 2.0, 64])()
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0 and torch.equal(y, torch.full_like(y, 3))
    with pytest.raises(ValueError, match="expected all tensors on one CUDA device"):
        kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[x, y.to("cuda:0"), 2.0, 64])


@hopper
def test_gpu_launch_cost(on_gpu, capsys):
    launch, _, _ = on_gpu
    cost = microseconds(launch, calls=200)  # few enough that the queue never fills
    torch.cuda.synchronize()
    with capsys.disabled():
        print(f"\na prepared launch takes the host {cost:.1f} us on {torch.cuda.get_device_name()}")
    assert cost <= 15
