"""The network against references written independently: loops over tokens, positions and heads."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_bits, make_site, tiny_config
from torch import Tensor

from fomoe.config import Config, RouterConfig
from fomoe.model import attention
from fomoe.model.attention import Attention
from fomoe.model.elementwise import rotate
from fomoe.model.experts import Expert, swiglu
from fomoe.model.router import Router, choose_experts
from fomoe.model.transformer import MoE, Transformer, rotary_table
from fomoe.planning import plan_run

PLAIN = {"router.at_least_one": False}
EVERYTHING = tuple(range(8))


def make_moe(
    config: Config, residents: tuple[int, ...] = EVERYTHING, *, layer: int = 0, std: float = 0.3
) -> MoE:
    """The first layer's MoE with the given residents; larger weights make routing decided."""
    model = Transformer(config, dict.fromkeys(config.model.moe_layers, residents))
    with torch.no_grad():
        for parameter in model.moe(layer).parameters():
            parameter.mul_(std / config.model.init_std)
    return model.moe(layer)


def expert_of(moe: MoE, expert: int) -> Expert:
    """One resident expert as a function."""
    slot = moe.experts.ids.index(expert)
    return partial(swiglu, gate_up=moe.experts.gate_up[slot], down=moe.experts.down[slot])


def tokens(count: int = 24, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def reference_moe(
    x_TD: Tensor,
    moe: MoE,
    residents: tuple[int, ...],
    *,
    top_k: int = 2,
    score: str = "softmax",
    gate_norm: str = "selected",
) -> Tensor:
    """Token by token and expert by expert: top-k over all, skip absent ones, weigh, add."""
    rows = []
    for x_D in x_TD:
        logits = moe.router.weight @ x_D
        scores = logits.softmax(0) if score == "softmax" else 1 / (1 + torch.exp(-logits))
        chosen = sorted(range(len(logits)), key=lambda e: -scores[e].item())[:top_k]
        present = [e for e in chosen if e in residents]
        over = {"selected": chosen, "survivors": present}.get(gate_norm)
        norm = sum(scores[e] for e in over) if over else 1.0
        if present and gate_norm != "survivors":
            norm = norm * len(residents) / len(logits)  # skip_scale: inverse
        y_D = torch.zeros_like(x_D)
        for e in present:
            slot = moe.experts.ids.index(e)
            gate, up = (moe.experts.gate_up[slot] @ x_D).chunk(2)
            y_D = y_D + scores[e] / norm * (
                moe.experts.down[slot] @ (gate * torch.sigmoid(gate) * up)
            )
        if moe.shared_expert is not None:
            gate, up = (moe.shared_expert.gate_up @ x_D).chunk(2)
            y_D = y_D + moe.shared_expert.down @ (gate * torch.sigmoid(gate) * up)
        rows.append(y_D)
    return torch.stack(rows)


# ------------------------------------------------------------------------------- R = E and skipping


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate_norm", ["selected", "none", "survivors"])
@pytest.mark.parametrize("shared", [0, 10])
def test_with_all_experts_it_is_the_dense_reference_moe(score, gate_norm, shared):
    """Outputs and the gradients of inputs, router and experts."""
    options = {"router.score": score, "router.gate_norm": gate_norm}
    moe = make_moe(tiny_config(options | {"model.shared_expert_ffn_dim": shared}))
    x_TD = tokens().requires_grad_()
    leaves = [x_TD, *moe.parameters()]
    weigh = tokens(seed=1)
    ours = moe(x_TD)[0]
    reference = reference_moe(x_TD, moe, EVERYTHING, score=score, gate_norm=gate_norm)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weigh).sum(), leaves, allow_unused=True),
        torch.autograd.grad((reference * weigh).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("residents", [(0, 1, 2, 3), (6,), (1, 4, 7), ()])
@pytest.mark.parametrize("gate_norm", ["selected", "none", "survivors"])
def test_with_absent_experts_it_is_the_reference_that_leaves_them_out(residents, gate_norm):
    moe = make_moe(tiny_config(PLAIN, router__gate_norm=gate_norm), residents)
    x_TD = tokens()
    ours = moe(x_TD)[0]
    reference = reference_moe(x_TD, moe, residents, gate_norm=gate_norm)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [[(0, 1, 2, 3), (4, 5, 6, 7)], [(5,), (0, 7), (1, 2, 3, 4, 6)], [(e,) for e in range(8)]],
)
@pytest.mark.parametrize("gate_norm", ["selected", "none"])
def test_disjoint_resident_sets_sum_to_the_full_layer(parts, gate_norm):
    config = tiny_config(PLAIN, router__gate_norm=gate_norm, router__skip_scale="none")
    x_TD = tokens(64)
    whole = make_moe(config)(x_TD)[0]
    assert whole.abs().max() > 1e-3
    total = sum(make_moe(config, part)(x_TD)[0] for part in parts)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


