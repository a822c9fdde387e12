"""kernels/adamw.py: the definition against torch's optimizer, and both optimizers against it."""

import copy
import io
import math
import pickle

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.kernels.adamw import AdamW, adamw_ref, grad_norm
from minift.ops import TORCH, TRITON

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 10
OPTIONS = {
    "as BERT is tuned": {"lr": 1e-2, "weight_decay": 0.01},
    "no decay": {"lr": 1e-2, "weight_decay": 0.0},
    "strong decay": {"lr": 0.1, "weight_decay": 0.9},
    "other betas": {"lr": 1e-2, "betas": (0.5, 0.7), "weight_decay": 0.1},
    "eps as large as the gradient": {"lr": 1e-2, "eps": 0.5, "weight_decay": 0.0},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
tables = pytest.mark.parametrize("table", [TORCH, TRITON], ids=["torch", "triton"])


def make(dtype, shape=(7, 5)):
    """A parameter and its gradients: some are 0, some tiny, some large."""
    torch.manual_seed(0)
    w, *gradients = torch.randn(1 + STEPS, *shape, dtype=torch.float64, device=DEVICE)
    sizes = 10.0 ** torch.arange(-3, shape[0] - 3, dtype=torch.float64, device=DEVICE)
    gradients = [g * sizes[:, None] * (k % 5 != 3) for k, g in enumerate(gradients)]
    return w.to(dtype), [g.to(dtype) for g in gradients]


def by_definition(w, gradients, **options):
    """w after each step."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for k, g in enumerate(gradients, 1):
        w, m, v = adamw_ref(w, g, m, v, k, **options)
        yield w


def by_optimizer(make_optimizer, w, gradients):
    """w after each step."""
    parameter = w.clone().requires_grad_()
    optimizer = make_optimizer(parameter)
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
        yield parameter.detach().clone()


@options
def test_ref_is_torchs_adamw(options):
    """Ten steps in fp64, equal after each."""
    w, gradients = make(torch.float64)
    by_torch = by_optimizer(lambda p: torch.optim.AdamW([p], **options), w, gradients)
    for a, e in zip(by_definition(w, gradients, **options), by_torch, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


@tables
@options
def test_table_is_as_accurate_as_the_definition(options, table):
    """Ten steps in fp32, as parameters are held."""
    w, gradients = make(torch.float32)
    betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    group = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
    actual = by_optimizer(
        lambda p: table.adamw([{"params": [p], **group}], betas, eps, math.inf), w, gradients
    )
    same_dtype = by_definition(w, gradients, **options)
    wide = w.double(), [g.double() for g in gradients]
    exact = by_definition(*wide, **options)
    scale = w.abs().max().item() + STEPS * options["lr"]
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a, s, e, scale)


def test_first_step_moves_by_the_learning_rate():
    """m and v are corrected for their start at 0: |step| = lr whatever the gradient's size."""
    w, gradients = make(torch.float64)
    moved, _, _ = adamw_ref(w, gradients[0], w * 0, w * 0, 1, lr=0.01, eps=0.0)
    torch.testing.assert_close(moved, w - 0.01 * gradients[0].sign())


@tables
def test_each_group_has_its_own_rate_and_decay(table):
    """And an entry that is not the optimizer's, such as `peak_lr`, stays in the group."""
    torch.manual_seed(0)
    start, grad = torch.randn(2, 3, 4, device=DEVICE)
    rows = [(1e-2, 0.0), (1e-3, 0.5)]
    parameters = [start.clone().requires_grad_() for _ in rows]
    groups = [
        {"params": [p], "lr": lr, "weight_decay": decay, "peak_lr": lr}
        for p, (lr, decay) in zip(parameters, rows, strict=True)
    ]
    optimizer = table.adamw(groups, (0.9, 0.999), 1e-8, math.inf)
    for p in parameters:
        p.grad = grad.clone()
    optimizer.step()
    for p, group, (lr, decay) in zip(parameters, optimizer.param_groups, rows, strict=True):
        expected, _, _ = adamw_ref(start, grad, start * 0, start * 0, 1, lr=lr, weight_decay=decay)
        torch.testing.assert_close(p.detach(), expected)
        assert group["peak_lr"] == lr


@tables
def test_definition_changes_nothing_in_place(table):
    """Nor does the table write to a gradient."""
    w, gradients = make(torch.float32)
    inputs = [w, gradients[0], gradients[1], gradients[2].abs()]
    before = [x.clone() for x in inputs]
    adamw_ref(*inputs, 3, lr=0.1, weight_decay=0.1)
    assert all(map(torch.equal, inputs, before))
    p = w.clone().requires_grad_()
    p.grad = gradients[0].clone()
    table.adamw([{"params": [p], "lr": 0.1}], (0.9, 0.999), 1e-8, math.inf).step()
    assert torch.equal(p.grad, gradients[0])
    assert not torch.equal(p, w)


@tables
@pytest.mark.parametrize("max_norm", [1.0, 1e9, math.inf])
def test_a_step_clips_and_says_the_norm(table, max_norm):
    """As torch.nn.utils.clip_grad_norm_ over all groups before it, moment by moment."""
    torch.manual_seed(0)
    starts = [torch.randn(3, 4), torch.randn(5)]
    results = []
    for clips in (False, True):
        parameters = [x.to(DEVICE).requires_grad_() for x in (s.clone() for s in starts)]
        groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.1} for p in parameters]
        for p in parameters:
            p.grad = torch.linspace(-3, 4, p.numel(), device=DEVICE).view_as(p)
        if clips:
            optimizer = table.adamw(groups, (0.9, 0.999), 1e-8, max_norm)
            optimizer.step()
            norms = [optimizer.grad_norm]
            assert optimizer.skipped == 0
        else:
            norms = [torch.nn.utils.clip_grad_norm_(parameters, max_norm)]
            optimizer = torch.optim.AdamW(groups)
            optimizer.step()
        state = [optimizer.state[p]["exp_avg"] for p in parameters]
        results.append([*norms, *(p.detach() for p in parameters), *state])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@tables
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_norm_is_not_taken(table, bad):
    """Neither weights nor moments nor step counts move, and it is counted."""
    if DEVICE == "cuda" and table is TORCH:
        pytest.skip("torch's optimizer would have to wait for the device")
    w, gradients = make(torch.float32)
    p = w.clone().requires_grad_()
    optimizer = table.adamw([{"params": [p], "lr": 0.1}], (0.9, 0.999), 1e-8, 1.0)
    p.grad = gradients[0].clone()
    optimizer.step()
    before = [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]
    p.grad = gradients[1].clone()
    p.grad[2, 3] = bad
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    assert optimizer.skipped == 1
    for a, e in zip([p.detach(), *optimizer.state[p].values()], before, strict=True):
        assert torch.equal(a, e)


