"""Expert backends against one plain oracle: output and every gradient; nothing uninitialised is
read; frozen experts are computed and not trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_bits, make_run, make_site, one_round, parameters_of, tiny_config
from torch import Tensor

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.model import matmul
from fomoe.model.backends import choice, megablocks
from fomoe.model.backends.base import plan_dispatch
from fomoe.model.backends.split import lay_out
from fomoe.model.elementwise import rms_norm, rotate
from fomoe.model.experts import run_experts, swiglu
from fomoe.model.router import Routing
from fomoe.model.transformer import MoE, rotary_table

KINDS = ["split torch", "split onednn", "grouped_mm", "megablocks"]

# name: experts, residents, top-k, tokens, width, hidden width
SHAPES = {
    "half resident": (8, (0, 2, 5, 7), 2, 24, 16, 12),
    "all resident": (8, tuple(range(8)), 2, 24, 16, 12),
    "one resident": (8, (3,), 2, 24, 16, 12),
    "top 1": (4, (0, 1), 1, 24, 16, 12),
    "top 8": (16, tuple(range(0, 16, 2)), 8, 24, 16, 12),
    "64 experts, many empty": (64, tuple(range(0, 64, 3)), 2, 9, 16, 12),
    "one token": (8, (0, 1, 2, 3), 2, 1, 16, 12),
    "many rows": (4, (0, 1, 3), 2, 1301, 8, 20),
    "small and large": (9, tuple(range(9)), 2, 2900, 8, 12),
}


def usable(kind: str) -> tuple[str, str]:
    """Backend and products of a kind; skips where this machine lacks it."""
    backend, _, products = kind.partition(" ")
    if products == "onednn" and not matmul.has_onednn():
        pytest.skip("torch is built without oneDNN")
    if backend == "megablocks":
        if not torch.cuda.is_available():
            pytest.skip("megablocks runs on CUDA devices only")
        try:
            megablocks.load()
        except ConfigError as error:
            pytest.skip(str(error))
    return backend, products or "torch"


def layer_config(shape: tuple[Any, ...], kind: str, **more: Any) -> Config:
    num_experts, _, top_k, _, width, hidden = shape
    backend, products = usable(kind)
    return tiny_config(
        model__num_experts=num_experts,
        model__top_k=top_k,
        model__d_model=width,
        model__expert_ffn_dim=hidden,
        model__experts__backend=backend,
        model__matmul=products,
        model__head_dim=8,
        **more,
    )


def make_layer(
    config: Config, residents: tuple[int, ...], trained: tuple[int, ...] | None = None
) -> MoE:
    torch.manual_seed(1)
    layer = MoE(config, residents, trained)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def routing_of(
    chosen_TK: Tensor, residents: tuple[int, ...], num_experts: int, gate_TK: Tensor
) -> Routing:
    resident_E = torch.zeros(num_experts, dtype=torch.bool)
    resident_E[list(residents)] = True
    executed_TK = resident_E[chosen_TK]
    return Routing(
        expert_TK=chosen_TK,
        gate_TK=gate_TK * executed_TK,
        executed_TK=executed_TK,
        selected_TK=chosen_TK,
    )


def run_and_differentiate(
    layer: MoE, residents: tuple[int, ...], chosen_TK: Tensor, *, oracle: bool, autocast: bool
) -> dict[str, Tensor]:
    """Output, and gradients of input, gates and parameters (None counts as 0)."""
    generator = torch.Generator().manual_seed(2)
    tokens, width = len(chosen_TK), layer.experts.options.d_model
    x_TD = torch.randn(tokens, width, generator=generator).requires_grad_()
    gate_TK = torch.rand(chosen_TK.shape, generator=generator).requires_grad_()
    routing = routing_of(chosen_TK, residents, layer.num_experts, gate_TK)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if oracle:
            plain = {expert: plain_swiglu(layer, expert) for expert in layer.experts.ids}
            y_TD = run_experts(x_TD, routing, plain, layer.experts.slot_E)
        else:
            y_TD = layer.experts(x_TD, routing)
    own = {n: p for n, p in layer.experts.named_parameters() if p.requires_grad}
    wanted = [x_TD, gate_TK, *own.values()]
    weight = torch.randn(y_TD.shape, generator=generator)
    loss = (y_TD.float() * weight).sum() + 0 * sum(w.sum() for w in wanted)
    grads = torch.autograd.grad(loss, wanted)
    return dict(zip(["y", "x", "gate", *own], [y_TD.detach().float(), *grads], strict=True))


def plain_swiglu(layer: MoE, expert: int) -> Any:
    (gate_up, slot), (down, _) = (layer.experts.place(part, expert) for part in ("gate_up", "down"))

    def run(x_TD: Tensor) -> Tensor:
        own_gate_up, own_down = (getattr(layer.experts, n)[slot] for n in (gate_up, down))
        gate_TF, up_TF = F.linear(x_TD, own_gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, own_down)

    return run


def choices(shape: tuple[Any, ...]) -> Tensor:
    num_experts, _, top_k, tokens, _, _ = shape
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(3))
    return scores.topk(top_k, dim=-1).indices


def assert_close(own: dict[str, Tensor], oracle: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to the largest value of the oracle's."""
    for name, want in oracle.items():
        assert torch.isfinite(own[name]).all(), f"{name} is not finite"
        scale = want.abs().max().clamp_min(1e-6)
        assert (own[name] - want).abs().max() <= tolerance * scale, name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("recompute", ["none", "experts"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_in_fp32(name: str, kind: str, recompute: str) -> None:
    if kind == "megablocks":
        pytest.skip("megablocks has no fp32")
    shape = SHAPES[name]
    layer = make_layer(layer_config(shape, kind, model__recompute=recompute), shape[1])
    chosen_TK = choices(shape)
    own, oracle = (
        run_and_differentiate(layer, shape[1], chosen_TK, oracle=o, autocast=False)
        for o in (False, True)
    )
    assert_close(own, oracle, 2e-5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_in_bf16(name: str, kind: str) -> None:
    """bf16 has 8 bits: products and sums round to 1/256, so 3 % of the largest value is asked."""
    num_experts, residents, top_k, tokens, _, _ = SHAPES[name]
    shape = (num_experts, residents, top_k, tokens, 16, 24)  # rows of 16 bytes, as kernels want
    layer = make_layer(layer_config(shape, kind), residents)
    chosen_TK = choices(shape)
    own = run_and_differentiate(layer, residents, chosen_TK, oracle=False, autocast=True)
    oracle = run_and_differentiate(layer, residents, chosen_TK, oracle=True, autocast=False)
    assert_close(own, oracle, 0.03)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS[:3])
def test_all_skipped_gives_exactly_zero(kind: str) -> None:
    shape = SHAPES["half resident"]
    layer = make_layer(layer_config(shape, kind), shape[1])
    chosen_TK = torch.tensor([[1, 3], [4, 6], [6, 1]])
    result = run_and_differentiate(layer, shape[1], chosen_TK, oracle=False, autocast=False)
    assert all(not tensor.any() for tensor in result.values())


@pytest.mark.parametrize("kind", ["split torch", "split onednn"])
def test_split_takes_odd_widths(kind: str) -> None:
    shape = (5, (0, 2, 4), 3, 33, 13, 11)
    layer = make_layer(layer_config(shape, kind), shape[1])
    own, oracle = (
        run_and_differentiate(layer, shape[1], choices(shape), oracle=o, autocast=False)
        for o in (False, True)
    )
    assert_close(own, oracle, 2e-5)


@pytest.mark.parametrize("recompute", ["none", "experts"])
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("trained", [(2,), (0, 3, 6), (1, 2, 3, 4, 5, 6, 7), ()])
def test_frozen_experts_are_computed_and_get_no_gradient(
    trained: tuple[int, ...], kind: str, recompute: str
) -> None:
    shape = SHAPES["all resident"]
    config = layer_config(shape, kind, model__recompute=recompute)
    layer = make_layer(config, shape[1], trained)
    assert layer.experts.ids[: len(trained)] == trained
    own, oracle = (
        run_and_differentiate(layer, layer.experts.ids, choices(shape), oracle=o, autocast=False)
        for o in (False, True)
    )
    assert set(own) == {"y", "x", "gate"} | ({"gate_up", "down"} if trained else set())
    assert_close(own, oracle, 2e-5)


def test_dispatch_holds_executed_assignments_only() -> None:
    shape = SHAPES["half resident"]
    chosen_TK = choices(shape)
    layer = make_layer(layer_config(shape, "split torch"), shape[1])
    routing = routing_of(chosen_TK, shape[1], 8, torch.ones(chosen_TK.shape))
    dispatch = plan_dispatch(routing, layer.experts.slot_E, 4)
    executed = [(t, e) for t, row in enumerate(chosen_TK.tolist()) for e in row if e in shape[1]]
    assert len(dispatch.token_A) == len(executed) == sum(dispatch.counts)
    expert_A = chosen_TK.flatten()[dispatch.order_A].tolist()
    assert sorted(zip(dispatch.token_A.tolist(), expert_A, strict=True)) == sorted(executed)
    assert expert_A == sorted(expert_A)


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize(
    "counts",
    [
        [20, 900],  # one small expert before a large one: alone, and not in its slot's place
        [90, 3],
        [900, 20, 21],
        [0, 0, 7],
        [700, 0, 650, 640],
        [1, 2, 3, 4, 50, 60, 70, 800],
        [2100, 30, 2200, 31, 32],
    ],
)
def test_split_equals_the_oracle_for_any_sizes(counts: list[int], products: str) -> None:
    num_experts = len(counts)
    shape = (num_experts, tuple(range(num_experts)), 1, sum(counts), 8, 12)
    layer = make_layer(layer_config(shape, f"split {products}"), shape[1])
    torch.manual_seed(0)
    order_T = torch.randperm(sum(counts))
    chosen_T1 = torch.arange(num_experts).repeat_interleave(torch.tensor(counts))[order_T, None]
    own, oracle = (
        run_and_differentiate(layer, shape[1], chosen_T1, oracle=plain, autocast=False)
        for plain in (False, True)
    )
    assert_close(own, oracle, 1e-4)


def test_split_lays_out_small_experts_in_pairs_of_nearly_equal_size() -> None:
    counts = [5, 0, 700, 6, 40, 41, 3, 200]
    torch.manual_seed(0)
    chosen_T1 = torch.arange(8).repeat_interleave(torch.tensor(counts))[torch.randperm(995), None]
    everyone = tuple(range(8))
    routing = routing_of(chosen_T1, everyone, 8, torch.ones(chosen_T1.shape))
    dispatch = plan_dispatch(routing, torch.arange(8), 8)
    rows = lay_out(dispatch, matmul.TORCH)
    token_of = rows.spread(dispatch.token_A + 1) - 1  # -1 where a row is padding
    held = {}
    for tile, groups in rows.tiles:
        for group in groups:
            own = token_of[tile][group.rows].view(len(group.experts), -1).tolist()
            held[group.experts] = [sorted(t for t in tokens if t >= 0) for tokens in own]
    assert set(held) == {(2,), (0, 6), (3,), (4, 5), (7,)}
    for experts, tokens in held.items():
        for expert, own in zip(experts, tokens, strict=True):
            assert own == (chosen_T1[:, 0] == expert).nonzero()[:, 0].tolist()
    assert len(rows.token_P) == 995 + 2 + 1  # one of each pair is padded to the other
    value_A = torch.randn(995)
    assert torch.equal(rows.collect(rows.spread(value_A)), value_A)
    assert all(
        len(group.experts) == 1 for _, g in lay_out(dispatch, matmul.ONEDNN).tiles for group in g
    )


# ------------------------------------------------------------------------------ stacked parameters


def grouped(**more: Any) -> Config:
    return tiny_config(model__experts__backend="grouped_mm", model__matmul="torch", **more)


def test_backends_train_alike_and_hold_the_same_names() -> None:
    sites = [
        make_site(config, seed=5) for config in (grouped(), tiny_config(model__matmul="torch"))
    ]
    for site in sites:
        site.run_local_steps(4, lambda _: None)
    left, right = (site.state()[0] for site in sites)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


def test_state_returns_to_a_stacked_site() -> None:
    site = make_site(grouped(), seed=5)
    site.run_local_steps(2, lambda _: None)
    tensors, values = site.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    site.run_local_steps(2, lambda _: None)
    site.load_state(saved, values)
    assert_same_bits(saved, site.state()[0])
    fresh = make_site(grouped(), seed=6)
    fresh.load_state(saved, values)
    assert_same_bits(saved, fresh.state()[0])


def test_a_round_with_stacked_parameters_equals_one_with_split() -> None:
    runs = [make_run(c) for c in (grouped(), tiny_config(model__matmul="torch"))]
    for run in runs:
        one_round(run)
    left, right = (parameters_of(run) for run in runs)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- choosing


def test_auto_is_split_on_cpu() -> None:
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert choice.choose_backend(tiny_config().model, device, dtype) == "split"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.experts.backend": "megablocks"}, "needs bf16 on cuda"),
        (
            {"model.experts.backend": "grouped_mm", "model.expert_ffn_dim": 10},
            "multiples of 4 in torch.float32, not model.expert_ffn_dim 10",
        ),
    ],
)
def test_backends_that_cannot_run_say_why(options: dict[str, Any], message: str) -> None:
    model = tiny_config(options).model
    with pytest.raises(ConfigError, match=message):
        choice.choose_backend(model, torch.device("cpu"), torch.float32)