def test_a_fully_skipped_token_gets_exactly_zero_and_no_gradient():
    moe = make_moe(tiny_config(PLAIN), (0, 1, 2))
    x_TD = tokens(200).requires_grad_()
    y_TD, routing, stats = moe(x_TD)
    skipped = ~routing.executed_TK.any(-1)
    assert 0 < skipped.sum() < 200
    assert stats.unserved == skipped.sum()
    assert (y_TD[skipped] == 0).all()
    assert (y_TD[~skipped] != 0).any(-1).all()
    (grad,) = torch.autograd.grad(y_TD.sum(), x_TD)
    assert (grad[skipped] == 0).all()


def test_what_other_tokens_do_does_not_change_a_token():
    """Dropless: no capacity, so a token's output does not depend on its batch."""
    moe = make_moe(tiny_config(PLAIN), (0, 1, 2))
    x_TD = tokens(40)
    together = moe(x_TD)[0]
    alone = torch.cat([moe(x_TD[i : i + 1])[0] for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


def test_experts_that_are_passed_in_stand_in_for_the_residents():
    config = tiny_config(PLAIN)
    whole, part = make_moe(config), make_moe(config, (2, 5))
    x_TD = tokens()
    borrowed = {e: expert_of(whole, e) for e in EVERYTHING}
    torch.testing.assert_close(part(x_TD, borrowed)[0], whole(x_TD)[0], rtol=1e-6, atol=1e-6)
    # In another order, and only some of them.
    few = {e: expert_of(whole, e) for e in (7, 3)}
    torch.testing.assert_close(part(x_TD, few)[0], make_moe(config, (3, 7))(x_TD)[0])


# ------------------------------------------------------------------------------------------- poison


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("residents", [(0, 1, 2), (6,), ()])
@pytest.mark.parametrize("at_least_one", [True, False])
def test_uninitialised_memory_does_not_leak(residents, at_least_one):
    """Forward and backward, with every fresh buffer full of NaN."""
    config = tiny_config(router__at_least_one=at_least_one)
    model = Transformer(config, dict.fromkeys(config.model.moe_layers, residents))
    assert all(p.isfinite().all() for p in model.parameters())
    batch = torch.randint(0, 32, (2, 17), generator=torch.Generator().manual_seed(0))
    output = model(batch[:, :-1], batch[:, 1:])
    stats = list(output.stats.values())
    loss = output.loss + sum(s.lb_loss + s.z_loss + 0 * s.entropy for s in stats)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("residents", [(0, 1, 2), (6,)])
def test_poisoned_memory_gives_the_same_bits(residents, request):
    config = tiny_config(PLAIN)

    def gradients() -> dict[str, Tensor]:
        model = Transformer(config, dict.fromkeys(config.model.moe_layers, residents))
        batch = torch.randint(0, 32, (2, 17), generator=torch.Generator().manual_seed(0))
        loss = model(batch[:, :-1], batch[:, 1:]).loss
        loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return own | {"loss": loss.detach()}

    clean = gradients()
    request.getfixturevalue("poisoned_memory")
    assert_same_bits(clean, gradients())


def test_a_poisoned_expert_hurts_only_the_tokens_that_chose_it():
    """0 x NaN is NaN: a gate of zero would not protect, leaving the row out does."""
    moe = make_moe(tiny_config(PLAIN), (0, 1, 2))
    with torch.no_grad():
        moe.experts.down[1].fill_(torch.nan)
    x_TD = tokens(100)
    y_TD, routing, _ = moe(x_TD)
    chose = (routing.expert_TK == 1).any(-1)
    assert 0 < chose.sum() < 100
    assert y_TD[chose].isnan().any(-1).all()
    assert y_TD[~chose].isfinite().all()


# ----------------------------------------------------------------------------- gradients of routing


def task_gradient_of_router(top_k: int, residents: tuple[int, ...], gate_norm: str) -> float:
    """Largest gradient of the task (not of the router losses) at the router."""
    options = {"model.top_k": top_k, "router.gate_norm": gate_norm}
    moe = make_moe(tiny_config(PLAIN | options), residents)
    y_TD = moe(tokens(64))[0]
    (grad,) = torch.autograd.grad((y_TD * tokens(64, seed=1)).sum(), moe.router.weight)
    return float(grad.abs().max())


@pytest.mark.parametrize("gate_norm", ["selected", "none", "survivors"])
def test_gradients_reach_the_router(gate_norm):
    assert task_gradient_of_router(2, (0, 1, 2, 3), gate_norm) > 1e-3
    assert task_gradient_of_router(2, EVERYTHING, gate_norm) > 1e-3


def test_a_lone_choice_normalised_over_itself_teaches_the_router_nothing():
    """Why `survivors` is not the default: the gate is the constant 1."""
    assert task_gradient_of_router(2, (3,), "survivors") < 1e-4
    assert task_gradient_of_router(2, (3,), "selected") > 1e-3


def test_an_expert_without_tokens_has_zero_gradient_and_zero_count():
    config = tiny_config(model__num_layers=1, placement__replication_factor=4, router__lb_loss=0.0)
    site = make_site(config)
    # Experts 6 and 7 score lowest for every token: their rows point away from all the others.
    with torch.no_grad():
        router = site.model.moe(0).router
        router.balance_bias_E[6:] = -10.0
    assert config.router.balance == "loss"
    site.model.moe(0).router.options = config.router.model_copy(update={"balance": "both"})
    site.backward()
    for expert in range(8):
        gradients = [
            site.parameters[f"layers.0.moe.experts.{part}"].grad[expert]
            for part in ("gate_up", "down")
        ]
        assert all((gradient == 0).all() == (expert >= 6) for gradient in gradients)
    routing = site.end_round()
    assert routing.executed_LE[0, 6:].sum() == 0
    assert routing.executed_LE.sum() == 2 * 2 * 16
    counts = site.round_counts(routing)
    assert counts.executed[0, 6] == 0 < counts.executed[0, 0]


def test_a_site_whose_experts_nobody_chose_still_trains():
    config = tiny_config(PLAIN, model__num_layers=1, placement__replication_factor=1)
    site = make_site(config)
    resident = list(plan_run(config).placement.residents(0)[0])
    router = site.model.moe(0).router
    router.options = config.router.model_copy(update={"balance": "both"})
    router.balance_bias_E[resident] = -10.0
    (record,) = site.run_local_steps(1, lambda _: None)
    assert record.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in site.model.parameters())
    routing = site.end_round()
    assert routing.executed_LE.sum() == 0
    assert routing.skipped_L.sum() == routing.selected_LE.sum() == 2 * 2 * 16


# ------------------------------------------------------------------------------- the router's rules


def choose(scores, residents, *, preference=None, **options):
    """Route with given scores; the defaults are plain skipping."""
    scores_TE = torch.tensor(scores, dtype=torch.float32)
    preference_TE = scores_TE if preference is None else torch.tensor(preference)
    resident_E = torch.zeros(scores_TE.shape[1], dtype=torch.bool)
    resident_E[list(residents)] = True
    settings = {"top_k": 2, "gate_norm": "selected", "at_least_one": False, "skip_scale": "none"}
    return choose_experts(
        scores_TE=scores_TE,
        preference_TE=preference_TE,
        resident_E=resident_E,
        num_resident=len(residents),
        **settings | options,
    )


SCORES = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]  # choices 0, 1 and 3, 2


