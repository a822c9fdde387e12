"""AdamW: decoupled weight decay, bias-corrected moments; all parameters in one launch.

Math        Step k = 1, 2, ... of a parameter w with gradient g (already clipped):
                w <- w * (1 - lr * decay)
                m <- b1 * m + (1 - b1) * g,   v <- b2 * v + (1 - b2) * g^2
                w <- w - lr * (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
            Clipping, over all parameters: |g| = sqrt(sum of g^2),
                g <- g * min(1, max_grad_norm / (|g| + 1e-6))

Traffic     28 bytes a parameter, in fp32 (read w g m v, write w m v) as in bf16 with an fp32
            master; clipping reads g once more: 4 or 2. Kernels and numerics: adamw_step.py; the
            table through which they find the parameters: param_table.py.

Source      Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2; Kingma & Ba 2014,
            arXiv:1412.6980. The original BERT code leaves out the bias correction; we do not.
            Clipping: Pascanu et al. 2013, arXiv:1211.5063.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .adamw_step import GROUP_COLUMNS, LR, SCALARS, launch_norm, launch_step
from .launch import can_launch
from .param_table import (
    KIND,
    KINDS,
    ParamTable,
    is_capturing,
    is_dense,
    like,
    local,
    same_order,
    upload,
)

# ---------------------------------------------------------------- definition


def adamw_ref(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, k: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: (w, m, v) after step k; nothing is changed in place."""
    b1, b2 = betas
    w = w * (1 - lr * weight_decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + eps), m, v


# ----------------------------------------------------------------- optimizer