# ------------------------------------------------------------ the optimizer of the kernels


def parameters_of(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
        for shape in shapes
    ]


def give_gradients(parameters, k, missing=()):
    """Those of step k; the same whoever asks."""
    generator = torch.Generator().manual_seed(1000 + k)
    for i, p in enumerate(parameters):
        g = torch.randn(p.shape, generator=generator).to(p)
        p.grad = None if i in missing else torch.empty_like(p).copy_(g)


def run(optimizer, parameters, steps, missing=lambda k: ()):
    for k in steps:
        give_gradients(parameters, k, missing(k))
        optimizer.step()


def flat_state(optimizer):
    """Everything it keeps, in order."""
    state = optimizer.state_dict()["state"]
    return {(i, name): t for i, kept in sorted(state.items()) for name, t in kept.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def supported():
    """torch's own inputs for AdamW, all but amsgrad."""
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ModuleNotFoundError:  # it imports expecttest; then the test is skipped
        return
    info = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
    for given_input in info.optim_inputs_func(device=DEVICE):
        options = {k: v for k, v in given_input.kwargs.items() if k != "capturable"}
        if not options.get("amsgrad"):
            yield pytest.param(options, id=given_input.desc)


@pytest.mark.parametrize("options", list(supported()))
def test_options_of_torchs_database(options):
    """As close to fp64 as torch.optim.AdamW in fp32."""
    shapes = [(3, 5), (70,)]
    on = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    sets = [parameters_of(shapes), parameters_of(shapes), parameters_of(shapes)]
    sets[2] = [p.detach().double().requires_grad_() for p in sets[2]]
    plain = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "betas" in plain:
        on = on | {"betas": tuple(b.to(DEVICE) for b in options["betas"])}
        plain["betas"] = tuple(float(b) for b in options["betas"])
    run(AdamW(sets[0], **on), sets[0], range(4))
    run(torch.optim.AdamW(sets[1], **plain), sets[1], range(4))
    run(torch.optim.AdamW(sets[2], **plain), sets[2], range(4))
    for ours, torchs, exact in zip(*sets, strict=True):
        assert_as_accurate(ours.detach(), torchs.detach(), exact.detach(), exact.abs().max().item())


def long_run(steps, first):
    """Errors of torch's fp32 and of ours against fp64, from step `first` on."""
    torch.manual_seed(0)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    start = torch.randn(400, device=DEVICE)
    ours, torchs = start.clone().requires_grad_(), start.clone().requires_grad_()
    wide = start.double().requires_grad_()
    optimizers = [AdamW([ours], **options)]
    optimizers += [torch.optim.AdamW([p], **options) for p in (torchs, wide)]
    if first:
        m, v = 0.1 * torch.randn(400), 0.1 * torch.rand(400)
        kept = {"step": torch.tensor(float(first)), "exp_avg": m, "exp_avg_sq": v}
        for optimizer in optimizers:
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved | {"state": {0: copy.deepcopy(kept)}})
    for _ in range(steps):
        g = torch.randn(400, device=DEVICE) + 0.1
        for p, optimizer in zip((ours, torchs, wide), optimizers, strict=True):
            p.grad = g.to(p.dtype)
            optimizer.step()
    return [(p.double() - wide).norm().item() for p in (torchs, ours)]


