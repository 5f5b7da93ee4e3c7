"""What a vector takes on its way between sites: bits per element, blocks and bytes (no torch).

A codec with scales cuts a vector into blocks of `BLOCK` elements, the last of which may be shorter;
each is a bf16 scale followed by its codes. `fomoe.sync.codec` encodes and decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK = 128  # elements
SCALE_BYTES = 2


@dataclass(frozen=True)
class Codec:
    """One way to encode fp32 values.

    Attributes:
        bits: of one element's code.
        scaled: whether codes are whole numbers times the scale of their block.
    """

    bits: int
    scaled: bool = False

    @property
    def lossy(self) -> bool:
        """Whether decoded values differ from those encoded, so that the rest is kept."""
        return self.bits < 32

    @property
    def mean_bits(self) -> float:
        """Bits per element of a long vector, scales included."""
        return self.bits + (8 * SCALE_BYTES / BLOCK if self.scaled else 0)

    def num_bytes(self, numel: Any) -> Any:
        """Bytes of an encoded vector; `numel` is an integer, or an array of them."""
        scales = SCALE_BYTES * -(-numel // BLOCK) if self.scaled else 0
        return -(-numel * self.bits // 8) + scales


CODECS = {
    "fp32": Codec(32),
    "bf16": Codec(16),
    "int8": Codec(8, scaled=True),
    "int4": Codec(4, scaled=True),
}
FP32 = CODECS["fp32"]