STATE = ("exp_avg", "exp_avg_sq", "step")
EMPTY = 16  # for the address of a tensor without elements: any but 0 will do
NOTHING = (0,) * (KIND.value + 1)  # a parameter without a gradient


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in two launches, with clipping in three; a drop-in for it.

    State of a parameter, from its first gradient on: `step` () fp32, `exp_avg` and `exp_avg_sq`
    fp32, and for bf16 and fp16 `master`, the fp32 weight. Whoever writes to such a parameter
    writes to its master too. `step` never waits for the device.

        grad_norm    () fp32: the norm in the last step, before clipping; the next one overwrites it
        skipped      () int64: steps not taken, as the norm was inf or NaN. Without max_grad_norm
                     nothing is measured and nothing skipped

    In a CUDA graph: take a step or call `prepare` first; then `sync_groups` before a replay brings
    rates and other numbers of the groups up to date. An `lr` that is a tensor on the device is
    read in the graph.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, maximize: bool = False,
        max_grad_norm: float | None = None, masters: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """As torch.optim.AdamW, and:

        Args:
            max_grad_norm: gradients of a larger norm are scaled to it; inf: the norm is measured.
            masters: fp32 weights, of more bits than bf16 and fp16 parameters hold. They become
                state as they are. Default: the parameters, widened.

        Raises:
            ValueError: a number is out of range, or a parameter is not one for this optimizer.
        """
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"expected max_grad_norm >= 0, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self._masters = dict(masters or {})
        self._table, self._kept = None, []
        betas = tuple(float(beta) for beta in betas)
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "maximize": maximize, "amsgrad": False,
        })  # fmt: skip
        device = self.param_groups[0]["params"][0].device
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        for p, master in self._masters.items():
            if local(p).dtype == torch.float32 or like(p, master) is not master:
                raise ValueError("expected fp32 masters of bf16 or fp16 parameters, laid out alike")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: a number is out of range, or a parameter is not one for this optimizer.
        """
        super().add_param_group(param_group)
        try:
            _check_group(param_group, self.param_groups[0]["params"][0].device)
            if self.max_grad_norm is not None:
                _check_whole(param_group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every parameter that has a gradient; gradients are not written.

        Args:
            closure: computes loss and gradients again; its result is returned.

        Raises:
            ValueError: a gradient is sparse or of another dtype than its parameter.
            RuntimeError: in a capture, without what `prepare` makes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturing = is_capturing(self.skipped.device)
        table = self._current_table(capturing)
        grads = [p.grad for p in table.params]
        with torch.cuda.device_of(self.skipped):
            if capturing:
                self._copy_rates()
            else:
                table.reserve()
                self._upload_groups()
            rows, read = self._rows(table, grads, capturing)
            self._launch(rows)
        del read  # copies, where a gradient could not be read as it was
        moved = [p for p, g in zip(table.params, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(moved)
        return loss

    @torch.no_grad()
    def prepare(self) -> None:
        """Makes all state and compiles all kernels, so that the very first step can be captured."""
        table = self._current_table()
        for p in table.params:
            if p.requires_grad:
                self._complete_state(p)
        table.reserve()
        with torch.cuda.device_of(self.skipped):
            self._upload_groups()
            table.write([NOTHING] * len(table.params))
            self._launch(table.rows)

    @torch.no_grad()
    def sync_groups(self) -> None:
        """Brings what changed of the groups' numbers to the device: lr, betas, eps, decay, sign.

        `step` does it by itself; a captured one cannot: call this before a replay, never inside.
        """
        self._current_table()
        self._upload_groups()

    def _upload_groups(self):
        values = [_group_values(group, self.skipped.device) for group in self.param_groups]
        if values != self._values:
            new = upload(torch.tensor(values, dtype=torch.float64), self.skipped.device)
            self._groups.copy_(new, non_blocking=True)
            self._values = values
        self._copy_rates()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but bit for bit: torch would cast to the dtype of the parameter.

        State is copied into the tensors that are there, so that captured graphs stay good.
        A state of torch.optim.AdamW will do, its bf16 moments and its step on the host too.
        """
        before, saved = self.state, {}

        def take(_, given):  # after the user's hooks
            if any(group.get("amsgrad") for group in given["param_groups"]):
                raise ValueError("expected a state without amsgrad: use torch.optim.AdamW")
            saved.update(given)
            return {**given, "state": {}}

        def put(_):  # before the user's
            self._load(saved, before)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "grad_norm", "skipped", "_masters")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_table", None)
        self.__dict__.setdefault("_kept", [])
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def _load(self, saved, before):
        ids = (i for group in saved["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        by_id = dict(zip(ids, params, strict=True))
        for i, values in saved["state"].items():
            if i not in by_id:
                self.state[i] = values
                continue
            p = by_id[i]
            there = before.get(p, {})
            for name, value in values.items():
                if name in _names(p):
                    kept = there[name] if name in there else self._fresh(p, name)
                    value = torch.as_tensor(value) if name == "step" else like(p, value)
                    self.state[p][name] = kept.copy_(value)

    def _current_table(self, capturing=False):
        """The table of the parameters as they stand in the groups."""
        params = [p for group in self.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        owned = sizes, list(map(id, params)), list(map(Tensor.numel, params))
        if self._table is None or owned != self._owned:
            if capturing:
                raise RuntimeError("expected the parameters of the last step: call prepare() first")
            if self._table is not None and self._table.captured:
                self._kept.append((self._table, self._groups, self._scalars))
            device = self.skipped.device
            group_of = [i for i, size in enumerate(sizes) for _ in range(size)]
            self._table, self._owned = ParamTable(params, group_of, device), owned
            self._values = None
            shape = len(sizes), GROUP_COLUMNS.value
            self._groups = torch.empty(shape, dtype=torch.float64, device=device)
            self._scalars = torch.empty(len(params), SCALARS.value, device=device)
        return self._table

    def _copy_rates(self):
        for row, group in zip(self._groups, self.param_groups, strict=True):
            if _is_on_device(group["lr"], self.skipped.device):
                row[LR.value].copy_(group["lr"].reshape(()))

    def _key(self, table, grads):
        """What the table depends on, gradients' addresses apart; None: addresses do not tell."""
        kept = (t for state in self.state.values() for t in state.values())
        try:
            return (
                [None if g is None else g.stride() for g in grads],
                list(map(Tensor.data_ptr, table.params)),
                list(map(Tensor.data_ptr, kept)),
            )
        except (TypeError, RuntimeError):  # of what is no tensor, of a sparse one
            return None

    def _rows(self, table, grads, capturing):
        """The table with its addresses, and the gradients that must live until the launch."""
        key = self._key(table, grads)
        if not capturing and key is not None and key == table.key:
            table.write_grads([0 if g is None else g.data_ptr() or EMPTY for g in grads])
            return table.rows, []
        addresses, read, kept = [], [], []
        for p, g in zip(table.params, grads, strict=True):
            if g is None:
                addresses.append(NOTHING)
                continue
            _check_param(p, self.skipped.device)
            read.append(_gradient(p, g))
            state = self._complete_state(p, capturing)
            mean, square, step, *master = (state[name] for name in _names(p))
            written = [p, mean, square, *(master or [p]), step]
            weight, *others = map(local, written)
            named = (weight, read[-1], *others)
            addresses.append((*(t.data_ptr() or EMPTY for t in named), KINDS[p.dtype]))
            kept += written
        if capturing:
            return table.write_captured(addresses, kept), read
        table.write(addresses)
        present = (g for g in grads if g is not None)
        if all(a is b for a, b in zip(read, present, strict=True)):  # no copies, no shards
            table.key = self._key(table, grads)
        return table.rows, read

    def _complete_state(self, p, capturing=False):
        """The state of `p`; what is missing is made, what came in another form is converted."""
        state = self.state[p]
        for name in _names(p):
            there = state.get(name)
            if there is None:
                fits = self._fresh(p, name)
            elif name == "step":
                fits = torch.as_tensor(there, dtype=torch.float32, device=p.device)
            else:
                fits = like(p, there)
            if fits is not there and capturing:  # a replay would make it again
                raise RuntimeError("expected state made before the capture: call prepare() first")
            state[name] = fits
        return state

    def _fresh(self, p, name):
        """As it is before the first step. A master that was given is the one that is stepped."""
        given = self._masters.get(p) if name == "master" else None
        return _new(p, name) if given is None else given

    def _launch(self, rows):
        launch_step(
            self._table, rows, self._groups, self._scalars,
            self.max_grad_norm, self.grad_norm, self.skipped,
        )


@torch.no_grad()
def grad_norm(params: Iterable[Tensor] | Tensor) -> Tensor:
    """The norm of all gradients together: torch.nn.utils.get_total_norm in two launches.

    Args:
        params: with or without gradients, on one device. Not in the capture of a graph.

    Returns:
        () fp32. It is inf or NaN if a gradient has an element that is.

    Raises:
        ValueError: a gradient is not one for these kernels.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    _check_whole(params)
    grads = [local(p.grad) for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    grads = [g if g.layout == torch.strided and is_dense(g) else g.contiguous() for g in grads]
    for g in grads:
        _check_param(g, grads[0].device)
    table = ParamTable(grads, [0] * len(grads), grads[0].device)
    table.write([(0, g.data_ptr(), 0, 0, 0, 0, KINDS[g.dtype]) for g in grads])
    norm = torch.zeros((), device=table.device)
    with torch.cuda.device_of(norm):
        launch_norm(table, norm)
    return norm


# -------------------------------------------------------------------- checks


def _check_group(group, device):
    rate, betas = group["lr"], group["betas"]
    ranges = {
        "one lr": not isinstance(rate, Tensor) or rate.numel() == 1,
        "lr >= 0": isinstance(rate, Tensor) or rate >= 0,
        "betas in [0, 1)": all(0 <= beta < 1 for beta in betas),
        "eps >= 0": group["eps"] >= 0,
        "weight_decay >= 0": group["weight_decay"] >= 0,
        "no amsgrad": not group["amsgrad"],
        "each parameter once": len(set(group["params"])) == len(group["params"]),
    }
    for expected, holds in ranges.items():
        if not holds:
            given = {name: value for name, value in group.items() if name != "params"}
            raise ValueError(f"expected {expected}, got {given}: see torch.optim.AdamW")
    for p in group["params"]:
        _check_param(p, device)


def _check_param(p, device):
    """That a kernel can read and write it where it lies. Also for gradients."""
    if p.device != device or not can_launch(device):
        raise ValueError(
            f"expected parameters on one GPU, got one on {p.device}: use torch.optim.AdamW"
        )
    if p.dtype not in KINDS or p.layout != torch.strided:
        raise ValueError(
            "expected strided fp32, bf16 or fp16, got "
            f"{p.layout} of {p.dtype}: use torch.optim.AdamW"
        )
    if not is_dense(local(p)):
        raise ValueError(
            f"expected elements that lie side by side, got strides {p.stride()} of shape "
            f"{tuple(p.shape)}: use a tensor of its own, such as p.clone()"
        )


def _check_whole(params):
    """That this process has all of each parameter: it would measure the norm of its part."""
    for p in params:
        if local(p) is not p and p.device_mesh.size() > 1:
            raise ValueError("expected whole parameters to measure their norm, got shards")


def _gradient(p, g):
    """`g` as the update reads it: in the order of `p`."""
    if g.layout != torch.strided or g.dtype != p.dtype:
        raise ValueError(
            f"expected a dense gradient in the parameter's {p.dtype}, got {g.layout} of {g.dtype}"
        )
    p, g = local(p), local(g)
    return g if same_order(p, g) else torch.empty_like(p).copy_(g)


def _names(p):
    """What is kept of a parameter."""
    return STATE if p.dtype == torch.float32 else (*STATE, "master")


def _new(p, name):
    """A tensor of the state of `p` as it is before the first step."""
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=p.device)
    if name == "master":
        return torch.empty_like(p, dtype=torch.float32).copy_(p)
    return torch.zeros_like(p, dtype=torch.float32)


def _is_on_device(lr, device):
    return isinstance(lr, Tensor) and lr.device == device


def _group_values(group, device):
    """The row of a group; the rate of a tensor on the device is copied there."""
    lr = 0.0 if _is_on_device(group["lr"], device) else float(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    return [lr, *group["betas"], group["eps"], group["weight_decay"], sign]