def test_steps_are_no_further_from_the_truth_than_torchs():
    """Twenty steps, early and late in a run."""
    for first in (0, 900):
        torchs, ours = long_run(20, first)
        assert ours <= torchs * 1.05


@pytest.mark.slow
def test_a_thousand_steps_are_no_further_from_the_truth_than_torchs():
    torchs, ours = long_run(1000, 0)
    assert ours <= torchs


def test_small_steps_on_bf16_are_not_lost():
    """At lr 1e-6, torch's bf16 weights of size 1 never move; the master does, at fp32's pace."""
    p = torch.ones(64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    optimizer = AdamW([p], lr=1e-6, weight_decay=0.0)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"]
    expected = torch.full_like(master, 1 - 1e-5)
    torch.testing.assert_close(master, expected, rtol=0, atol=10 * 2**-24)
    assert torch.equal(p.detach(), master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_adopted(dtype):
    """The file's own precision stays: the update is computed on it, and rounded in one launch."""
    torch.manual_seed(0)
    master = torch.randn(300, device=DEVICE)
    wide, p = master.clone().requires_grad_(), master.to(dtype).requires_grad_()
    optimizer, reference = AdamW([p], masters={p: master}), AdamW([wide])
    for _ in range(3):
        p.grad = torch.randn_like(p)
        wide.grad = p.grad.float()
        optimizer.step()
        reference.step()
    assert optimizer.state[p]["master"] is master
    assert torch.equal(master, wide.detach())
    assert torch.equal(p.detach(), master.to(dtype))
    with pytest.raises(ValueError, match="expected fp32 masters"):
        AdamW([p], masters={p: master.double()})
    with pytest.raises(ValueError, match="expected fp32 masters"):
        AdamW([wide], masters={wide: master})
    with pytest.raises(ValueError, match="the parameter's shape"):
        AdamW([p], masters={p: master[:3]})


def grouped(parameters):
    return [
        {"params": parameters[:1], "lr": 1e-2},
        {"params": parameters[1:], "betas": (0.8, 0.9), "weight_decay": 0.3},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact_to_the_bit(dtype):
    """Three steps, a file, two more: with groups, clipping and gradients that are missing."""
    shapes, options = [(5, 7), (40,), (3,)], {"max_grad_norm": 1.0}

    def missing(k):
        return {2} if k < 2 else {k % 3}

    whole = parameters_of(shapes, dtype)
    straight = AdamW(grouped(whole), **options)
    run(straight, whole, range(3), missing)
    file = io.BytesIO()
    torch.save({"optimizer": straight.state_dict(), "weights": whole}, file)
    run(straight, whole, range(3, 5), missing)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    parts = parameters_of(shapes, dtype, seed=9)
    with torch.no_grad():
        for p, weight in zip(parts, saved["weights"], strict=True):
            p.copy_(weight)
    resumed = AdamW(grouped(parts), **options)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, parts, range(3, 5), missing)
    assert all(map(torch.equal, whole, parts))
    assert_same_bits(flat_state(straight), flat_state(resumed))
    names = {name for _, name in flat_state(resumed)}
    assert names == {"step", "exp_avg", "exp_avg_sq"} | (
        {"master"} if dtype != torch.float32 else set()
    )


def test_a_loaded_state_is_written_into_the_masters_that_were_given():
    """Else the model's own weights, which they are, would stand still from then on."""
    master = torch.linspace(-1, 1, 6, device=DEVICE)
    saved = AdamW([p := master.bfloat16().requires_grad_()], masters={p: master.clone()})
    run(saved, [p], range(2))
    q = master.bfloat16().requires_grad_()
    resumed = AdamW([q], masters={q: master})
    resumed.load_state_dict(saved.state_dict())
    assert resumed.state[q]["master"] is master
    assert torch.equal(master, saved.state[p]["master"])


def test_state_survives_copy_and_pickle():
    """Of the state_dict, and of the whole optimizer."""
    parameters = parameters_of([(6,)])
    optimizer = AdamW(parameters, max_grad_norm=1.0)
    run(optimizer, parameters, range(2))
    state = optimizer.state_dict()
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        other = parameters_of([(6,)])
        loaded = AdamW(other, max_grad_norm=1.0)
        loaded.load_state_dict(twin)
        assert_same_bits(flat_state(optimizer), flat_state(loaded))
    optimizer_too, twins = copy.deepcopy((optimizer, parameters))
    run(optimizer, parameters, range(2, 3))
    run(optimizer_too, twins, range(2, 3))
    assert torch.equal(parameters[0], twins[0])
    assert torch.equal(optimizer.grad_norm, optimizer_too.grad_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_adamw_takes_our_state_and_we_take_torchs(dtype):
    """Each goes on from the other's state; torch's bf16 moments become fp32, its step moves."""
    shapes = [(4, 3), (9,)]
    ours, torchs = parameters_of(shapes, dtype), parameters_of(shapes, dtype)
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(torchs, lr=1e-2)
    run(a, ours, range(2))
    run(b, torchs, range(2))
    from_torch, to_torch = copy.deepcopy(b.state_dict()), copy.deepcopy(a.state_dict())
    a.load_state_dict(from_torch)
    b.load_state_dict(to_torch)
    for p, q in zip(ours, torchs, strict=True):
        assert a.state[p]["exp_avg"].dtype == torch.float32
        assert a.state[p]["step"].device == p.device
        assert a.state[p]["step"].item() == b.state[q]["step"].item() == 2
    run(a, ours, range(2, 4))
    run(b, torchs, range(2, 4))
    eps = torch.finfo(dtype).eps
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=8 * eps, atol=8 * eps)


def test_loading_keeps_the_tensors_that_a_graph_may_read():
    parameters = parameters_of([(5,)])
    optimizer = AdamW(parameters)
    run(optimizer, parameters, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = dict(optimizer.state[parameters[0]])
    run(optimizer, parameters, range(1, 2))
    optimizer.load_state_dict(saved)
    now = optimizer.state[parameters[0]]
    assert all(now[name] is kept[name] for name in kept)
    assert now["step"].item() == 1
    assert_same_bits(flat_state(optimizer), {(0, n): t for n, t in saved["state"][0].items()})


def test_state_put_in_by_hand_is_used():
    """As a checkpoint does it: tensors assigned to `state`, whatever their dtype."""
    parameters, twins = parameters_of([(5,)]), parameters_of([(5,)])
    optimizer, twin = AdamW(parameters), AdamW(twins)
    run(optimizer, parameters, range(2))
    run(twin, twins, range(1))
    with torch.no_grad():
        twins[0].copy_(parameters[0])
    twin.state.clear()
    twin.state[twins[0]] = {n: t.double() for n, t in optimizer.state[parameters[0]].items()}
    run(optimizer, parameters, range(2, 3))
    run(twin, twins, range(2, 3))
    assert torch.equal(parameters[0], twins[0])
    assert_same_bits(flat_state(optimizer), flat_state(twin))
    twin.state[twins[0]]["exp_avg"] = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="the parameter's shape"):
        run(twin, twins, range(3, 4))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="the parameter's shape"):
        optimizer.load_state_dict(saved)


def test_without_a_gradient_nothing_moves():
    """No state is made; the step count, the moments and the weight stay; as torch has it."""
    ours, torchs = parameters_of([(4,), (3,)]), parameters_of([(4,), (3,)])
    a, b = AdamW(ours), torch.optim.AdamW(torchs)
    for optimizer, parameters in ((a, ours), (b, torchs)):
        run(optimizer, parameters, range(2), lambda k: {1})
    assert set(a.state) == {ours[0]}
    before = ours[0].detach().clone(), ours[1].detach().clone(), copy.deepcopy(flat_state(a))
    run(a, ours, range(2, 3), lambda k: {0, 1})
    assert torch.equal(ours[0], before[0])
    assert torch.equal(ours[1], before[1])
    assert_same_bits(flat_state(a), before[2])
    for optimizer, parameters in ((a, ours), (b, torchs)):
        run(optimizer, parameters, range(3, 4), lambda k: {0})
    steps = [[optimizer.state[p]["step"].item() for p in parameters]
             for optimizer, parameters in ((a, ours), (b, torchs))]  # fmt: skip
    assert steps[0] == steps[1] == [2, 1]
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q)


