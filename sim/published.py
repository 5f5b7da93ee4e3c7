"""Figures that others published or measured, as data: what `fomoe validate` is held to.

Nothing here is computed and nothing is tuned. A model without printed figures stands in the same
table and is predicted. Bandwidths are Gbit/s, printed rounded to two and then to one decimal.
"""

from __future__ import annotations

from dataclasses import dataclass

UTILISATIONS = (0.50, 0.80, 0.90, 0.95, 0.99)

Row = tuple[float, ...]  # one figure per entry of UTILISATIONS


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as the bandwidth tables describe it: nominal size, equal layers."""

    name: str
    params: float
    num_layers: int
    step_time_s: float


@dataclass(frozen=True, kw_only=True)
class BandwidthTable:
    """Bandwidths that reach the UTILISATIONS, per model and method.

    Attributes:
        name, source: of the table.
        bits: per parameter on the wire.
        num_sites: replicas, M.
        factor: the one factor on bits / (bandwidth x step time) that fits the printed cells best.
        methods: row names, in the table's order.
        models: models that the table has, printed here or not.
        printed: model -> method -> Gbit/s.
    """

    name: str
    source: str
    bits: int
    num_sites: int
    factor: float
    methods: tuple[str, ...]
    models: tuple[Model, ...]
    printed: dict[str, dict[str, Row]]


MODEL_1B = Model(name="1B", params=1e9, num_layers=24, step_time_s=0.1)
MODEL_10B = Model(name="10B", params=10e9, num_layers=48, step_time_s=0.8)
MODEL_100B = Model(name="100B", params=100e9, num_layers=108, step_time_s=4.9)
LLAMA3_405B = Model(name="llama3-405b", params=405e9, num_layers=126, step_time_s=26.0)
DEEPSEEK_V3 = Model(name="deepseek-v3", params=671e9, num_layers=61, step_time_s=20.0)

STREAMING_LOCAL_STEPS = 100
LAYERS_PER_FRAGMENT = 3

STREAMING_DILOCO = BandwidthTable(
    name="streaming-diloco-4",
    source="Streaming DiLoCo, arXiv 2501.18512, table 4",
    bits=16,
    num_sites=2,
    factor=5 / 6,
    methods=(
        "data-parallel",
        "diloco",
        "streaming",
        "streaming-overlapped",
        "streaming-overlapped-fp4",
    ),
    models=(MODEL_1B, MODEL_10B, MODEL_100B),
    printed={
        "1B": {
            "data-parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
            "diloco": (1.4, 6.2, 13.3, 23.3, 86.8),
            "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
            "streaming-overlapped": (1.4, 4.3, 6.2, 9.1, 11.0),
            "streaming-overlapped-fp4": (0.4, 0.9, 1.7, 2.0, 3.0),
        },
        "10B": {
            "data-parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
            "diloco": (1.7, 7.5, 16.0, 33.9, 104.8),
            "streaming": (1.7, 5.2, 9.1, 13.3, 19.3),
            "streaming-overlapped": (1.7, 3.6, 5.2, 6.2, 7.5),
            "streaming-overlapped-fp4": (0.4, 0.9, 1.4, 1.4, 1.7),
        },
    },
)

SCALING_LAWS = BandwidthTable(
    name="scaling-laws-6",
    source="Scaling Laws for DiLoCo, arXiv 2503.09799, table 6",
    bits=16,
    num_sites=2,
    factor=0.76,
    methods=("H=1", "H=10", "H=50", "H=100", "H=300"),
    models=(MODEL_10B, LLAMA3_405B, DEEPSEEK_V3),
    printed={
        "10B": {
            "H=1": (104.8, 184.2, 222.3, 222.3, 390.7),
            "H=10": (16.0, 49.4, 86.8, 152.6, 222.3),
            "H=50": (3.0, 11.0, 23.3, 41.0, 126.5),
            "H=100": (1.4, 6.2, 13.3, 23.3, 86.8),
            "H=300": (0.5, 2.0, 4.3, 9.1, 41.0),
        },
        "llama3-405b": {
            "H=1": (126.5, 222.3, 268.3, 323.8, 323.8),
            "H=10": (19.3, 72.0, 126.5, 184.2, 268.3),
            "H=50": (3.6, 13.3, 28.1, 59.6, 184.2),
            "H=100": (2.0, 7.5, 16.0, 33.9, 126.5),
            "H=300": (0.7, 3.0, 6.2, 13.3, 59.6),
        },
    },
)

# Impossible: these bandwidths are below the conservation floor of their own utilisation.
EAGER_UPDATES = BandwidthTable(
    name="eager-updates-5",
    source="Eager updates, arXiv 2502.12996, table 5, 1-outer-step with FP4, H = 100",
    bits=4,
    num_sites=2,
    factor=5 / 6,
    methods=("1-outer-step-fp4",),
    models=(MODEL_1B, MODEL_10B, MODEL_100B),
    printed={
        "1B": {"1-outer-step-fp4": (0.1, 0.2, 0.2, 0.2, 0.2)},
        "10B": {"1-outer-step-fp4": (0.1, 0.2, 0.2, 0.3, 0.3)},
        "100B": {"1-outer-step-fp4": (0.2, 0.3, 0.3, 0.3, 0.4)},
    },
)
EAGER_LOCAL_STEPS = 100


# ---------------------------------------------------------------------------------------- measured


@dataclass(frozen=True, kw_only=True)
class MeasuredLinks:
    """Utilisation measured over shaped TCP links (diloco-measured): percent per H and bandwidth."""

    source: str = "diloco-measured, shaped TCP links"
    num_sites: int = 4
    params: int = 30_846_720
    bits: int = 32
    step_time_s: float = 0.0253
    bandwidth_bps: tuple[float, ...] = (50e6, 200e6, 1e9, 5e9)
    # Calibrated: the link carries 1.15 ring volumes, and every sync costs 0.07 s beside them.
    wire_factor: float = 1.15
    sync_fixed_s: float = 0.07


MEASURED_LINKS = MeasuredLinks()
MEASURED_PERCENT: dict[int, tuple[float, ...]] = {
    1: (0.07, 0.32, 1.74, 7.76),
    8: (0.54, 2.46, 12.2, 39.5),
    32: (2.30, 9.62, 35.6, 67.6),
}

INTELLECT_SOURCE = "INTELLECT-1 technical report (10B, int8, 38 min inner phase)"
INTELLECT_INNER_S = 38 * 60
INTELLECT_PERCENT = {103: 95.7, 382: 85.6}  # time of a sync, s -> utilisation, percent


# ----------------------------------------------------------------------- activations, time, money


@dataclass(frozen=True, kw_only=True)
class ActivationModel:
    """A model of arXiv 2205.05198: sizes of the network, micro-batch and parallelism."""

    name: str
    hidden: int
    heads: int
    num_layers: int
    batch: int
    sequence: int = 2048
    tensor_parallel: int = 8
    pipeline_parallel: int = 1
    interleave: int = 1
    baseline_gib: float
    selective_gib: float


ACTIVATION_SOURCE = "Reducing activation recomputation, arXiv 2205.05198"
ACTIVATION_MODELS = (
    ActivationModel(
        name="22B",
        hidden=6144,
        heads=64,
        num_layers=48,
        batch=4,
        baseline_gib=59.25,
        selective_gib=9.5625,
    ),
    ActivationModel(
        name="175B",
        hidden=12288,
        heads=96,
        num_layers=96,
        batch=1,
        pipeline_parallel=8,
        interleave=3,
        baseline_gib=66.84,
        selective_gib=12.35,
    ),
)

DEEPSEEK_SOURCE = "DeepSeek-V3 technical report, arXiv 2412.19437"
DEEPSEEK_GPU_HOURS = 2.788e6
DEEPSEEK_PRICE_PER_HOUR = 2.0
DEEPSEEK_MILLION_DOLLARS = 5.576
DEEPSEEK_HOURS_PER_TRILLION_TOKENS = 180e3
DEEPSEEK_GPUS = 2048
DEEPSEEK_DAYS_PER_TRILLION_TOKENS = 3.66
