"""FoMoE: pre-train one Mixture-of-Experts model across sites that each hold only some experts."""

__version__ = "0.1.0"