def test_sets_of_parameters_change():
    """Groups that grow, shrink and come; each parameter steps as if it were alone."""
    parameters, alone = parameters_of([(4,), (5,), (6,)]), parameters_of([(4,), (5,), (6,)])
    optimizer = AdamW(parameters[:1])
    optimizers = [AdamW([p]) for p in alone]
    run(optimizer, parameters, range(1))
    optimizer.add_param_group({"params": parameters[1:2], "lr": 1e-3})
    run(optimizer, parameters, range(1, 2))
    optimizer.param_groups[1]["params"].append(parameters[2])
    run(optimizer, parameters, range(2, 3))
    del optimizer.param_groups[0]["params"][0]
    run(optimizer, parameters, range(3, 4))
    for i, steps in enumerate((range(3), range(1, 4), range(2, 4))):
        for k in steps:
            give_gradients(alone, k)
            optimizers[i].step()
    assert all(map(torch.equal, parameters, alone))


def layouts():
    base = torch.arange(24.0, device=DEVICE)
    yield pytest.param(lambda: base.clone().view(4, 6).t(), id="transposed")
    yield pytest.param(
        lambda: base.clone().view(1, 2, 4, 3).to(memory_format=torch.channels_last),
        id="channels last",
    )
    yield pytest.param(lambda: torch.arange(25.0, device=DEVICE)[1:], id="odd address")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_parameter", list(layouts()))
