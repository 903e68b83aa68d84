"""custom_kernels: the references against plain formulas, the paths and the Triton kernels against the references, Muon.

Triton's interpreter must be chosen before Triton is imported and would change every other test of the process, so
`test_kernels_in_the_interpreter` runs this file again in a process of its own; the tests under `if INTERPRETING` exist
only there. It computes in float32 (and float64 for gradcheck): bfloat16 is not to be trusted in the interpreter, and is
tested where there is a GPU."""
import json
import os
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("NANORECA_KERNELS") == "triton"
if INTERPRETING:
    pytest.importorskip("triton")

from processes import alone  # noqa: E402

import custom_kernels as ck  # noqa: E402
from custom_kernels import pick  # noqa: E402
from custom_kernels.muon import orthogonalize  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.environ.get("PARITY_DIR", os.path.join(ROOT, "tests", "golden"))
att = sys.modules["custom_kernels.attention"]  # the package's function of that name hides the module
lce, dif = sys.modules["custom_kernels.linear_cross_entropy"], sys.modules["custom_kernels.diffusion_loss"]

def same(name, got, want, tolerance):
    assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{name}: {got.shape} {got.dtype}, not {want.shape}"
    assert got.isfinite().all(), f"{name}: not finite"
    difference, largest = ((got - want).abs().max().item(), want.abs().max().item()) if got.numel() else (0.0, 0.0)
    allowed = tolerance * max(1.0, largest)
    ok = "OK" if difference <= allowed else "NOT OK"
    line = f"{name:40} {ok:6} max difference {difference:.2e}, allowed {allowed:.2e}"
    print(line)
    assert ok == "OK", line

def with_gradients(f, inputs, generator):
    """-> outputs of f(*inputs) and the gradients of one random weighting of them, in the inputs that want one."""
    outs = f(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, weights)]

def compare(name, f, reference, inputs, tolerance=3e-6):
    got = with_gradients(f, inputs, torch.Generator().manual_seed(1))
    want = with_gradients(reference, inputs, torch.Generator().manual_seed(1))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        same(f"{name} [{i}]", a, b, tolerance)

def compare_attention(name, plan, inputs):
    compare(name, lambda *x: att.attention_triton(*x, plan), lambda *x: att.attention_reference(*x, plan), inputs)

