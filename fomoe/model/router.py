"""Routing with absent experts: every token chooses among all experts, absent choices are skipped.

Masking comes after top-k, so a token whose chosen expert is absent spends nothing and passes
through the residual stream; masking before top-k (`route_scope: resident`) is the baseline.

Shapes: T tokens, E all experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fomoe.config import RouterConfig
from fomoe.model.matmul import linear


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What each token will execute.

    Attributes:
        expert_TK: int64 expert ids, after any replacement by `at_least_one`.
        gate_TK: fp32 weights of the outputs; 0 where the assignment is skipped.
        executed_TK: bool, whether the expert is resident.
        selected_TK: int64 the original choice, in descending order of preference.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    executed_TK: Tensor
    selected_TK: Tensor


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Sums and losses of one layer and batch; tensors, so that nothing waits for the device.

    Attributes:
        selected_E: assignments per expert by the original choice, skipped ones included.
        executed_E: assignments per expert that ran.
        skipped: assignments of the original choice whose expert is absent.
        unserved: tokens none of whose assignments ran.
        entropy: mean entropy of the normalised scores, in nats.
        mean_E: mean normalised score of each expert.
        lb_loss, z_loss: the two router losses, without their coefficients.
    """

    selected_E: Tensor
    executed_E: Tensor
    skipped: Tensor
    unserved: Tensor
    entropy: Tensor
    mean_E: Tensor
    lb_loss: Tensor
    z_loss: Tensor


class Router(nn.Module):
    """Scores all experts in fp32 and decides what each token executes.

    Args:
        d_model: width D.
        num_experts: all experts E, resident or not.
        top_k: experts chosen per token.
        options: the router section of the config.
        matmul: model.matmul.
    """

    balance_bias_E: Tensor
    execute_bias: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        top_k: int,
        options: RouterConfig,
        matmul: str = "auto",
    ) -> None:
        super().__init__()
        self.top_k, self.options, self.matmul = top_k, options, matmul
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # They affect the choice only, never the gate. The balance bias is equal at all sites.
        self.register_buffer("balance_bias_E", torch.zeros(num_experts), persistent=False)
        self.register_buffer("execute_bias", torch.zeros(()), persistent=False)

    def forward(
        self,
        x_TD: Tensor,
        resident_E: Tensor,
        num_resident: int,
        scope_TE: Tensor | None = None,
        weight_ED: Tensor | None = None,
    ) -> tuple[Routing, RouterStats]:
        """Route T tokens of width D.

        Args:
            resident_E: bool mask with `num_resident` ones.
            scope_TE: bool, the experts that each token may choose; None: those that the config's
                `route_scope` says.
            weight_ED: used instead of the router's own rows.
        """
        options = self.options
        num_experts = resident_E.numel()
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            weight_ED = self.weight if weight_ED is None else weight_ED
            logits_TE = linear(x_TD.float(), weight_ED.float(), self.matmul)
            if scope_TE is None and options.route_scope == "resident":
                scope_TE = resident_E if num_resident < num_experts else None
            if scope_TE is not None:
                # A finite value, so that its product with probability 0 is 0.
                lowest = torch.finfo(logits_TE.dtype).min
                logits_TE = logits_TE.masked_fill(~scope_TE, lowest)
            scores_TE = score_experts(logits_TE=logits_TE, score=options.score)
            preference_TE = scores_TE.detach()
            if options.balance != "loss":
                preference_TE = preference_TE + self.balance_bias_E
            if options.execute_target is not None and num_resident < num_experts:
                preference_TE = preference_TE + self.execute_bias * resident_E
            if scope_TE is not None:
                preference_TE = preference_TE.masked_fill(~scope_TE, -torch.inf)
            routing = choose_experts(
                scores_TE=scores_TE,
                preference_TE=preference_TE,
                resident_E=resident_E,
                num_resident=num_resident,
                top_k=self.top_k,
                gate_norm=options.gate_norm,
                at_least_one=options.at_least_one,
                skip_scale="none" if options.route_scope == "resident" else options.skip_scale,
            )
            stats = router_stats(
                routing=routing,
                logits_TE=logits_TE,
                scores_TE=scores_TE,
                score=options.score,
                resident_E=resident_E,
            )
        return routing, stats