def test_any_dense_layout(make_parameter, dtype):
    """The state has the parameter's strides; a gradient with others is brought to them."""
    p = make_parameter().to(dtype) if dtype != torch.float32 else make_parameter()
    p = p.detach().requires_grad_()
    plain = p.detach().contiguous().clone().requires_grad_()
    a, b = AdamW([p]), AdamW([plain])
    for k in range(2):
        give_gradients([plain], k)
        p.grad = plain.grad.clone()  # contiguous, whatever p is
        a.step()
        b.step()
    give_gradients([plain], 2)
    p.grad = torch.empty_like(p).copy_(plain.grad)
    a.step()
    b.step()
    assert a.state[p]["exp_avg"].stride() == p.stride()
    assert torch.equal(p.detach(), plain.detach())


def test_gradients_are_read_only():
    """They keep their bits and versions; parameters' versions move, as autograd must see it."""
    parameters = parameters_of([(30,), (4, 4)])
    optimizer = AdamW(parameters, max_grad_norm=0.1, maximize=True)
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters]
    versions = [p._version for p in parameters]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    assert all(p._version > v for p, v in zip(parameters, versions, strict=True))


def test_clipping_is_torchs():
    """Above the threshold and below it; the norm is that before clipping."""
    shapes = [(50,), (7, 3)]
    sets = [parameters_of(shapes) for _ in range(3)]
    sets[2] = [p.detach().double().requires_grad_() for p in sets[2]]
    ours = AdamW(sets[0], max_grad_norm=8.0, lr=0.5, eps=1.0)
    others = [torch.optim.AdamW(parameters, lr=0.5, eps=1.0) for parameters in sets[1:]]
    norms = []
    for k in range(4):
        for parameters in sets:
            give_gradients(parameters, k)
            for p in parameters:
                p.grad *= 0.5 + k % 2
        measured = grad_norm(sets[0])
        ours.step()
        for optimizer, parameters in zip(others, sets[1:], strict=True):
            norm = torch.nn.utils.clip_grad_norm_(parameters, 8.0)
            optimizer.step()
        norms.append(norm.item())
        torch.testing.assert_close(ours.grad_norm, norm.float())
        assert torch.equal(measured, ours.grad_norm)
    assert min(norms) < 8 < max(norms)
    for p, torchs, exact in zip(*sets, strict=True):
        assert_as_accurate(p.detach(), torchs.detach(), exact.detach(), exact.abs().max().item())