@pytest.mark.parametrize(
    ("gate_norm", "gates"),
    [
        ("selected", [[4 / 7, 0.0], [0.0, 3 / 7]]),
        ("none", [[0.4, 0.0], [0.0, 0.3]]),
        ("survivors", [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_gates_are_normalised_as_asked(gate_norm, gates):
    routing = choose(SCORES, (0, 2), gate_norm=gate_norm)
    assert routing.expert_TK.tolist() == [[0, 1], [3, 2]]
    assert routing.executed_TK.tolist() == [[True, False], [False, True]]
    torch.testing.assert_close(routing.gate_TK, torch.tensor(gates))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_skip_scale_leaves_routing_over_residents_alone(score):
    """Nothing is skipped there, so that gates sum to 1 as they do in the merged model."""
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    resident_E = torch.tensor([True, False, True, False])
    gates = []
    for scale in ("none", "inverse"):
        options = RouterConfig(score=score, route_scope="resident", skip_scale=scale)
        torch.manual_seed(2)
        router = Router(d_model=8, num_experts=4, top_k=2, options=options)
        torch.nn.init.normal_(router.weight)
        gates.append(router(x_TD, resident_E=resident_E, num_resident=2)[0].gate_TK)
    assert torch.equal(*gates)
    assert torch.allclose(gates[0].sum(-1), torch.ones(5))


def test_skip_scale_multiplies_by_all_over_resident():
    plain, scaled = (choose(SCORES, (0, 2), skip_scale=s) for s in ("none", "inverse"))
    torch.testing.assert_close(scaled.gate_TK, plain.gate_TK * 2)
    everywhere = choose(SCORES, (0, 1, 2, 3), skip_scale="inverse")
    torch.testing.assert_close(everywhere.gate_TK.sum(-1), torch.ones(2))


def test_at_least_one_replaces_the_lowest_choice_by_the_best_resident():
    routing = choose(SCORES, (2, 3), at_least_one=True)
    assert routing.selected_TK.tolist() == [[0, 1], [3, 2]]
    assert routing.expert_TK.tolist() == [[0, 2], [3, 2]]  # best of 2 and 3 for token 0 is 2
    assert routing.executed_TK.tolist() == [[False, True], [True, True]]
    # Gates are taken over the new set.
    expected = torch.tensor([[0.0, 0.2 / 0.6], [4 / 7, 3 / 7]])
    torch.testing.assert_close(routing.gate_TK, expected)


def test_at_least_one_touches_no_token_that_runs_something():
    plain = choose(SCORES, (1, 3))
    served = choose(SCORES, (1, 3), at_least_one=True)
    assert plain.executed_TK.any(-1).all()
    assert torch.equal(plain.expert_TK, served.expert_TK)
    assert torch.equal(plain.gate_TK, served.gate_TK)


def test_at_least_one_keeps_counts_and_skips_of_the_original_choice():
    """Of 8 experts, top 2, 4 resident: 0.50 skipped and 0.61 executed under balanced routing."""
    config = tiny_config()
    stats = {}
    for at_least_one in (True, False):
        moe = make_moe(tiny_config(router__at_least_one=at_least_one), (0, 2, 4, 6))
        with torch.no_grad():
            moe.router.weight.copy_(torch.eye(16)[:8])  # independent logits: balanced routing
        stats[at_least_one] = moe(tokens(4000))[2]
    assert config.router.at_least_one
    assert torch.equal(stats[True].selected_E, stats[False].selected_E)
    assert stats[True].skipped == stats[False].skipped
    assert float(stats[True].lb_loss.detach()) == float(stats[False].lb_loss.detach())
    assignments = 2 * 4000
    unserved = math.comb(4, 2) / math.comb(8, 2)
    assert float(stats[True].skipped) / assignments == pytest.approx(0.5, abs=0.02)
    assert int(stats[False].executed_E.sum()) / assignments == pytest.approx(0.5, abs=0.02)
    executed = int(stats[True].executed_E.sum()) / assignments
    assert executed == pytest.approx(0.5 + unserved / 2, abs=0.02)
    assert int(stats[False].unserved) / 4000 == pytest.approx(unserved, abs=0.02)
    assert stats[True].unserved == 0


def test_selected_counts_are_over_all_experts_and_executed_over_residents():
    moe = make_moe(tiny_config(PLAIN), (1, 4))
    _, routing, stats = moe(tokens(64))
    selected = [int((routing.selected_TK == e).sum()) for e in EVERYTHING]
    assert stats.selected_E.tolist() == selected
    assert sum(selected) == 128
    assert stats.executed_E.tolist() == [n if e in (1, 4) else 0 for e, n in enumerate(selected)]
    assert int(stats.skipped) == 128 - selected[1] - selected[4]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_losses_are_the_direct_formulas(score):
    moe = make_moe(tiny_config(PLAIN, router__score=score), (1, 4))
    x_TD = tokens(64)
    _, routing, stats = moe(x_TD)
    logits = x_TD @ moe.router.weight.detach().T
    z_loss = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 64
    assert float(stats.z_loss.detach()) == pytest.approx(z_loss, rel=1e-5)
    probs = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    probs = probs / probs.sum(-1, keepdim=True)
    lb_loss = 0.0
    for expert in range(8):
        share = float((routing.selected_TK == expert).float().mean())
        lb_loss += 8 * share * float(probs[:, expert].mean())
    assert float(stats.lb_loss.detach()) == pytest.approx(lb_loss, rel=1e-5)
    entropy = -(probs * probs.log()).sum(-1).mean()
    assert float(stats.entropy) == pytest.approx(float(entropy.detach()), rel=1e-5)
    for loss in (stats.lb_loss, stats.z_loss):
        (grad,) = torch.autograd.grad(loss, moe.router.weight, retain_graph=True)
        assert grad.abs().sum() > 0


def test_balanced_routing_has_load_balancing_loss_one_and_collapse_has_more():
    moe = make_moe(tiny_config(model__top_k=1))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:8, :8] = torch.eye(8) * 50
    x_TD = torch.eye(16)[:8].repeat(4, 1)
    assert float(moe(x_TD)[2].lb_loss.detach()) == pytest.approx(1.0, rel=1e-4)
    collapsed = torch.eye(16)[:1].repeat(32, 1)
    assert float(moe(collapsed)[2].lb_loss.detach()) == pytest.approx(8.0, rel=1e-4)


def test_routing_is_fp32_under_autocast():
    moe = make_moe(tiny_config(PLAIN))
    x_TD = tokens()
    expected = moe.router(x_TD, torch.ones(8, dtype=torch.bool), 8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, routing, stats = moe(x_TD)
    assert routing.gate_TK.dtype == stats.z_loss.dtype == torch.float32
    assert torch.equal(routing.gate_TK, expected.gate_TK)
    torch.testing.assert_close(y_TD.float(), moe(x_TD)[0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("residents", [(0, 1, 2), (2, 7)])
def test_resident_routing_masks_before_the_choice(residents):
    """k experts per token, none skipped, as a smaller MoE of the residents would route."""
    moe = make_moe(
        tiny_config(router__route_scope="resident", router__at_least_one=False), residents
    )
    x_TD = tokens(64)
    y_TD, routing, stats = moe(x_TD)
    assert routing.executed_TK.all()
    assert set(routing.expert_TK.unique().tolist()) <= set(residents)
    assert int(stats.skipped) == int(stats.unserved) == 0
    rows = []
    for x_D in x_TD:
        scores = (moe.router.weight[list(residents)] @ x_D).softmax(0)
        top = scores.topk(2)
        gates = top.values / top.values.sum()
        outputs = [expert_of(moe, residents[i])(x_D) for i in top.indices.tolist()]
        rows.append(sum(g * y for g, y in zip(gates, outputs, strict=True)))
    torch.testing.assert_close(y_TD, torch.stack(rows), rtol=1e-4, atol=1e-6)
    assert stats.lb_loss.isfinite()
    assert stats.z_loss.isfinite()
    assert not torch.autograd.grad(stats.z_loss, moe.router.weight)[0].isnan().any()


def test_a_selection_bias_decides_the_choice_but_not_the_gate():
    scores = [[0.4, 0.3, 0.2, 0.1]]
    biased = [[0.4, 0.3 - 1, 0.2, 0.1 + 1]]
    routing = choose(scores, (0, 1, 2, 3), preference=biased, gate_norm="none")
    assert routing.expert_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.gate_TK, torch.tensor([[0.1, 0.4]]))


@pytest.mark.parametrize("balance", ["bias", "both"])
def test_the_balance_bias_moves_load_towards_rarely_chosen_experts(balance):
    config = tiny_config(
        router__balance=balance, router__bias_rate=0.003, placement__replication_factor=4
    )
    site = make_site(config)
    moe = site.model.moe(0)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(16)[:8])
    x_TD = tokens(400)
    x_TD[:, 0] += 1.0  # all tokens lean towards expert 0

    def load() -> Tensor:
        return moe(x_TD)[2].selected_E

    before = load()
    for _ in range(40):
        other = torch.ones(8)
        site.move_balance_bias(torch.stack([load(), other]))
    assert load().max() - load().min() < 0.5 * (before.max() - before.min())
    assert (site.model.moe(1).router.balance_bias_E == 0).all(), "equal counts move nothing"


def test_without_the_bias_option_the_balance_bias_is_ignored():
    moe = make_moe(tiny_config())
    x_TD = tokens()
    before = moe(x_TD)[0]
    moe.router.balance_bias_E += torch.arange(8.0)
    moe.router.execute_bias += 1.0
    assert torch.equal(moe(x_TD)[0], before)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_the_load_balancing_loss_trains_the_router_unless_the_bias_replaces_it(balance):
    options = {"router.balance": balance, "router.z_loss": 0.0, "inner.clip_norm": 0.0}
    light, heavy = (make_site(tiny_config(options, router__lb_loss=c)) for c in (0.0, 10.0))
    name = "layers.0.moe.router.weight"
    for site in (light, heavy):
        site.backward()
    same = torch.equal(light.parameters[name].grad, heavy.parameters[name].grad)
    assert same == (balance == "bias")


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_execute_target_steers_the_executed_share(target):
    config = tiny_config(
        PLAIN,
        router__execute_target=target,
        router__execute_rate=0.03,
        inner__batch_size=8,
        inner__lr=1e-4,
        model__init_std=0.2,
    )
    site = make_site(config)
    records = torch.stack(site.run_local_steps(60, lambda _: None))
    start, end = records[:3, 5].mean(), records[-15:, 5].mean()
    assert abs(float(start) - target) > 0.1, "the test would show nothing"
    assert float(end) == pytest.approx(target, abs=0.06)


def test_execute_target_leaves_a_site_with_all_experts_alone():
    config = tiny_config(router__execute_target=0.3, placement__replication_factor=4)
    plain = tiny_config(placement__replication_factor=4)
    left, right = make_site(config), make_site(plain)
    left.run_local_steps(3, lambda _: None)
    right.run_local_steps(3, lambda _: None)
    assert_same_bits(left.parameters, right.parameters)


# ---------------------------------------------------------------------------------- initial weights


def test_initial_weights_are_the_same_wherever_an_expert_is_placed():
    whole = Transformer(tiny_config(), {0: EVERYTHING, 1: EVERYTHING})
    reference = dict(whole.named_parameters())
    for options in (
        {"placement.replication_factor": 1},
        {"placement.replication_factor": 2},
        {"placement.capacity": [8, 5, 2, 1], "placement.replication_factor": None},
    ):
        config = tiny_config(options)
        for site in range(4):
            torch.manual_seed(site)  # the global generator must not matter
            model = Transformer(config, plan_run(config).placement.residents(site))
            for name, parameter in model.named_parameters():
                expected = reference[name]
                if ".experts." in name:
                    ids = model.get_submodule(name.rpartition(".")[0]).ids
                    expected = expected[list(ids)]
                assert torch.equal(parameter, expected), name


def test_initial_weights_depend_on_seed_layer_and_expert():
    models = [Transformer(tiny_config(seed=s), {0: EVERYTHING, 1: EVERYTHING}) for s in (0, 1)]
    matrices = [
        matrix.detach().flatten()[:100]
        for model in models
        for parameter in model.parameters()
        if parameter.ndim > 1
        for matrix in (parameter if parameter.ndim == 3 else [parameter])
    ]
    for left, right in combinations(matrices, 2):
        size = min(len(left), len(right))
        assert not torch.equal(left[:size], right[:size])


def test_initial_scale_is_the_one_asked_for():
    model = Transformer(tiny_config(model__d_model=64, model__num_layers=2), {0: (3,), 1: (3,)})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        into_residual = name.endswith(("down", "o_proj.weight"))
        std = 0.02 / math.sqrt(4) if into_residual else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.2), name


# ---------------------------------------------------------------------------------------- attention


def turned(vector: list[float], position: int, theta: float) -> list[float]:
    """Rotary positions as complex numbers: pairs (i, i + H/2) turn by position / theta^(2i/H)."""
    half = len(vector) // 2
    out = list(vector)
    for i in range(half):
        z = complex(vector[i], vector[i + half])
        angle = position / theta ** (2 * i / len(vector))
        z *= complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


def normed(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    return vector / (vector.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_attention(x_SD: Tensor, attention: Attention, config: Config) -> Tensor:
    """Position by position and head by head, in fp64."""
    model, size = config.model, config.model.head_size
    x_SD = x_SD.double()
    q, k, v = (
        x_SD @ getattr(attention, f"{name}_proj").weight.detach().double().T for name in "qkv"
    )
    if model.qk_norm == "full":
        q = normed(q, attention.q_norm.weight.detach().double(), model.norm_eps)
        k = normed(k, attention.k_norm.weight.detach().double(), model.norm_eps)
    rows = []
    for position in range(len(x_SD)):
        heads = []
        for head in range(model.num_heads):
            group = head // (model.num_heads // model.kv_heads)
            own = slice(head * size, (head + 1) * size)
            theirs = slice(group * size, (group + 1) * size)

            def ready(vector: Tensor, norm: str, at: int) -> Tensor:
                if model.qk_norm == "head":
                    weight = getattr(attention, norm).weight.detach().double()
                    vector = normed(vector, weight, model.norm_eps)
                turn = turned(vector.tolist(), at, model.rope_theta)
                return torch.tensor(turn, dtype=torch.float64)

            query = ready(q[position, own], "q_norm", position)
            scores = torch.stack(
                [query @ ready(k[j, theirs], "k_norm", j) for j in range(position + 1)]
            )
            share = (scores / math.sqrt(size)).softmax(0)
            heads.append(share @ v[: position + 1, theirs])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attention.o_proj.weight.detach().double().T


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, None), (4, 2, None), (4, 1, 6)])
def test_attention_is_the_reference(qk_norm, heads, kv_heads, head_dim):
    config = tiny_config(
        model__qk_norm=qk_norm,
        model__num_heads=heads,
        model__num_kv_heads=kv_heads,
        model__head_dim=head_dim,
        model__rope_theta=100.0,
    )
    attention = Transformer(config, {0: (), 1: ()}).layers[0].attention
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.2)
    x_SD = tokens(9)
    cos_SH, sin_SH = rotary_table(seq_len=9, head_size=config.model.head_size, theta=100.0)
    ours = attention(x_SD[None], cos_SH, sin_SH)[0]
    expected = reference_attention(x_SD, attention, config).float()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_grouped_queries_equal_repeated_key_value_heads():
    shapes = {"model.num_heads": 4, "model.qk_norm": "head"}
    grouped = Transformer(tiny_config(shapes, model__num_kv_heads=2), {0: (), 1: ()}).layers[0]
    single = Transformer(tiny_config(shapes), {0: (), 1: ()}).layers[0]
    state = grouped.attention.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
    single.attention.load_state_dict(state)
    cos_SH, sin_SH = rotary_table(seq_len=7, head_size=4, theta=10_000.0)
    x_BSD = tokens(14).view(2, 7, 16)
    left, right = (m.attention(x_BSD, cos_SH, sin_SH) for m in (grouped, single))
    torch.testing.assert_close(left, right)


def test_rotary_products_depend_on_the_distance_only():
    cos_SH, sin_SH = rotary_table(seq_len=20, head_size=8, theta=50.0)
    q, k = tokens(2, 8)
    turned_q, turned_k = (rotate(v.expand(20, 8), cos_SH, sin_SH) for v in (q, k))
    product = turned_q @ turned_k.T
    for distance in range(20):
        diagonal = product.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))
    assert (product[0, 1:] - product[0, 0]).abs().min() > 1e-4, "positions make no difference"