def intervals(kind, R, Tq, Tk, g):
    """Intervals of many kinds, with some empty ones and some of one key."""
    i = torch.arange(Tq).repeat(R, 1)
    if kind == "causal":  # left-padded rows: pads see nothing
        pads = torch.arange(R)[:, None] * 3
        return torch.where(i < pads, 0, pads), torch.where(i < pads, 0, i + 1 + Tk - Tq)
    if kind == "full":
        return torch.zeros(R, Tq).long(), torch.full((R, Tq), Tk)
    if kind == "packed":  # three documents: text, a bidirectional block, text
        cuts = torch.tensor([0, Tq // 3, Tq // 2, Tq])
        doc = torch.bucketize(i, cuts, right=True) - 1
        return cuts[doc] * Tk // Tq, torch.where(doc == 1, cuts[2] * Tk // Tq, (i + 1) * Tk // Tq)
    if kind == "steps":  # wide intervals whose ends go up and down between the grains of a tile
        step = i // 32 % 3
        return torch.tensor([40, 0, 70])[step], Tk - torch.tensor([0, 60, 30])[step]
    a, b = torch.randint(0, Tk + 1, (2, R, Tq), generator=g)
    lo, hi = torch.minimum(a, b), torch.maximum(a, b)
    lo[:, 0], hi[:, 0] = 5, 5  # empty
    lo[:, -1], hi[:, -1] = 7, 3  # inside out: empty as well
    if Tq > 2:
        lo[:, 1], hi[:, 1] = Tk - 1, Tk  # one key
    return lo, hi

def qkv(B, Hq, Hkv, Tq, Tk, D, g, dtype=torch.float32):
    """As models have them: (B, T, H, D) in memory."""
    sizes = (Tq, Hq), (Tk, Hkv), (Tk, Hkv)
    return [torch.randn(B, T, H, D, generator=g, dtype=dtype).transpose(1, 2).requires_grad_() for T, H in sizes]

def diffusion_case(dtype, N, C, g):
    t = torch.randint(0, 1000, (N,), generator=g)
    t[:N // 3] = 0
    t[-1] = 999
    x0, noise, near, v = torch.randn(4, N, C, generator=g, dtype=dtype)
    near *= torch.where(t == 0, 0.02, 1.0)[:, None]  # the bins of t = 0 are narrow; elsewhere errors must count
    out = torch.cat([noise + near, v], 1).requires_grad_()
    betas = torch.linspace(1e-4, 0.02, 1000)
    return out, x0.clamp(-1, 1), noise, t, ck.diffusion_tables(betas)

if INTERPRETING:
    @pytest.mark.parametrize("kind, B, R, Hq, Hkv, Tq, Tk, D", [
        ("random", 2, 2, 2, 1, 70, 100, 80), ("causal", 2, 2, 4, 2, 70, 70, 64), ("packed", 1, 1, 2, 2, 130, 130, 72),
        ("full", 1, 1, 1, 1, 33, 64, 128), ("random", 2, 1, 3, 1, 20, 45, 24), ("random", 1, 1, 1, 1, 3, 40, 8),
        ("causal", 1, 1, 1, 1, 1, 1, 16)])
    def test_attention(kind, B, R, Hq, Hkv, Tq, Tk, D):
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(B, Hq, Hkv, Tq, Tk, D, g)
        plan = ck.attention_plan(*intervals(kind, R, Tq, Tk, g), Tk)
        compare_attention(f"attention {kind} {D}", plan, (q, k, v))

    @pytest.mark.parametrize("kind, Tq, Tk", [("steps", 200, 260), ("random", 150, 140)])
    def test_attention_with_the_tiles_of_half_precision(kind, Tq, Tk, monkeypatch):
        tiles, g = att.tiles, torch.Generator().manual_seed(0)
        monkeypatch.setattr(att, "tiles", lambda D, dtype: tiles(D, torch.bfloat16))
        q, k, v = qkv(1, 1, 1, Tq, Tk, 16, g)
        plan = ck.attention_plan(*intervals(kind, 1, Tq, Tk, g), Tk)
        compare_attention(f"large tiles {kind}", plan, (q, k, v))

    def test_attention_large_scores_and_half_precision():
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 1, 1, 40, 70, 32, g)
        plan = ck.attention_plan(*intervals("random", 1, 40, 70, g), 70)
        loud = (q.detach() * 300, k.detach(), v.detach())  # exp of such scores, without the running maximum, overflows
        same("large scores", att.attention_triton(*loud, plan), att.attention_reference(*loud, plan), 2e-5)
        half = [t.detach().half() for t in (q, k, v)]
        want = att.attention_reference(q, k, v, plan).detach()
        same("float16", att.attention_triton(*half, plan).float(), want, 3e-3)

    def test_keys_outside_the_bounds_are_never_read():
        """Tiles that nobody sees hold nan: one multiplication with them, even by 0, would show."""
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 1, 1, 64, 256, 16, g)
        plan = ck.attention_plan(torch.full((1, 64), 64), torch.full((1, 64), 128), 256)
        with torch.no_grad():
            want = att.attention_reference(q, k, v, plan)
            for t in (k, v):
                t[:, :, :64] = t[:, :, 128:] = float("nan")
            same("output", att.attention_triton(q, k, v, plan), want, 2e-6)
        dq, dk, dv = torch.autograd.grad(att.attention_triton(q, k, v, plan).sum(), (q, k, v))
        assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
        assert dv[:, :, :64].abs().max() == 0 and dk[:, :, 128:].abs().max() == 0 and dv[:, :, 64:128].abs().min() > 0

    def test_same_input_same_bits():
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 2, 1, 40, 70, 16, g)
        plan = ck.attention_plan(*intervals("random", 1, 40, 70, g), 70)
        squares = (att.attention_triton(q, k, v, plan).square().sum() for _ in range(2))
        one, two = (torch.autograd.grad(total, (q, k, v)) for total in squares)
        assert all(torch.equal(a, b) for a, b in zip(one, two))

    @pytest.mark.parametrize("N, V, D, bias, kept, count", [
        (150, 130, 40, True, 0.5, None), (100, 70, 72, False, 0.9, 7.0), (20, 70, 16, True, 0.0, None),
        (1, 65, 16, False, 1.0, torch.tensor(3.0))])
    def test_linear_cross_entropy(N, V, D, bias, kept, count, monkeypatch):
        monkeypatch.setattr(lce, "chunk_rows", lambda N, V, numbers: min(N, 64))  # several, the last one ragged
        g = torch.Generator().manual_seed(0)
        h, w = (torch.randn(n, D, generator=g).requires_grad_() for n in (N, V))
        b = torch.randn(V, generator=g).requires_grad_() if bias else None
        labels = torch.randint(0, V, (N,), generator=g).masked_fill(torch.rand(N, generator=g) >= kept, -100)

        def kernels(h, w, b):
            return lce.linear_cross_entropy_fused(h, w, labels, b, count=count)

        def reference(h, w, b):
            return lce.linear_cross_entropy_reference(h, w, labels, b, count=count)

        compare("linear cross entropy", kernels, reference, (h, w, b), 3e-6)
        with torch.no_grad():
            same("without gradients", kernels(h, w, b), reference(h, w, b), 1e-6)

    def test_loss_rows():
        g = torch.Generator().manual_seed(0)
        out, *rest = diffusion_case(torch.float32, 300, 10, g)
        compare("diffusion rows", lambda out: dif.diffusion_loss_rows_triton(out, *rest),
                lambda out: dif.diffusion_loss_rows_reference(out, *rest), (out,), 1e-5)  # vb: log of a difference
        v, x0, noise = torch.randn(3, 70, 17, generator=g)
        compare("flow rows", lambda v: dif.flow_loss_rows_triton(v, x0, noise),
                lambda v: dif.flow_loss_rows_reference(v, x0, noise), (v.requires_grad_(),))

    def test_gradcheck_in_float64():
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 2, 1, 3, 4, 3, g, torch.float64)
        plan = ck.attention_plan(torch.tensor([[0, 2, 3]]), torch.tensor([[4, 3, 3]]), 4)
        assert torch.autograd.gradcheck(lambda *x: att.attention_triton(*x, plan), (q, k, v), fast_mode=True)
        h, w, b = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 2), (5, 2), (5,)))
        labels = torch.tensor([4, -100, 1])
        assert torch.autograd.gradcheck(
            lambda h, w, b: lce.linear_cross_entropy_fused(h, w, labels, b), (h, w, b), fast_mode=True)
        out, *rest = diffusion_case(torch.float64, 12, 3, g)
        v = out[:, :3].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: dif.flow_loss_rows_triton(v, *rest[:2]), (v,), fast_mode=True)
        # epsilon is detached in vb by design, so a numerical derivative sees more than autograd there: v alone
        epsilon, v = out.detach().chunk(2, 1)
        assert torch.autograd.gradcheck(
            lambda v: dif.diffusion_loss_rows_triton(torch.cat([epsilon, v], 1), *rest), (v.clone().requires_grad_(),),
            fast_mode=True, atol=1e-4)

    def test_operators_are_what_they_declare():
        """Shapes, types and strides of the fake versions that torch.compile works with; schemas; gradients."""
        g = torch.Generator().manual_seed(0)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        q, k, v = qkv(1, 2, 1, 5, 7, 8, g)
        plan = ck.attention_plan(*intervals("random", 1, 5, 7, g), 7)
        whole = q, k, v, plan.lo, plan.hi, *att.attention_bounds(plan)
        torch.library.opcheck(att.interval_attention, whole, test_utils=tests)
        h, w = (torch.randn(n, 4, generator=g).requires_grad_() for n in (3, 5))
        for gradients, kernels in ((True, True), (False, True), (True, False), (False, False)):
            arguments = h, w, None, torch.tensor([1, -100, 2]), torch.ones(()), -100, gradients, kernels
            torch.library.opcheck(lce.linear_cross_entropy_op, arguments, test_utils=tests[::2])
        case = diffusion_case(torch.float32, 9, 4, g)
        torch.library.opcheck(dif.loss_rows, case, test_utils=tests)
        x0, noise = case[1:3]
        torch.library.opcheck(dif.loss_rows, (x0.clone().requires_grad_(), x0, noise, None, None), test_utils=tests)

    def test_compiled_graph_is_whole():
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 2, 1, 9, 9, 8, g)
        plan = ck.attention_plan(*intervals("random", 1, 9, 9, g), 9)
        w, labels = torch.randn(5, 16, generator=g).requires_grad_(), torch.tensor([0, -100, 4] * 3)

        def model(q, k, v, w):
            h = ck.attention(q, k, v, None, None, plan=plan).transpose(1, 2).flatten(2)[0]  # (9, 16)
            return ck.linear_cross_entropy(h, w, labels) + ck.flow_loss_rows(h, h.detach(), h.detach() * 3).sum()

        compare("compiled", torch.compile(model, backend="aot_eager", fullgraph=True), model, (q, k, v, w), 1e-6)

