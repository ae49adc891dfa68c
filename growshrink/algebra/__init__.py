"""Affine convolutions as values, and who reads what in a forward pass."""

from growshrink.algebra.convmap import ConvMap as ConvMap
from growshrink.algebra.convmap import compose as compose
