"""Package metadata. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fomoe/__init__.py").read_text())[1]

HUB = ["datasets>=3,<6"]
TRANSFORMERS = ["transformers>=4.57,<6"]
PEFT = ["peft>=0.17,<1"]
ROUGE = ["rouge-score>=0.1.2,<1"]
PLOT = ["matplotlib>=3.8,<4"]
WANDB = ["wandb>=0.20,<1"]
TENSORBOARD = ["tensorboard>=2.16,<3"]

setup(
    name="fomoe",
    version=VERSION,
    description="Federated Mixture-of-Experts pre-training: each site holds only some experts",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["mixture of experts", "federated learning", "distributed training", "DiLoCo"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["fomoe", "fomoe.*"]), "fomoe.configs", "fomoe_sim"],
    package_dir={"fomoe.configs": "configs", "fomoe_sim": "sim"},
    package_data={
        "fomoe": ["py.typed", "*.pyi"],
        "fomoe.configs": ["*.yaml", "clusters/*.yaml", "study/*.yaml"],
        "fomoe_sim": ["py.typed", "data/*.yaml"],
    },
    install_requires=[
        "torch>=2.11,<2.15",
        "numpy>=1.26,<3",
        "pyyaml>=6,<7",
        "pydantic>=2.7,<3",
        "rich>=13,<16",
        "safetensors>=0.4.5,<1",
        "tokenizers>=0.20,<1",
    ],
    extras_require={
        # Hub data sets by name (brings pyarrow).
        "hub": HUB,
        # `fomoe generate`, and tokenizers given as a transformers name or folder.
        "transformers": TRANSFORMERS,
        # Adapters exported for peft (docs/prelort.md), which brings transformers.
        "peft": PEFT,
        # Downstream tasks on an exported model (docs/export.md).
        "eval": ["lm-eval[hf]>=0.4.9,<1"],
        # fomoe eval --metrics rouge-l.
        "rouge": ROUGE,
        # Figures: fomoe report, fomoe project --plot.
        "plot": PLOT,
        # Records beside metrics.jsonl: run.wandb, run.tensorboard.
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        # Optional expert backend; builds from source and needs CUDA.
        "megablocks": ["megablocks>=0.10,<0.11"],
        "dev": [
            *HUB,
            *TRANSFORMERS,
            *PEFT,
            *ROUGE,
            *PLOT,
            *TENSORBOARD,
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.8,<1",
            "mypy>=1.13,<3",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fomoe=fomoe.cli:run"]},
)
