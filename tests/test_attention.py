"""sandbox.attention: the interface that others rely on, its gradients, its bad input, and the tough list."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

import sandbox
from sandbox import Mask, Problem, autograd, catalog, reference, target
from sandbox.measure import gate
from sandbox.measure.memory import peak_bytes
from sandbox.variant import Tile

SIMULATED = target.KIND == "simulator"
gpu_only = pytest.mark.skipif(SIMULATED, reason="needs a GPU: the simulator has no streams, graphs or large grids")
VARIANTS = ["v1", "v2", "fwd_v2_one_block", "fwd_v2_kv_outer"]
FORWARDS = [name for name, variant in catalog.variants("fwd").items() if not variant.tiles]  # others: test_hopper.py
BACKWARDS = [name for name, variant in catalog.variants("bwd").items() if "fp32" in variant.dtypes]


def qkv(B=1, N_q=21, N_k=21, H=2, H_kv=2, d=8, dtype=torch.float32, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, N_q, H, d), (B, N_k, H_kv, d), (B, N_k, H_kv, d)
    where = target.torch_device()
    return [torch.randn(s, generator=g).to(dtype).to(where).requires_grad_(grad) for s in shapes]


def check(variant, problem, inputs, tile=None):
    tile = tile or (Tile(8, 8) if SIMULATED else Tile(32, 32))
    verdict = gate.check(catalog.find(variant), problem, tile, inputs, target.device())
    assert verdict.passed, f"{variant} {problem}: {verdict.why}"
    return verdict


# ---- the interface


def test_variants_lists_every_kernel_file():
    assert {"fwd_v1", "fwd_v2", "fwd_v2_one_block", "fwd_v2_kv_outer", "bwd_v1", "bwd_v2"} <= set(sandbox.variants())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_are_autograds(variant, causal):
    q, k, v = qkv(H=4, H_kv=2, N_q=13, N_k=21, grad=True)
    O, LSE = sandbox.attention(q, k, v, variant=variant, causal=causal, return_lse=True)
    dO = torch.randn_like(O)
    O.backward(dO)
    problem = Problem(1, 4, 2, 13, 21, 8, mask=Mask(causal))
    inputs = [x.detach() for x in (q, k, v)]
    O_star, LSE_star = reference.forward(problem, *inputs)
    assert torch.allclose(O.double(), O_star, atol=1e-5) and torch.allclose(LSE.double(), LSE_star, atol=1e-5)
    assert O.shape == q.shape and O.dtype == q.dtype and LSE.shape == (1, 4, 13) and LSE.dtype == torch.float32
    for got, star in zip((q.grad, k.grad, v.grad), reference.backward(problem, *inputs, dO)):
        assert torch.allclose(got.double(), star, atol=1e-5)


def test_dO_may_be_strided_and_inputs_aliased():
    x = qkv()[0].requires_grad_()
    O = sandbox.attention(x, x, x)
    O.backward(torch.ones((), device=x.device).expand_as(O))
    y = x.detach().double().requires_grad_()
    z = y.transpose(1, 2)
    torch.nn.functional.scaled_dot_product_attention(z, z, z).sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-5)


def test_gradients_reach_only_what_asks_for_them():
    q, k, v = qkv()
    k.requires_grad_()
    sandbox.attention(q, k, v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_gradients_after_inference_mode():
    """What a call keeps for the next ones may be kept by a backward."""
    autograd._everything.cache_clear()
    x = qkv(grad=True)
    with torch.inference_mode():
        O = sandbox.attention(*x)
    y = sandbox.attention(*x)
    y.sum().backward()
    assert torch.equal(O, y) and all(z.grad.isfinite().all() for z in x)


def test_calls_that_are_alike_share_a_plan(monkeypatch):
    monkeypatch.setattr(autograd, "_plans", {})
    monkeypatch.setattr(autograd, "MOST_PLANS", 4)
    x = qkv(N_k=30)
    for _ in range(2):
        for options in {}, {"causal": True}, {"window": (3, 3)}, {"mask": torch.ones(30, device=x[0].device) > 0}:
            sandbox.attention(*x, **options)
        assert len(autograd._plans) == 4
    assert len({id(plan.problem) for plan in autograd._plans.values()}) == 4
    sandbox.attention(*qkv(N_k=31))
    assert len(autograd._plans) == 1


def test_another_kernel_of_that_name_has_a_plan_of_its_own(monkeypatch):
    """As a prototype has that was edited."""
    x, calls = qkv(), []
    right = sandbox.attention(*x)
    first = catalog.forward("v2")

    def build(problem, tile, device):
        return lambda *given: calls.append(first.launcher(problem, tile, device)(*given))

    edited = replace(first, build=build)
    monkeypatch.setattr(catalog, "forward", lambda name: edited)
    assert torch.equal(sandbox.attention(*x), right) and len(calls) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_same_bits_with_and_without_gradients(context):
    q, k, v = qkv(grad=True)
    with context():
        O, LSE = sandbox.attention(q, k, v, return_lse=True)
        assert O.requires_grad == torch.is_grad_enabled() and not LSE.requires_grad
        assert O.is_inference() == torch.is_inference_mode_enabled()
    plain = sandbox.attention(*(x.detach() for x in (q, k, v)), return_lse=True)
    assert torch.equal(O, plain[0]) and torch.equal(LSE, plain[1]) and not plain[0].requires_grad


def test_there_is_no_jvp():
    q, k, v = qkv()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        sandbox.attention(forward_ad.make_dual(q, q), k, v)


def test_LSE_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert sandbox.attention(*qkv(), return_lse=True)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_algorithms_choose_a_deterministic_backward():
    forward = catalog.forward("v2")
    assert not catalog.backward_of(forward).deterministic
    assert catalog.backward_of(forward, deterministic=True).name == "bwd_v2_deterministic"
    assert catalog.backward_of(catalog.forward("v1"), deterministic=True).name == "bwd_v1"


def test_tile_size_does_not_matter():
    q, k, v = qkv(N_q=30, N_k=19)
    tiles = [(4, 8), (16, 16), (5, 30), (32, 8)] if SIMULATED else [(16, 16), (64, 32), (48, 17)]
    outs = [sandbox.attention(q, k, v, tile=t, causal=True) for t in tiles]
    assert all(torch.allclose(outs[0], o, atol=2e-6) for o in outs)


def test_keys_may_be_permuted_and_split():
    q, k, v = qkv(N_k=26)
    O, LSE = sandbox.attention(q, k, v, return_lse=True)
    order = torch.randperm(26)
    assert torch.allclose(O, sandbox.attention(q, k[:, order], v[:, order]), atol=1e-5)
    parts = [sandbox.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 9), slice(9, 26))]
    whole = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (lse - whole).exp().transpose(1, 2)[..., None] for o, lse in parts)
    assert torch.allclose(merged, O, atol=1e-5) and torch.allclose(whole, LSE, atol=1e-5)


# ---- bad input: one line that names the argument, nothing launched


def mma(q, k, v, **options):
    return sandbox.attention(q, k, v, variant="fwd_v2_mma", **options)


def halves(x, d):
    return [torch.zeros(1, 4, 1, d, dtype=torch.float16, device=x.device) for _ in range(3)]


BAD = {
    "rank": (lambda q, k, v: sandbox.attention(q[0], k, v), ValueError, "q has shape"),
    "batch": (lambda q, k, v: sandbox.attention(q, k.repeat(2, 1, 1, 1), v), ValueError, "batch"),
    "head_dim": (lambda q, k, v: sandbox.attention(q, k[..., :4], v), ValueError, "head_dim"),
    "dtype": (lambda q, k, v: sandbox.attention(q, k.half(), v), TypeError, "dtype"),
    "kind of dtype": (lambda q, k, v: sandbox.attention(q.double(), k.double(), v.double()), TypeError, "float64"),
    "heads": (lambda q, k, v: sandbox.attention(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1)), ValueError, "multiple"),
    "not a tensor": (lambda q, k, v: sandbox.attention(q.tolist(), k, v), TypeError, "torch.Tensor"),
    "variant": (lambda q, k, v: sandbox.attention(q, k, v, variant="fwd_v22"), ValueError, "did you mean fwd_v2"),
    "backward's name": (lambda q, k, v: sandbox.attention(q, k, v, variant="bwd_v2"), ValueError, "bwd kernel"),
    "variant's type": (lambda q, k, v: sandbox.attention(q, k, v, variant=2), TypeError, "variant=2"),
    "align": (lambda q, k, v: sandbox.attention(q, k, v, causal=True, align="left"), ValueError, "bottom_right"),
    "window": (lambda q, k, v: sandbox.attention(q, k, v, window=(-2, 0)), ValueError, "window left=-2"),
    "window's kind": (lambda q, k, v: sandbox.attention(q, k, v, window=3), TypeError, "pair"),
    "mask's dtype": (lambda q, k, v: sandbox.attention(q, k, v, mask=torch.ones(21, 21)), TypeError, "torch.bool"),
    "mask's shape": (lambda q, k, v: sandbox.attention(q, k, v, mask=(q[0, :3, 0, :5] > 0)), ValueError, "broadcast"),
    "softcap": (lambda q, k, v: sandbox.attention(q, k, v, softcap=-1.0), ValueError, "softcap=-1.0"),
    "scale": (lambda q, k, v: sandbox.attention(q, k, v, scale=math.inf), ValueError, "scale=inf"),
    "tile": (lambda q, k, v: sandbox.attention(q, k, v, tile=(1024, 1024)), ValueError, "shared memory"),
    "tile's kind": (lambda q, k, v: sandbox.attention(q, k, v, tile=16), TypeError, "pair"),
    "dtype for tensor cores": (lambda q, k, v: mma(q, k, v), ValueError, "fwd_v2_mma takes .*: fwd_v2 takes fp32"),
    "head_dim for tensor cores": (lambda q, k, v: mma(*halves(q, 24)), ValueError, "multiples of 16, not 24: fwd_v2"),
    "mask for tensor cores": (
        lambda q, k, v: mma(*halves(q, 16), mask=torch.ones(4, 4, dtype=torch.bool, device=q.device)),
        ValueError,
        "no boolean masks: fwd_v2 has them",
    ),
    "tile for tensor cores": (lambda q, k, v: mma(*halves(q, 16), tile=(48, 1)), ValueError, "multiple of 16 rows, a"),
    "tile's size": (lambda q, k, v: sandbox.attention(q, k, v, tile=(0, 16)), ValueError, "Br=0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, says = BAD[what]
    with pytest.raises(error, match=says) as caught:
        call(*qkv())
    assert "\n" not in str(caught.value)


# what is equal to what was accepted: 1 == 1.0 == True
EQUAL = [
    ({"softcap": 0.0}, {"softcap": False}, TypeError, "softcap=False"),
    ({"scale": 1.0}, {"scale": True}, TypeError, "scale=True"),
    ({"window": (1, 0)}, {"window": (True, 0)}, TypeError, "window left=True"),
    ({"window": (1, 0)}, {"window": (1.0, 0)}, TypeError, "window left=1.0"),
    ({"tile": (16, 16)}, {"tile": (16.0, 16)}, TypeError, "Br=16.0"),
    ({"tile": (16, 16)}, {"tile": (16, 16, 16)}, TypeError, "pair"),
]


@pytest.mark.parametrize("good, bad, error, says", EQUAL)
def test_bad_input_that_equals_good(good, bad, error, says):
    x = qkv()
    for _ in range(2):
        sandbox.attention(*x, **good)
        with pytest.raises(error, match=says):
            sandbox.attention(*x, **bad)
        for what in BAD.values():
            with pytest.raises(what[1], match=what[2]):
                what[0](*x)


@pytest.mark.parametrize("options", [{"window": [2, 0]}, {"tile": [16, 32]}, {"tile": Tile(16, 32)}, {"causal": 1}])
def test_lists_tiles_and_truths_are_accepted_as_ever(options):
    x = qkv()
    twice = [sandbox.attention(*x, **options) for _ in range(2)]
    plain = {"window": (2, 0), "tile": (16, 32), "causal": True}
    right = sandbox.attention(*x, **{name: plain[name] for name in options})
    assert all(torch.equal(O, right) for O in twice)


def test_swapped_layout_is_a_hint_inside_an_error():
    q, k, v = (torch.zeros(1, 4, n, 8, device=target.torch_device()) for n in (30, 20, 20))
    with pytest.raises(ValueError, match=r"pass x.transpose\(1, 2\)"):
        sandbox.attention(q, k, v)
    q, k, v = (torch.zeros(1, n, 4, 8, device=target.torch_device()) for n in (1, 20, 20))  # decoding: no error
    assert sandbox.attention(q, k, v).shape == q.shape


@pytest.mark.skipif(not SIMULATED, reason="a GPU is not refused long problems")
def test_long_simulations_need_force():
    q, k, v = (torch.zeros(1, 4096, 8, 64) for _ in range(3))
    with pytest.raises(ValueError, match="force=True"):
        sandbox.attention(q, k, v)


@pytest.mark.skipif(not SIMULATED, reason="CPU tensors belong to the simulator")
def test_device_must_be_the_targets():
    q, k, v = (torch.zeros(1, 4, 1, 8, device="meta") for _ in range(3))
    with pytest.raises(ValueError, match="q is on meta"):
        sandbox.attention(q, k, v)


# ---- the tough list


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("N_q, N_k", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 30), (30, 1)])
def test_short_sequences(name, N_q, N_k):
    problem = Problem(1, 2, 1, N_q, N_k, 8)
    check(name, problem, gate.gaussian(problem, 0, target.torch_device()))


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("N_q, N_k", [(25, 10), (10, 25)])
def test_both_alignments(name, align, N_q, N_k):
    problem = Problem(1, 1, 1, N_q, N_k, 8, mask=Mask(True, align))
    check(name, problem, gate.gaussian(problem, 1, target.torch_device()))


def test_rows_that_see_nothing():
    q, k, v = qkv(N_q=12, N_k=5, grad=True)
    O, LSE = sandbox.attention(q, k, v, causal=True, return_lse=True)  # the first 7 rows stand before every key
    O.sum().backward()
    assert (O[:, :7] == 0).all() and (LSE[..., :7] == -math.inf).all() and (q.grad[:, :7] == 0).all()
    assert (O[:, 7:] != 0).any() and k.grad.isfinite().all()


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_masked_does_not_leak(name, poison):
    """K at masked keys, and K and V in tiles that the mask empties."""
    problem = Problem(1, 1, 1, 16, 16, 8, mask=Mask(boolean=True))
    x = gate.gaussian(problem, 2, target.torch_device())
    mask = torch.ones(16, 16, dtype=torch.bool, device=x.q.device)
    mask[:, 3] = False
    mask[:, 8:] = False
    k, v = x.k.clone(), x.v.clone()
    k[:, 3] = poison
    k[:, 8:], v[:, 8:] = poison, poison
    check(name, problem, gate.Inputs(x.q, k, v, mask), tile=Tile(8, 8))


@pytest.mark.parametrize("name", FORWARDS)
def test_keys_past_the_end_do_not_leak(name):
    """The memory behind N_k is NaN."""
    problem = Problem(1, 1, 1, 13, 11, 8)
    x = gate.gaussian(problem, 3, target.torch_device())
    wide = [torch.full((1, 32, 1, 8), math.nan, device=x.q.device) for _ in range(2)]
    for w, y in zip(wide, (x.k, x.v)):
        w[:, :11] = y
    check(name, problem, gate.Inputs(x.q, wide[0][:, :11], wide[1][:, :11]))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_live_non_finite_inputs_give_what_the_oracle_gives(name, which, value):
    problem = Problem(1, 1, 1, 12, 12, 8)
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    check(name, problem, gate.Inputs(**x))


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_same_bits_every_time(name):
    if not catalog.find(name).deterministic and not SIMULATED:
        pytest.skip(f"{name} adds atomically, in whatever order; its deterministic sibling is tested")
    problem = Problem(1, 2, 1, 20, 20, 8) if SIMULATED else Problem(2, 8, 2, 1000, 1000, 64, "fp16", mask=Mask(True))
    x = gate.gaussian(problem, 5, target.torch_device())
    runs = 2 if SIMULATED else 1000
    tile = Tile(8, 8) if SIMULATED else Tile(32, 32)
    run, outputs = gate.prepare(catalog.find(name), problem, tile, x, target.device())
    run()
    first = [o.clone() for o in outputs.values()]
    for _ in range(runs - 1):
        run()
        assert all(torch.equal(a, b) for a, b in zip(first, outputs.values()))


@pytest.mark.skipif(not SIMULATED, reason="shared accesses are counted on the simulator")
@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_every_product_reads_its_operands_from_shared_tiles(name):
    """RA + RB values serve RA·RB multiply-adds: each operand tile is read once per thread that needs it."""
    from sandbox.device.simulator import counting

    problem, tile = Problem(1, 1, 1, 16, 16, 8), Tile(8, 8)
    run, _ = gate.prepare(catalog.find(name), problem, tile, gate.gaussian(problem, 0), target.device())
    with counting() as traffic:
        run()
    visits, threads = 2 * 2, 4  # 4 x 4 threads, each with 2 of the 8 rows
    operand = visits * 8 * 8 * threads  # rows x d, read by every column of threads
    wanted = {"sQ": 1, "sK": 1, "sV": 1} if name in FORWARDS else {"sQ": 2, "sK": 2, "sV": 1, "sdO": 2}
    for tile_name, products in wanted.items():
        assert traffic.shared_reads[tile_name] >= products * operand, (tile_name, traffic.shared_reads)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_memory_grows_linearly(variant):
    """What a call allocates beside its inputs, by N: O(N), where S alone is O(N²)."""

    def extra(N):
        q, k, v = qkv(N_q=N, N_k=N, H=1, H_kv=1, dtype=torch.float16, grad=True)
        return peak_bytes(lambda: sandbox.attention(q, k, v, variant=variant).sum().backward())

    N = 16 if SIMULATED else 4096
    extra(N)
    small, large = extra(N), extra(4 * N)
    assert large < 4.5 * small and large < 4 * N * 8 * 60
    assert SIMULATED or large < (4 * N) ** 2


# ---- on a GPU


@gpu_only
def test_more_heads_than_a_grid_has_rows():
    problem = Problem(70_000, 1, 1, 3, 3, 8, "fp16")
    x = gate.gaussian(problem, 0, "cuda")
    for name in ("fwd_v1", "fwd_v2", "bwd_v2"):
        check(name, problem, x, Tile(16, 16))


@gpu_only
def test_offsets_past_2_to_31():
    """The last head of a tensor of 2.2e9 elements."""
    N, H, d = 4096, 8448, 64
    big = torch.zeros(1, N, H, d, dtype=torch.float16, device="cuda")
    big[:, :, -1] = torch.randn(1, N, d, device="cuda", dtype=torch.float16)
    x = big[:, :, -1:]
    assert big.numel() > 2**31
    problem = Problem(1, 1, 1, N, N, d, "fp16")
    check("fwd_v2", problem, gate.Inputs(x, x, x), Tile(64, 64))


@gpu_only
def test_side_stream_and_graph():
    q, k, v = qkv(N_q=2000, N_k=2000, H=4, H_kv=4, d=64)
    right = sandbox.attention(q, k, v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.empty_like(x) for x in (q, k, v)]
        torch.cuda._sleep(200_000_000)
        for a, b in zip(late, (q, k, v)):
            a.copy_(b)
        O = sandbox.attention(*late)  # right only if it waits for the copies, on this stream
    stream.synchronize()
    assert torch.equal(O, right)
    graph = torch.cuda.CUDAGraph()
    static = [x.clone() for x in (q, k, v)]
    with torch.cuda.graph(graph):
        O = sandbox.attention(*static)
    static[0].copy_(q * 2)
    graph.replay()
    assert torch.equal(O, sandbox.attention(q * 2, k, v))


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_second_gpu():
    q, k, v = (x.to("cuda:1") for x in qkv(N_q=200, N_k=200, d=64))
    O = sandbox.attention(q, k, v)
    assert O.device == q.device and torch.equal(O.cpu(), sandbox.attention(*(x.to("cuda:0") for x in (q, k, v))).cpu())


@gpu_only
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("d", [64, 128])
def test_large(dtype, d):
    problem = Problem(2, 8, 4, 4000, 4100, d, dtype, mask=Mask(True))
    x = gate.gaussian(problem, 6, "cuda")
    tile = Tile(64, 64) if d == 64 else Tile(32, 32)
    for name in ("fwd_v1", "fwd_v2", "bwd_v2", "bwd_v2_deterministic"):
        check(name, problem, x, tile)