@pytest.mark.parametrize("at_least_one", [True, False])
def test_no_position_sees_a_later_one(at_least_one):
    config = tiny_config(router__at_least_one=at_least_one, model__init_std=0.3)
    model = Transformer(config, {0: (0, 1, 2), 1: (3, 4, 5)})
    batch = torch.randint(0, 31, (1, 16), generator=torch.Generator().manual_seed(0))

    def hidden(tokens_BS: Tensor) -> Tensor:
        x_BSD = model.embed(tokens_BS)
        for layer in range(2):
            x_BSD, _, _ = model.run_layer(layer, x_BSD)
        return model.logits(x_BSD)

    before = hidden(batch)
    for position in (1, 8, 15):
        changed = batch.clone()
        changed[0, position] = 31
        after = hidden(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- the whole model


def test_the_model_is_its_layers_in_pre_norm_order_and_the_loss_is_cross_entropy():
    config = tiny_config(model__num_dense_layers=1, model__dense_ffn_dim=20, model__init_std=0.2)
    model = Transformer(config, {1: EVERYTHING})
    batch = torch.randint(0, 32, (2, 17), generator=torch.Generator().manual_seed(0))
    x = model.embedding.weight[batch[:, :-1]]
    for index, layer in enumerate(model.layers):
        size = config.model.head_size
        table = rotary_table(seq_len=16, head_size=size, theta=config.model.rope_theta)
        normal = normed(x, layer.attention_norm.weight, config.model.norm_eps)
        x = x + layer.attention(normal, *table)
        normal = normed(x, layer.ffn_norm.weight, config.model.norm_eps)
        if index == 0:
            gate, up = (normal @ layer.ffn.gate_up.T).chunk(2, -1)
            assert gate.shape[-1] == 20
            x = x + (F.silu(gate) * up) @ layer.ffn.down.T
        else:
            flat = normal.flatten(0, 1)
            x = x + reference_moe(flat, layer.moe, EVERYTHING).view_as(x)
    logits = normed(x, model.final_norm.weight, config.model.norm_eps) @ model.head.weight.T
    chance = logits.softmax(-1).gather(-1, batch[:, 1:, None])
    loss = model(batch[:, :-1], batch[:, 1:]).loss
    torch.testing.assert_close(loss, -chance.log().mean(), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_matrix_that_both_ends_train():
    config = tiny_config(model__tie_embeddings=True)
    model = Transformer(config, {0: (0,), 1: (0,)})
    assert model.head is None
    x_BSD = tokens(4).view(1, 4, 16)
    expected = normed(x_BSD, model.final_norm.weight, 1e-5) @ model.embedding.weight.T
    torch.testing.assert_close(model.logits(x_BSD), expected)
    batch = torch.zeros(1, 16, dtype=torch.int64)
    model(batch, batch + 1).loss.backward()
    used = model.embedding.weight.grad.abs().sum(-1)
    assert (used > 0).all(), "as the head it gets a gradient for every token"


def test_a_dense_model_has_one_ffn_of_the_active_width_and_no_router():
    config = tiny_config(method="dense", model__shared_expert_ffn_dim=10)
    model = Transformer(config, {})
    assert all(layer.moe is None for layer in model.layers)
    assert {layer.ffn.down.shape[1] for layer in model.layers} == {2 * 12 + 10}
    batch = torch.zeros(1, 16, dtype=torch.int64)
    output = model(batch, batch)
    assert output.stats == output.routings == {}


@pytest.mark.parametrize(
    ("seq", "heads", "size"), [(1, 1, 4), (63, 3, 8), (130, 5, 16), (64, 2, 2)]
)
def test_attention_by_blocks_equals_torchs_own(seq, heads, size, monkeypatch):
    """Values and gradients, also where rows and heads do not fill the blocks."""
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 4 * 64 * seq * 2)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, seq, size, requires_grad=True) for _ in range(3)]
    twins = [t.detach().double().requires_grad_() for t in inputs]
    cos_SH, sin_SH = rotary_table(seq_len=seq, head_size=size, theta=1e4)
    own = attention.attend(*inputs, cos_SH, sin_SH)
    assert "Blocks" in str(own.grad_fn)
    angles = cos_SH.double(), sin_SH.double()
    q, k = (rotated(t, *angles) for t in twins[:2])
    expected = F.scaled_dot_product_attention(q, k, twins[2], is_causal=True)
    upstream = torch.randn_like(own)
    own.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(own, expected.float(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


def rotated(x: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotary positions by their definition: each pair (x_i, x_{i + H/2}) as a complex number."""
    left, right = x.chunk(2, dim=-1)
    half = left.shape[-1]
    turned = torch.complex(left, right) * torch.complex(cos_SH[:, :half], sin_SH[:, :half])
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_long_grouped_and_untrained_attention_is_torchs_own():
    q, k = torch.randn(1, 4, 9, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    long = torch.randn(1, 1, attention._LONGEST + 1, 2, requires_grad=True)
    for inputs in ((q, k, k), (long, long, long)):
        _, _, seq, size = inputs[0].shape
        angles = rotary_table(seq_len=seq, head_size=size, theta=1e4)
        assert "ScaledDotProduct" in str(attention.attend(*inputs, *angles).grad_fn)
    with torch.no_grad():
        angles = rotary_table(seq_len=9, head_size=8, theta=1e4)
        assert attention.attend(q, q, q, *angles).grad_fn is None