else:
    def test_kernels_in_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed (pip install --no-deps triton==3.7.1)")
        done = alone("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", os.path.abspath(__file__),
                     TRITON_INTERPRET="1", NANORECA_KERNELS="triton", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("kind, R", [("random", 2), ("random", 1), ("causal", 2), ("packed", 1), ("full", 1)])
    def test_attention_reference_is_softmax_over_the_interval(kind, R):
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(2, 4, 2, 20, 20, 8, g)
        lo, hi = intervals(kind, R, 20, 20, g)

        def plain(q, k, v):
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            keys = torch.arange(20)
            seen = ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None]
            p = (q @ k.mT / 8 ** 0.5).exp() * seen
            return p / p.sum(-1, keepdim=True).clamp(min=1e-30) @ v

        compare(f"reference {kind}", lambda *x: ck.attention(*x, lo, hi), plain, (q, k, v))
        plan = ck.attention_plan(lo, hi, 20)
        compare(f"plan {kind}", lambda *x: ck.attention(*x, None, None, plan=plan), plain, (q, k, v))
        assert plan.kind == {"full": "full"}.get(kind, "mask")
        with torch.no_grad():
            same("flex", att.attention_flex(q.detach(), k.detach(), v.detach(), plan), plain(q, k, v), 2e-6)

    def test_plan():
        i = torch.arange(6)[None]
        assert ck.attention_plan(i * 0, i + 1, 6).kind == "causal"
        assert ck.attention_plan(i * 0, i * 0 + 99, 6).kind == "full"
        assert ck.attention_plan(i * 0, i + 1, 7).kind == "mask"
        with pytest.raises(ValueError, match=r"lo \(1, 6\) and hi \(6,\)"):
            ck.attention_plan(i, i[0], 6)

    @pytest.mark.parametrize("kind, Tq, Tk", [
        ("random", 70, 100), ("causal", 70, 70), ("packed", 130, 130), ("full", 33, 64), ("random", 200, 300),
        ("steps", 200, 260)])
    def test_bounds_and_tiles_say_what_the_mask_says(kind, Tq, Tk):
        """The bounds that the kernels skip by, and FlexAttention's tile lists, against the dense mask, tile by tile."""
        g = torch.Generator().manual_seed(0)
        plan = ck.attention_plan(*intervals(kind, 2, Tq, Tk, g), Tk)
        mask = att.interval_mask(plan.lo, plan.hi, Tk)[:, 0]  # (2, Tq, Tk)
        q_bounds, k_bounds = att.attention_bounds(plan)
        G, keys, queries = att.GRAIN, torch.arange(Tk), torch.arange(Tq)
        for r in range(2):
            for (lo, full, full_end, hi), rows in zip(q_bounds[r].tolist(), mask[r].split(G)):
                assert not rows[:, (keys < lo) | (keys >= hi)].any()
                assert rows[:, (keys >= full) & (keys < full_end)].all()
                assert lo >= hi or rows[:, lo].any() and rows[:, hi - 1].any(), "bounds are as tight as they can be"
            for (lo, full, full_end, hi), columns in zip(k_bounds[r].tolist(), mask[r].split(G, 1)):
                assert not columns[(queries < lo) | (queries >= hi)].any()
                assert columns[(queries >= full) & (queries < full_end)].all()
        if kind == "full":
            assert (k_bounds[0, :, 1] == 0).all() and (k_bounds[0, :, 2] == Tq).all(), "a full mask has no edges"
        block = att.flex_block_mask(plan)
        lists = ((block.kv_num_blocks, block.kv_indices), (block.full_kv_num_blocks, block.full_kv_indices))
        for r in range(2):
            for i, rows in enumerate(mask[r].split(att.FLEX_BLOCK)):
                part, full = (set(numbers[r, 0, i, :count[r, 0, i]].tolist()) for count, numbers in lists)
                for j, tile in enumerate(rows.split(att.FLEX_BLOCK, 1)):
                    assert (j in full) == bool(tile.all()) and (j in part) == bool(tile.any() and not tile.all())

    @pytest.mark.parametrize("kept, count", [(0.5, None), (1.0, torch.tensor(7.0)), (0.0, None), (0.3, 5)])
    def test_linear_cross_entropy(kept, count, monkeypatch):
        monkeypatch.setattr(lce, "chunk_rows", lambda N, V, numbers: 7)
        g = torch.Generator().manual_seed(0)
        h, w, b = (torch.randn(s, generator=g).requires_grad_() for s in ((20, 8), (30, 8), (30,)))
        labels = torch.randint(0, 30, (20,), generator=g).masked_fill(torch.rand(20, generator=g) >= kept, -1)
        n = count if count is not None else max(1, int((labels != -1).sum()))

        def plain(h, w, b):
            return F.cross_entropy(h @ w.T + b, labels, ignore_index=-1, reduction="sum") / n

        def chunked(h, w, b):
            return lce.linear_cross_entropy_fused(h, w, labels, b, -1, count, kernels=False)

        compare("reference", lambda h, w, b: ck.linear_cross_entropy(h, w, labels, b, -1, count), plain, (h, w, b))
        compare("chunked", chunked, plain, (h, w, b))
        compare("frozen weight", chunked, plain, (h, w.detach(), b.detach()))

    def test_chunked_cross_entropy_in_bfloat16(monkeypatch):
        """As a GPU would run it under autocast: float32 weights and their float32 gradients, products in bfloat16,
        everything else in float32."""
        monkeypatch.setattr(lce, "choose", lambda *_: "chunked")
        monkeypatch.setattr(lce, "chunk_rows", lambda N, V, numbers: 50)
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(s, generator=g).requires_grad_() for s in ((130, 64), (300, 64), (300,))]
        labels = torch.randint(0, 300, (130,), generator=g).masked_fill(torch.rand(130, generator=g) < 0.3, -100)

        def run(f, autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = f(*inputs)
            return [loss.detach(), *torch.autograd.grad(loss, inputs)]

        def plain(h, w, b):
            return F.cross_entropy(F.linear(h, w, b).float(), labels)

        mine = run(lambda h, w, b: ck.linear_cross_entropy(h, w, labels, b), True)
        names = "loss", "hidden", "weight", "bias"
        for name, got, usual, want in zip(names, mine, run(plain, True), run(plain, False)):
            assert got.dtype == want.dtype == torch.float32
            assert (got - want).abs().max() <= 2 * (usual - want).abs().max() + 1e-6, name
            assert name == "loss" or (got - want).abs().max() > 1e-7, "it was meant to run in bfloat16"

    def test_diffusion_rows_against_distributions():
        """vb as what it stands for: a divergence between two Gaussians (t > 0), a probability of a bin (t = 0); mean
        squared error of epsilon."""
        g = torch.Generator().manual_seed(0)
        out, x0, noise, t, tables = diffusion_case(torch.float64, 200, 6, g)
        betas = torch.linspace(1e-4, 0.02, 1000).double()
        acp = torch.cumprod(1 - betas, 0)
        a, prev = acp[t][:, None], torch.cat([torch.ones(1).double(), acp])[t][:, None]
        beta = betas[t][:, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        assert torch.allclose(ck.add_noise(x0, noise, t, tables), x_t, atol=1e-6)

        def mean(x0):
            return beta * prev.sqrt() / (1 - a) * x0 + (1 - beta).sqrt() * (1 - prev) / (1 - a) * x_t

        epsilon, v = out.chunk(2, 1)
        predicted = mean((x_t - (1 - a).sqrt() * epsilon.detach()) / a.sqrt())
        variance = beta * (1 - prev) / (1 - a)
        variance = torch.where(t[:, None] == 0, betas[1] * (1 - acp[0]) / (1 - acp[1]), variance)
        std = (0.5 * ((v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log())).exp()
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean(x0), variance.sqrt()), normal(predicted, std))
        mse, vb = ck.diffusion_loss_rows(out, x0, noise, t, tables)
        same("mse", mse, (epsilon - noise).square().mean(1), 1e-12)
        later = t > 0
        same("vb, t > 0", vb[later], kl.mean(1)[later] / torch.tensor(2.0).log(), 1e-5)  # the tables are float32
        low, high = normal(predicted, std).cdf(x0 - 1 / 255), normal(predicted, std).cdf(x0 + 1 / 255)
        low, high = torch.where(x0 < -0.999, 0, low), torch.where(x0 > 0.999, 1, high)
        bits = -(high - low).clamp(min=1e-12).log2().mean(1)
        # the published loss approximates the Gaussian's distribution function by tanh
        assert ((vb - bits)[~later].abs() <= 0.02 * bits[~later].abs() + 0.02).all()
        trained = torch.autograd.grad(vb.sum(), out, retain_graph=True)[0]
        assert trained[:, :6].abs().max() == 0, "vb must not train epsilon"

    def test_flow_rows():
        v, x0, noise = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
        same("flow", ck.flow_loss_rows(v, x0, noise), (v - (noise - x0)).square().mean(1), 1e-7)

    def golden(name):
        path = os.path.join(GOLDEN, name, "cases.safetensors")
        if not os.path.exists(path):
            pytest.skip(f"{path} is not there")
        from safetensors.torch import load_file
        with open(os.path.join(GOLDEN, name, "config.json")) as f:
            return load_file(path), json.load(f)

    def take(cases, *names):
        if any(n not in cases for n in names):
            pytest.skip(f"the golden set holds no {names}")
        return [cases[n] for n in names]

    def is_this_mask(name, lo, hi, mask):
        """The intervals give the published mask, and attention over them what attention under the dense mask gives."""
        mask = mask.bool().view(-1, *mask.shape[-2:])
        mine = att.interval_mask(lo, hi, mask.shape[-1])[:, 0].expand_as(mask)
        assert torch.equal(mine, mask), f"{name}: {int((mine != mask).sum())} of {mask.numel()} entries differ"
        q, k, v = torch.randn(3, len(mask), 2, mask.shape[-1], 8, generator=torch.Generator().manual_seed(0))
        some = mask.any(-1)[:, None, :, None]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).masked_fill(~some, 0)
        same(name, ck.attention(q, k, v, lo, hi), want, 2e-6)

    @pytest.mark.parametrize("case", ["und", "t2i", "edit", "reca"])
    def test_bagel_masks_are_intervals(case):
        cases, _ = golden("bagel")
        names = "mask", "split_lens", "attn_modes", "sample_lens"
        mask, splits, modes, samples = take(cases, *(f"{case}.{n}" for n in names))
        start, lo, hi, ends = 0, [], [], torch.cumsum(samples, 0)
        for n, mode in zip(splits.tolist(), modes.tolist()):  # 0 is causal; an image sees itself and all before it
            place = torch.bucketize(torch.tensor(start), ends, right=True)
            sample = torch.cat([torch.zeros(1).long(), ends])[place].item()
            lo += [sample] * n
            hi += [start + n if mode else start + i + 1 for i in range(n)]
            start += n
        is_this_mask(case, torch.tensor(lo)[None], torch.tensor(hi)[None], mask)

    @pytest.mark.parametrize("case", ["t2i", "lm", "mmu", "mmu_vit"])
    def test_showo_masks_are_intervals(case):
        """First and last key that a query sees; with CLIP, after moving the features to the front, where the model has
        them."""
        cases, config = golden("showo")
        mask, = take(cases, f"mask.out.{case}")
        mask = mask[:, 0]
        if case == "mmu_vit":
            seen_by_all = mask[0].all(0)  # the features' columns, and the few before them that every later row sees
            order = torch.cat([seen_by_all.nonzero()[:, 0], (~seen_by_all).nonzero()[:, 0]])
            mask = mask[:, order][:, :, order]
        hi = mask.shape[-1] - mask.flip(-1).int().argmax(-1)
        is_this_mask(case, mask.int().argmax(-1), hi * mask.any(-1), mask)

    def test_harmon_masks_are_intervals():
        """Causal over right-padded rows: what a real token sees; pads are dropped."""
        cases, _ = golden("harmon")
        pads, = take(cases, "recon.out.llm_attention_mask")
        T = pads.shape[1]
        real = pads.bool()
        mask = torch.stack([torch.ones(T, T).tril().bool() & r[None, :] for r in real])
        for row, r in zip(mask, real):  # a row at a time, its pads moved to the front
            order = torch.cat([(~r).nonzero()[:, 0], r.nonzero()[:, 0]])
            n, i = int((~r).sum()), torch.arange(T)[None]
            moved = row[order][:, order].clone()
            moved[:n] = False
            is_this_mask("recon", torch.where(i < n, 0, n), torch.where(i < n, 0, i + 1), moved)

    def test_harmon_loss_rows():
        cases, _ = golden("harmon")
        names = ("in.target", "in.noise", "in.t", "out.net", "out.x_t", "out.mse_rows", "out.vb_rows")
        x0, noise, t, out, x_t, mse, vb = take(cases, *("diffloss." + n for n in names))
        betas, log_variance = take(cases, "tables.train.betas", "tables.train.posterior_log_variance_clipped")
        tables = ck.diffusion_tables(betas)
        same("log variance", tables[:, 4], log_variance.float(), 1e-7)
        same("x_t", ck.add_noise(x0, noise, t, tables), x_t, 1e-6)
        got, got_vb = ck.diffusion_loss_rows(out, x0, noise, t, tables)
        same("mse rows", got, mse, 3e-6)
        assert ((got_vb - vb).abs() <= 1e-3 + 1e-4 * vb.abs()).all(), (got_vb - vb).abs().max()

    def test_compiled_graph_is_whole():
        g = torch.Generator().manual_seed(0)
        q, k, v = qkv(1, 2, 1, 9, 9, 8, g)
        plan = ck.attention_plan(*intervals("random", 1, 9, 9, g), 9)
        w, labels = torch.randn(5, 16, generator=g).requires_grad_(), torch.tensor([0, -100, 4] * 3)

        def model(q, k, v, w):
            h = ck.attention(q, k, v, None, None, plan=plan).transpose(1, 2).flatten(2)[0]
            return ck.linear_cross_entropy(h, w, labels) + lce.linear_cross_entropy_fused(h, w, labels, kernels=False)

        compare("compiled", torch.compile(model, backend="aot_eager", fullgraph=True), model, (q, k, v, w), 1e-6)

    def test_cpu_takes_the_reference_at_once(monkeypatch):
        for name in ("attention", "linear_cross_entropy", "diffusion_loss_rows", "flow_loss_rows"):
            assert pick.choose(name, 64, torch.device("cpu")) == "reference"
        done = alone("-c", "import sys, custom_kernels; print('triton' in sys.modules)",  # its import takes time
                     NANORECA_KERNELS="", TRITON_INTERPRET="", CUDA_VISIBLE_DEVICES="")
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
        monkeypatch.setenv("NANORECA_KERNELS", "fast")
        with pytest.raises(ValueError, match="NANORECA_KERNELS='fast' is not known"):
            runpy.run_path(pick.__file__)
        monkeypatch.setattr(pick, "FORCED", "triton")
        with pytest.raises(ValueError, match="given CPU tensors"):
            pick.choose("attention", 64, torch.device("cpu"))

    def test_pick_table(monkeypatch):
        """On a GPU a kernel runs only where the table says so, and it says so only where it holds a measurement."""
        monkeypatch.setattr(pick, "triton", pick)
        cuda = torch.device("cuda")
        for (name, size), (choice, measurement) in pick.PICK.items():
            assert choice in ("reference", "triton", "flex", "chunked")
            assert choice != "triton" or measurement != pick.NOT_MEASURED
            assert pick.choose(name, size, cuda) == choice and (name, None) in pick.PICK
        assert pick.choose("attention", 96, cuda) == pick.PICK["attention", None][0]
        monkeypatch.setattr(pick, "FORCED", "triton")
        assert pick.choose("flow_loss_rows", 5, cuda) == "triton"
        monkeypatch.setattr(pick, "FORCED", "reference")
        assert pick.choose("attention", 64, cuda) == "reference"

    @pytest.mark.filterwarnings("ignore:'custom_kernels.bench' found in sys.modules")  # where another test was there
    def test_bench_without_a_gpu(monkeypatch, capfd):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["bench.py"])
        with pytest.raises(SystemExit) as e:
            runpy.run_module("custom_kernels.bench", run_name="__main__")
        said = capfd.readouterr().err
        assert e.value.code == 2 and "needs a CUDA GPU" in said and len(said.strip().splitlines()) == 1, said

    def test_bench_measures_complete_steps(capsys):
        from custom_kernels import bench
        found = bench.measure_step("ar", "tiny", 2, "cpu", turns=1)
        assert [*found] == ["ours", "released order"] and all(way["images_per_s"] > 0 for way in found.values()), found
        assert pick.FORCED == ""  # the released order's dense masks are its own
        assert "RuntimeError" not in capsys.readouterr().out

    def test_bench_draws_with_and_without_a_graph():
        from custom_kernels import bench
        found = bench.measure_drawing("mar", "tiny", 1, "cpu")
        assert [*found] == ["CUDA graph", "no graph"] and all(seconds > 0 for seconds in found.values()), found

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 is tested on a GPU")
    def test_bfloat16_on_a_gpu():
        from custom_kernels import bench
        failed = [line for line, ok in bench.check() if not ok]
        assert not failed, "\n".join(failed)