def score_experts(*, logits_TE: Tensor, score: str) -> Tensor:
    """Scores of all experts: one softmax, or a sigmoid for each (DeepSeek-V3, 2412.19437)."""
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


def choose_experts(
    *,
    scores_TE: Tensor,
    preference_TE: Tensor,
    resident_E: Tensor,
    num_resident: int,
    top_k: int,
    gate_norm: str,
    at_least_one: bool,
    skip_scale: str,
) -> Routing:
    """Top-k over all experts, then skipping, then gates.

    Args:
        scores_TE: differentiable scores, from which gates are taken.
        preference_TE: scores with selection biases, from which the choice is made.
        resident_E: bool mask of the resident experts, `num_resident` of them.
    """
    num_experts = scores_TE.shape[-1]
    selected_TK = preference_TE.topk(top_k, dim=-1).indices
    expert_TK = selected_TK
    if num_resident == num_experts:
        executed_TK = torch.ones_like(selected_TK, dtype=torch.bool)
    else:
        if at_least_one and num_resident:
            unserved_T = ~resident_E[selected_TK].any(-1)
            best_T = preference_TE.masked_fill(~resident_E, -torch.inf).argmax(-1)
            lowest_T = torch.where(unserved_T, best_T, selected_TK[:, -1])
            expert_TK = torch.cat([selected_TK[:, :-1], lowest_T[:, None]], dim=-1)
        executed_TK = resident_E[expert_TK]
    gate_TK = scores_TE.gather(-1, expert_TK)
    if gate_norm == "selected":
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    if num_resident < num_experts:
        gate_TK = gate_TK * executed_TK
    if gate_norm == "survivors":  # these sum to 1: the scale has nothing to make up for
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    elif skip_scale == "inverse" and num_resident:
        gate_TK = gate_TK * (num_experts / num_resident)
    return Routing(
        expert_TK=expert_TK, gate_TK=gate_TK, executed_TK=executed_TK, selected_TK=selected_TK
    )


def router_stats(
    *, routing: Routing, logits_TE: Tensor, scores_TE: Tensor, score: str, resident_E: Tensor
) -> RouterStats:
    """Counts and losses of one layer; the balance loss counts original choices over all E."""
    num_experts = scores_TE.shape[-1]
    selected_E = torch.bincount(routing.selected_TK.flatten(), minlength=num_experts)
    executed_E = torch.bincount(
        routing.expert_TK.flatten(),
        weights=routing.executed_TK.flatten().float(),
        minlength=num_experts,
    ).long()
    log_sum_T = logits_TE.logsumexp(-1)
    if score == "softmax":
        probs_TE = scores_TE
        # -sum p log p with log p = logit - log_sum: no logarithm of every score.
        entropy = (
            log_sum_T.detach().mean() - (probs_TE.detach() * logits_TE.detach()).sum(-1).mean()
        )
    else:
        probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        entropy = torch.special.entr(probs_TE.detach()).sum(-1).mean()
    mean_E = probs_TE.mean(0)
    return RouterStats(
        selected_E=selected_E,
        executed_E=executed_E,
        skipped=(selected_E * ~resident_E).sum(),
        unserved=(~routing.executed_TK.any(-1)).sum(),
        entropy=entropy,
        mean_E=mean_E,
        lb_loss=load_balancing_loss(selected_E=selected_E, mean_E=mean_E),
        z_loss=router_z_loss(log_sum_T=log_sum_T),
    )


def load_balancing_loss(*, selected_E: Tensor, mean_E: Tensor) -> Tensor:
    """E x sum of (share of assignments x mean probability); 1 if balanced (2101.03961, eq. 4).

    Experts that cannot be chosen have probability 0 for every token and do not count in E. The
    shares may be those of more tokens than the probabilities: the mean over equal parts of a batch
    is then the loss of the whole batch.

    Args:
        selected_E: assignments per expert.
        mean_E: mean probability of each expert, with a graph.
    """
    share_E = selected_E / selected_E.sum()
    num_choosable = (mean_E.detach() > 0).sum()
    return num_choosable * (share_E * mean_E).sum()


def router_z_loss(*, log_sum_T: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the logits (2202.08906, eq. 5)."""
    return log_sum_T.square().mean()
