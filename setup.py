"""Package metadata. Tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="fomoe",
    version="0.1.0",
    description="Federated Mixture-of-Experts pre-training: each site holds only some experts",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fomoe", "fomoe.*"]), "fomoe_sim"],
    package_dir={"fomoe_sim": "sim"},
    package_data={"fomoe_sim": ["data/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26,<3",
        "pyyaml>=6,<7",
        "pydantic>=2.7,<3",
        "rich>=13,<16",
        "safetensors>=0.4.5,<1",
        "tokenizers>=0.20,<1",
        "wandb>=0.18,<1",
    ],
    extras_require={
        # Hub data sets by name (brings pyarrow).
        "hub": ["datasets>=3,<6"],
        # `fomoe generate`, and tokenizers given as a transformers name or folder.
        "transformers": ["transformers>=4.57,<6"],
        # Adapters exported for peft (docs/prelort.md), which brings transformers.
        "peft": ["peft>=0.17,<1"],
        # Downstream tasks on an exported model (docs/export.md).
        "eval": ["lm-eval[hf]>=0.4.9,<1"],
        # Optional expert backend; builds from source and needs CUDA.
        "megablocks": ["megablocks>=0.10,<0.11"],
        "dev": [
            "datasets>=3,<6",
            "peft>=0.17,<1",
            "transformers>=4.57,<6",
            "pytest>=8,<10",
            "ruff>=0.8,<1",
            "mypy>=1.13,<3",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fomoe=fomoe.cli:run"]},
)
