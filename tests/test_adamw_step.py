"""kernels/adamw_step.py: how often it is launched and compiled, and what it leaves alone."""

import pytest
import torch
from accuracy import DEVICE
from kit import guarded
from launches import compilations, launches_are_declared, recorded
from triton.runtime.interpreter import TensorHandle

from minift.kernels import adamw_step as module
from minift.kernels.adamw import AdamW, grad_norm
from minift.kernels.adamw_step import SCALARS, launch_step
from minift.kernels.param_table import BLOCK, KINDS, SPAN, ParamTable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stepped(sizes, dtypes, steps=1, **options):
    """The launches of some steps of parameters of these sizes."""
    torch.manual_seed(0)
    parameters = [
        torch.randn(n, device=DEVICE).to(dtype).requires_grad_()
        for n, dtype in zip(sizes, dtypes, strict=True)
    ]
    optimizer = AdamW(parameters, **options)
    with recorded(run=False) as seen:
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
    return seen


def names(launches):
    return [launch.kernel for launch in launches]


def test_two_launches_a_step_and_three_to_clip():
    """Whatever the number of parameters, groups and dtypes."""
    assert names(stepped([5, 3000, 7], DTYPES)) == ["scalars_kernel", "update_kernel"]
    clipped = stepped([5, 3000, 7], DTYPES, max_grad_norm=1.0)
    assert names(clipped) == ["sum_kernel", "scalars_kernel", "update_kernel"]
    assert [launch.grid for launch in clipped] == [(1,), (1,), (4,)]
    many = stepped([SPAN * BLOCK, 1], DTYPES[:2], max_grad_norm=1.0)
    assert [launch.grid for launch in many] == [(2,), (1,), (SPAN + 1,)]


def test_the_norm_is_two_launches():
    p = torch.zeros(3000, device=DEVICE, requires_grad=True)
    p.grad = torch.ones_like(p)
    with recorded(run=False) as seen:
        grad_norm([p])
    assert names(seen) == ["sum_kernel", "scalars_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_norm_of_long_runs_and_of_short_ones(dtype, offset):
    """SPAN chunks of one parameter are added at once, those of several in turn; a run may begin
    and end within a parameter. Addresses are multiples of 16, or not."""
    torch.manual_seed(0)
    sizes = [5, 2 * SPAN * BLOCK + 3, 7, SPAN * BLOCK, BLOCK, SPAN * BLOCK - 1, 1]
    parameters = [torch.zeros(n, dtype=dtype, device=DEVICE, requires_grad=True) for n in sizes]
    for p in parameters:
        p.grad = torch.randn(offset + p.numel(), device=DEVICE).to(dtype)[offset:]
    parameters.insert(2, torch.zeros(SPAN * BLOCK, dtype=dtype, device=DEVICE, requires_grad=True))
    exact = torch.cat([p.grad.double() for p in parameters if p.grad is not None]).norm()
    assert grad_norm(parameters).item() == pytest.approx(exact.item(), rel=1e-6)


def test_nothing_is_compiled_for_a_size_a_rate_or_a_number_of_parameters():
    """Nor for a dtype: one binary of each kernel."""
    seen = [
        launch
        for sizes in ([1], [16], [5, 3000], [2048] * 3, [7] * 17)
        for dtype in DTYPES
        for launch in stepped(sizes, [dtype] * len(sizes), steps=2, max_grad_norm=0.5)
    ]
    assert compilations(seen) == 3


def test_launches_are_those_that_are_declared():
    """Specialised as the compiler will see them."""
    p = torch.zeros(3000, device=DEVICE, requires_grad=True)
    p.grad = torch.ones_like(p)
    seen = stepped([3000], [torch.float32]) + stepped([3000], [torch.bfloat16], max_grad_norm=1.0)
    with recorded(run=False) as norm:
        grad_norm([p])
    assert launches_are_declared(seen + norm, module) == {launch.name for launch in module.LAUNCHES}


@pytest.fixture
def promises(monkeypatch):
    """What tl.multiple_of promises to the compiler, held to it, as a GPU would: the pointers.

    Only the interpreter can tell; on a GPU there are none.
    """
    seen = []

    def set_attr(handle, name, values):
        assert name == "tt.divisibility"
        seen.append(int(handle.data.item()))
        assert seen[-1] % values[0] == 0, f"promised a multiple of {values[0]}, got {seen[-1]}"

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
    return seen


@pytest.mark.parametrize("odd", range(6))
def test_only_full_chunks_between_boundaries_are_promised_to_be_so(promises, odd):
    """One of gradient, weight, moments and master at an odd address, or none."""
    p, g, m, v, master = (
        guarded(torch.ones(BLOCK, device=DEVICE).to(dtype), int(i == odd)).tensor
        for i, dtype in enumerate([torch.bfloat16, torch.bfloat16, *[torch.float32] * 3])
    )
    p.requires_grad_().grad = g
    optimizer = AdamW([p], lr=0.5, max_grad_norm=1.0)
    optimizer.state[p] = {"exp_avg": m, "exp_avg_sq": v, "master": master}
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(BLOCK**0.5)
    if DEVICE == "cpu":
        written = {x.data_ptr() for x in (p, m, v, master)}
        assert written & set(promises) == (written if odd == 5 else set())


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.bfloat16, 1), (torch.float32, 1), *((x, 0) for x in DTYPES)]
)
def test_every_size_and_address_and_nothing_beside_it(promises, dtype, offset):
    """Sizes about a chunk and about its parts, at multiples of 16 bytes and between them: weight,
    moments and master are written, each to its last element, and nothing is beside them.

    A gradient of 1 makes every step one of lr; other elements' gradients have a mark.
    """
    part = BLOCK // 8
    sizes = [0, 1, part, BLOCK - 1, BLOCK, BLOCK + part + 1]
    weights, grads = ([guarded(torch.full((n,), x, dtype=dtype, device=DEVICE), offset)
                       for n in sizes] for x in (1.0, 2.0))  # fmt: skip
    parameters = [guard.tensor.requires_grad_() for guard in weights]
    optimizer = AdamW(parameters, lr=0.5, weight_decay=0.0, max_grad_norm=float("inf"))
    kept = []
    for p, g in zip(parameters, grads, strict=True):
        g.tensor[-1:] *= 4  # the last one counts in the norm, and moves by lr as the others do
        p.grad = g.tensor
        names = ["exp_avg", "exp_avg_sq"] + ["master"] * (dtype != torch.float32)
        state = {name: guarded(torch.zeros(len(p), device=DEVICE), offset) for name in names}
        if "master" in state:
            state["master"].tensor.fill_(1.0)
        kept += state.values()
        optimizer.state[p] = {name: guard.tensor for name, guard in state.items()}
    optimizer.step()
    for guard in (*weights, *grads, *kept):
        guard.assert_untouched()
    for p, g in zip(parameters, grads, strict=True):
        wide, state = g.tensor.float(), optimizer.state[p]
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.5))
        torch.testing.assert_close(state["exp_avg"], 0.1 * wide)
        torch.testing.assert_close(state["exp_avg_sq"], 0.001 * wide * wide)
        assert state["step"].item() == 1
        assert set(wide[:-1].tolist()) <= {2.0}
    squares = sum(4 * (n - 1) + 64 for n in sizes if n)
    assert optimizer.grad_norm.item() == pytest.approx(squares**0.5)


