"""FoMoE: pre-train one Mixture-of-Experts model across sites that each hold only some experts.

What a notebook needs stands here and is imported at its first use, so that `import fomoe` is fast:

    config = fomoe.load_config("quickstart", ["run.dir=runs/notebook"])
    fomoe.plan(config).payload_per_round(0)
    summary = fomoe.train(config)
    fomoe.merge(Path("runs/notebook"))
    fomoe.project(fomoe.Ask(model="deepseek-v3", sites=8))["days"]
"""

from importlib import import_module

__version__ = "0.1.0"

# Name: where it is. The types stand in __init__.pyi, which a test compares with this table.
_OFFERED = {
    "load_config": "fomoe.load:load_config",
    "plan": "fomoe.planning:plan_run",
    "train": "fomoe.training:train",
    "merge": "fomoe.merging:merge",
    "export": "fomoe.exporting:export",
    "project": "fomoe_sim.project:project",
    "Ask": "fomoe_sim.options:Ask",
}


def __getattr__(name):
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _OFFERED[name].partition(":")
    return getattr(import_module(module), own)


def __dir__():
    return sorted([*globals(), *_OFFERED])