def test_tiny_norms_are_clipped_as_torch_clips_them():
    """The 1e-6 beside the norm: a fourth where the norm is 3e-6; 0 and no NaN where it is 0."""
    for size, bound, factor in ((3e-6, 1e-6, 0.25), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)):
        p = torch.ones(1, device=DEVICE, requires_grad=True)
        p.grad = torch.full_like(p, size)
        optimizer = AdamW([p], max_grad_norm=bound)
        optimizer.step()
        expected = torch.full_like(p, 0.1 * size * factor)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=1e-6, atol=0)
        assert not p.isnan()


def test_inf_measures_and_does_not_clip():
    parameters, plain = parameters_of([(50,)]), parameters_of([(50,)])
    a, b = AdamW(parameters, max_grad_norm=float("inf")), AdamW(plain)
    run(a, parameters, range(2))
    run(b, plain, range(2))
    assert torch.equal(parameters[0], plain[0])
    torch.testing.assert_close(a.grad_norm, parameters[0].grad.norm())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_the_whole_step(bad):
    """Nothing changes, not even a step count; the next good step is the third."""
    parameters = parameters_of([(9,), (4,)]) + parameters_of([(5,)], torch.bfloat16)
    optimizer = AdamW(parameters, max_grad_norm=1.0)
    run(optimizer, parameters, range(2))
    before = copy.deepcopy((parameters, flat_state(optimizer)))
    give_gradients(parameters, 2)
    with torch.no_grad():
        parameters[1].grad[2] = bad
    optimizer.step()
    assert all(map(torch.equal, parameters, before[0]))
    assert_same_bits(flat_state(optimizer), before[1])
    assert optimizer.skipped.item() == 1
    assert not torch.isfinite(optimizer.grad_norm)
    run(optimizer, parameters, range(3, 4))
    assert optimizer.skipped.item() == 1
    assert optimizer.state[parameters[0]]["step"].item() == 3
    assert torch.isfinite(optimizer.grad_norm)
    assert all(torch.isfinite(p).all() for p in parameters)


def test_norm_of_all_gradients():
    """As torch's total norm, over dtypes, layouts and gradients that are missing."""
    parameters = parameters_of([(3000,), (7, 5), (0,), (4,)])
    parameters += parameters_of([(33,)], torch.bfloat16) + parameters_of([(9,)], torch.float16)
    give_gradients(parameters, 0, missing={3})
    parameters[1].grad = parameters[1].grad.t().contiguous().t()
    wide = [p.grad.double() for p in parameters if p.grad is not None]
    norm = grad_norm(parameters)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    exact = torch.nn.utils.get_total_norm(wide)
    torchs = torch.nn.utils.get_total_norm([g.float() for g in wide])
    assert_as_accurate(norm, torchs, exact, exact.item())
    parameters[0].grad[0] = float("inf")
    assert grad_norm(iter(parameters)).item() == float("inf")
    assert grad_norm(parameters[3]).item() == 0


@settings(max_examples=4)
@given(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.booleans())
def test_groups_do_not_matter(group_of, clip):
    """Any split into groups of equal options gives the bits of one group."""
    shapes, options = [(3,), (2100,), (4, 4), (1,), (7,)], {"max_grad_norm": 1.0 if clip else None}
    together, split = parameters_of(shapes), parameters_of(shapes)
    groups = [[p for p, g in zip(split, group_of, strict=True) if g == i] for i in range(3)]
    a = AdamW(together, **options)
    b = AdamW([{"params": group} for group in groups if group], **options)
    run(a, together, range(2))
    run(b, split, range(2))
    assert all(map(torch.equal, together, split))


def test_the_same_bits_every_time_and_after_a_new_table():
    """Gradients at other addresses, and an optimizer that has another parameter beside it."""
    first, again = parameters_of([(2100,), (5,)]), parameters_of([(2100,), (5,)])
    a, b = AdamW(first), AdamW(again)
    run(a, first, range(3))
    kept = []
    for k in range(3):
        give_gradients(again, k)
        kept += [p.grad for p in again]  # the next ones lie elsewhere
        b.step()
        if k == 1:
            b.add_param_group({"params": parameters_of([(3,)])})
    assert all(map(torch.equal, first, again))