def test_more_parameters_than_one_block_of_them():
    """The one program goes over them in blocks: all step, those without a gradient do not."""
    parameters = [torch.ones(1, device=DEVICE) for _ in range(1030)]
    table = ParamTable(parameters, [0] * len(parameters), torch.device(DEVICE))
    steps = torch.zeros(len(parameters), device=DEVICE)
    table.write([
        (0, i % 2, 0, 0, 0, steps.data_ptr() + 4 * i, KINDS[torch.float32])
        for i in range(len(parameters))
    ])  # fmt: skip
    table.chunks = 0  # the update has nothing to do
    groups = torch.tensor([[0.5, 0.9, 0.99, 1e-8, 0.1, -1.0]], dtype=torch.float64, device=DEVICE)
    scalars = torch.full((len(parameters), SCALARS.value), torch.nan, device=DEVICE)
    launch_step(table, table.rows, groups, scalars, None, None, None)
    odd = torch.arange(len(parameters), device=DEVICE) % 2 == 1
    assert torch.equal(steps, odd.float())
    expected = torch.tensor([-1.0, 0.1, 0.01, 0.5 / 0.1, 1 / 0.01**0.5, 1e-8, 0.05, 0.0])
    torch.testing.assert_close(scalars[odd], expected.to(DEVICE).expand(515, -1))
    assert (scalars[~odd, -1] == 1).all()


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_bias_corrections_keep_every_digit(step):
    """1 - 0.999^k through fp32 would lose four digits at k = 1; a billionth stays a billionth."""
    p = torch.ones(1, device=DEVICE)
    steps = torch.tensor([float(step - 1)], device=DEVICE)
    table = ParamTable([p], [0], torch.device(DEVICE))
    table.write([(0, 16, 0, 0, 0, steps.data_ptr(), 0)])
    table.chunks = 0
    groups = torch.tensor([[1e-9, 0.9, 0.999, 0.0, 1e-2, 1.0]], dtype=torch.float64, device=DEVICE)
    scalars = torch.zeros(1, SCALARS.value, device=DEVICE)
    launch_step(table, table.rows, groups, scalars, None, None, None)
    _, _, _, rate, root, _, decay, _ = scalars[0].double().tolist()
    half_ulp = 2.0**-24
    assert rate == pytest.approx(1e-9 / (1 - 0.9**step), rel=half_ulp)
    assert root == pytest.approx((1 - 0.999**step) ** -0.5, rel=half_ulp)
    assert decay == pytest.approx(1e-11, rel=half_ulp)