def test_missing_megablocks_is_an_error_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(megablocks.importlib, "import_module", absent)
    megablocks.load.cache_clear()
    with pytest.raises(ConfigError, match=r"No module named megablocks.*docs/performance.md"):
        megablocks.load()


# ------------------------------------------------------------------------------- the other kernels


@pytest.mark.parametrize("rows", [0, 1, 37, 64, 700])
@pytest.mark.parametrize(("inner", "outer"), [(9, 5), (6, 24)])
def test_onednn_products_equal_torch(rows: int, inner: int, outer: int) -> None:
    usable("split onednn")
    x_NI, w_OI, y_NO = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    pairs = [(x_NI, w_OI), (y_NO, w_OI), (y_NO, x_NI)]
    for own, plain, pair in zip(matmul.ONEDNN, matmul.TORCH, pairs, strict=True):
        torch.testing.assert_close(own(*pair), plain(*pair), rtol=1e-4, atol=1e-4)
        assert own(*pair).is_contiguous()


def test_rows_are_cut_into_pieces_of_few_sizes() -> None:
    """oneDNN keeps a kernel for each size: two for every doubling of the rows."""
    sizes = set()
    for rows in range(4097):
        whole, left = matmul.pieces(rows)
        ends = [piece.stop for piece in whole]
        assert [piece.start for piece in (*whole, left)] == [0, *ends]
        assert left.stop == rows
        assert left.stop - left.start < 64
        sizes |= {piece.stop - piece.start for piece in whole}
    assert sorted(sizes) == [
        *(64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    ]


def test_onednn_gets_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the experts' rows are: in training, and where fetched experts run one by one."""
    shape = (6, tuple(range(6)), 2, 1500, 16, 12)
    layer = make_layer(layer_config(shape, "split onednn"), shape[1])
    real, seen = matmul._onednn, set()

    def counting(x_NI: Tensor, w_OI: Tensor) -> Tensor:
        seen.add((*x_NI.shape, len(w_OI)))
        return real(x_NI, w_OI)

    monkeypatch.setattr(matmul, "_onednn", counting)
    for turn in range(12):
        generator = torch.Generator().manual_seed(turn)
        x_TD = torch.randn(1500 - 31 * turn, 16, generator=generator)
        skew_E = torch.randn(6, generator=generator)
        scores = torch.rand(len(x_TD), 6, generator=generator) + skew_E
        chosen_TK = scores.topk(2, dim=-1).indices
        routing = routing_of(chosen_TK, shape[1], 6, torch.ones(chosen_TK.shape))
        layer.experts(x_TD, routing).sum().backward()
        experts = {
            expert: partial(swiglu, gate_up=gate_up, down=down, matmul="onednn")
            for expert, gate_up, down in zip(
                layer.experts.ids, layer.experts.gate_up, layer.experts.down, strict=True
            )
        }
        run_experts(x_TD, routing, experts, layer.experts.slot_E)
    rows = {size for shape in seen for size in shape} - {12, 16, 24}
    assert rows <= {64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert len(seen) <= 6 * len(rows)


@pytest.mark.parametrize(
    ("cpu", "idle"),
    [
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", True),
        ("vendor_id\t: AnotherMaker\ncpu family\t: 7\n", True),
        ("AuthenticAMD, and the family is not said", True),
    ],
)
def test_which_cpus_have_wide_units_that_mkl_leaves_idle(cpu: str, idle: bool) -> None:
    assert matmul.has_idle_wide_units(cpu) == idle


def test_rms_norm_and_rotation_equal_autograd_of_the_definition() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    cos_SH, sin_SH = rotary_table(seq_len=5, head_size=8, theta=100.0)
    left, right = x.chunk(2, dim=-1)
    turned = x * cos_SH + torch.cat([-right, left], dim=-1) * sin_SH
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    for own, plain, inputs in (
        (rms_norm(x, weight, 1e-5), normed, (x, weight)),
        (rotate(x, cos_SH, sin_SH), turned, (x,)),
    ):
        torch.testing.assert_close(own, plain)
        grad = torch.randn(own.shape)
        for mine, theirs in zip(
            torch.autograd.grad(own, inputs, grad),
            torch.autograd.grad(plain, inputs, grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["experts", "layers"])
def test_recomputation_changes_no_gradient(recompute: str) -> None:
    sites = [make_site(tiny_config(model__recompute=r), seed=5) for r in ("none", recompute)]
    for site in sites:
        site.backward()
    left, right = ({n: p.grad for n, p in site.trainable.items()} for site in sites)
    assert_same_bits(left, right)
