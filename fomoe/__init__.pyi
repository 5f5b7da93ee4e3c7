from fomoe.exporting import export as export
from fomoe.load import load_config as load_config
from fomoe.merging import merge as merge
from fomoe.planning import plan_run as plan
from fomoe.training import train as train
from fomoe_sim.options import Ask as Ask
from fomoe_sim.project import project as project

__version__: str
__all__ = ["Ask", "export", "load_config", "merge", "plan", "project", "train"]