def test_rms_norm_on_cpu_is_the_textbook_one():
    g = torch.Generator().manual_seed(0)
    x, w, up = (torch.randn(s, generator=g) for s in ((3, 5, 32), (32,), (3, 5, 32)))

    def plain(x, w, eps):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w

    for f, grads in ((ck.rms_norm, []), (plain, [])):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = f(a, b, 1e-6)
        grads += [y.detach(), *torch.autograd.grad((y * up).sum(), (a, b))]
        if f is ck.rms_norm:
            got = grads
    for name, one, two in zip(("y", "dx", "dw"), got, grads):
        same(f"rms_norm {name}", one, two, 1e-5)
    frozen = ck.rms_norm(x.requires_grad_(), w, 1e-6)  # a weight that does not train gets no gradient
    assert torch.autograd.grad((frozen * up).sum(), x)[0].isfinite().all()

def test_muon_is_torchs_muon_in_full_precision():
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 40), (24, 16), (16, 16)]  # tall, wide, two of one shape, square
    ours = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = ck.Muon(ours, lr=0.1, weight_decay=0.3), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.01 * q.norm()  # bf16 keeps three digits
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 16, generator=g)))
    assert values.min() > 0.3 and values.max() < 1.3
    a.load_state_dict(a.state_dict())  # momentum goes into checkpoints
    assert all("momentum_buffer" in a.state[p] for p in ours)