def test_a_schedule_drives_it():
    """LambdaLR, with an lr that is a number and one that is a tensor: the definition's weights."""
    factors = [0.0, 0.5, 1.0, 0.25]
    start, gradients = make(torch.float32)
    plain, tensor = start.clone().requires_grad_(), start.clone().requires_grad_()
    runs = []
    for p, lr in ((plain, 0.1), (tensor, torch.tensor(0.1, device=DEVICE))):
        optimizer = AdamW([p], lr=lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: factors[min(k, 3)])
        runs.append((p, optimizer, scheduler))
    w, m, v = start, start * 0, start * 0
    for k, factor in enumerate(factors):
        rate = 0.1 * factor
        w, m, v = adamw_ref(w, gradients[k], m, v, k + 1, lr=rate, weight_decay=0.1)
        for p, optimizer, scheduler in runs:
            p.grad = gradients[k].clone()
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(plain.detach(), w)
    torch.testing.assert_close(tensor.detach(), w)


def test_closure_and_hooks():
    """The closure's loss is returned and its gradients are used; hooks run around the step."""
    (p,) = parameters_of([(3,)])
    optimizer, seen = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("closure")
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert seen == ["before", "closure", "after"]
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.zero_grad(set_to_none=False)
    loaded = []
    optimizer.register_load_state_dict_post_hook(lambda o: loaded.append(o.state[p]["step"].item()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded == [1]


def test_prepare_makes_state_and_moves_nothing():
    """After it the first step needs no more than a capture may do."""
    parameters, plain = parameters_of([(5,), (6,)]), parameters_of([(5,), (6,)])
    optimizer = AdamW(parameters, max_grad_norm=1.0)
    optimizer.prepare()
    assert all(map(torch.equal, parameters, plain))
    assert [optimizer.state[p]["step"].item() for p in parameters] == [0, 0]
    run(optimizer, parameters, range(2))
    run(AdamW(plain, max_grad_norm=1.0), plain, range(2))
    assert all(map(torch.equal, parameters, plain))


def bad_inputs():
    leaf = torch.zeros(4, 4, device=DEVICE)
    yield "lr >= 0", {"lr": -1.0}, leaf
    yield "one lr", {"lr": torch.zeros(2)}, leaf
    yield "betas in", {"betas": (0.9, 1.0)}, leaf
    yield "eps >= 0", {"eps": -1e-8}, leaf
    yield "weight_decay >= 0", {"weight_decay": -0.1}, leaf
    yield "max_grad_norm >= 0", {"max_grad_norm": float("nan")}, leaf
    yield "use torch.optim.AdamW", {}, leaf.double()
    yield "use torch.optim.AdamW", {}, torch.zeros(3, device="meta")
    yield "side by side", {}, leaf[:, :2]
    yield "side by side", {}, leaf[:1].expand(4, 4)


@pytest.mark.parametrize(("message", "options", "tensor"), list(bad_inputs()))
def test_bad_input_is_met(message, options, tensor):
    with pytest.raises(ValueError, match=message):
        AdamW([tensor.detach().requires_grad_()], **options)


def test_bad_groups_and_gradients_are_met(monkeypatch):
    """A refused group leaves the optimizer as it was."""
    p, q = parameters_of([(4,), (5,)])
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match="no amsgrad"):
        optimizer.add_param_group({"params": [q], "amsgrad": True})
    with (
        pytest.raises(ValueError, match="each parameter once"),
        pytest.warns(UserWarning, match="duplicate"),
    ):
        optimizer.add_param_group({"params": [q, q]})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0] = saved["param_groups"][0] | {"amsgrad": True}
    with pytest.raises(ValueError, match="without amsgrad"):
        optimizer.load_state_dict(saved)
    p.grad = torch.sparse_coo_tensor([[1]], [2.0], (4,), device=DEVICE, check_invariants=True)
    with pytest.raises(ValueError, match="expected a dense gradient"):
        optimizer.step()
    assert not optimizer.state
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match=r"got one on cpu: use torch\.optim\.AdamW"):
        AdamW([torch.zeros(3, requires_grad=True)])


def test_dtensors_are_updated_through_their_shards(tmp_path):
    """Parameters and gradients of torch.distributed.tensor, on one rank."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available() or DEVICE != "cpu":
        pytest.skip("needs gloo and a CPU")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (plain,) = parameters_of([(6, 5)])
        sharded = distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]).requires_grad_()
        a, b = AdamW([sharded], max_grad_norm=1.0), AdamW([plain], max_grad_norm=1.0)
        for k in range(2):
            give_gradients([plain], k)
            sharded.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
            assert torch.equal(grad_norm([sharded]), grad_norm([plain]))
            a.step()
            b.step()
        assert torch.equal(sharded.to_local(), plain.detach())
        assert torch.equal(a.state[sharded]["exp_avg"].to_local(), b.state[plain]["exp_avg"])
    finally:
        dist.destroy_process_group()


def test_alone_it_trains_a_model_as_torch_does():
    """An embedder's use: a tiny transformer of torch and no other part of minift."""
    nn, losses = torch.nn, []
    fp32, fp64, torchs = torch.float32, torch.float64, torch.optim.AdamW
    for make_optimizer, dtype in ((AdamW, fp32), (torchs, fp32), (torchs, fp64)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(30, 16), layer, nn.Flatten(), nn.Linear(8 * 16, 3))
        model = model.to(DEVICE, dtype).train()
        ids, labels = torch.randint(0, 30, (4, 8)).to(DEVICE), torch.tensor([0, 1, 2, 1]).to(DEVICE)
        optimizer = make_optimizer(model.parameters(), lr=1e-2, weight_decay=0.01)
        losses.append([])
        for _ in range(4):
            loss = nn.functional.cross_entropy(model(ids), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    ours, torchs, exact = (torch.tensor(row, dtype=torch.float64) for row in losses)
    assert_as_accurate(ours.float(), torchs.float(), exact, scale=100.0)


@settings(max_examples=4)
@given(st.integers(1, 2200), st.integers(0, 2200), st.booleans())
def test_a_tensor_in_two_parts_steps_as_a_whole(first, second, bf16):
    """To the bit, moments and masters too: an element's step depends on that element alone."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    whole = parameters_of([(first + second,)], dtype)
    parts = [x.clone().requires_grad_() for x in whole[0].detach().split([first, second])]
    a, b = AdamW(whole), AdamW(parts)
    for k in range(2):
        give_gradients(whole, k)
        for p, g in zip(parts, whole[0].grad.split([first, second]), strict=True):
            p.grad = g
        a.step()
        b.step()
    assert torch.equal(whole[0], torch.cat([p.detach() for p in parts]))
    for name in {"exp_avg", "exp_avg_sq", "master"} & set(a.state[whole[0]]):
        assert torch.equal(a.state[whole[0]][name], torch.cat([b.state[p][name] for p in parts]))


# ------------------------------------------------------------------------ CUDA graphs


def captured(optimizer, parameters):
    """A graph of one step on the gradients as they lie."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_eager_steps(kind, dtype):
    """Three replays of two graphs; rates move through sync_groups, or through a tensor."""
    shapes, rates = [(3000,), (7, 5), (1,)], [1e-2, 3e-3, 1e-3]
    eager, replayed = parameters_of(shapes, dtype), parameters_of(shapes, dtype)

    def make_one(parameters):
        lr = torch.tensor(rates[0], device=DEVICE) if kind == "tensor" else rates[0]
        return AdamW(parameters, lr=lr, max_grad_norm=1.0)

    a, b = make_one(eager), make_one(replayed)
    give_gradients(replayed, 0)
    b.prepare()
    graphs = [captured(b, replayed), captured(b, replayed)]
    for k, rate in enumerate(rates):
        for optimizer in (a, b):
            if kind == "tensor":
                optimizer.param_groups[0]["lr"].fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
        give_gradients(eager, k)
        with torch.no_grad():
            for p, q in zip(eager, replayed, strict=True):
                q.grad.copy_(p.grad)
        a.step()
        if kind == "float":
            b.sync_groups()
        graphs[k % 2].replay()
        assert torch.equal(a.grad_norm, b.grad_norm)
    assert all(map(torch.equal, eager, replayed))
    assert_same_bits(flat_state(a), flat_state(b))


@gpu
@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    """New state, new addresses, new rates, clipping and the norm, with waiting forbidden."""
    parameters = parameters_of([(3000,), (5,)])
    optimizer = AdamW(parameters, max_grad_norm=1.0)
    give_gradients(parameters, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rate in (1e-3, 1e-4):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            grad_norm(parameters)
            for p in parameters:
                p.grad = p.grad * 2
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.gpu
def test_a_capture_without_preparation_is_met():
    """State made in a graph would be zero again at every replay."""
    parameters = parameters_of([(5,)])
    optimizer = AdamW(parameters)
    give_gradients(parameters, 0)
    with pytest.raises(RuntimeError, match=r"prepare\(\)"):
        captured(optimizer, parameters)
    torch.cuda.synchronize()
