"""Affine convolutions as values, fixed points, and who reads what in a forward pass."""

from growshrink.algebra.contraction import contract as contract
from growshrink.algebra.contraction import operator_bound as operator_bound
from growshrink.algebra.convmap import ConvMap as ConvMap
from growshrink.algebra.convmap import compose as compose
from growshrink.algebra.solvers import Solution as Solution
from growshrink.algebra.solvers import Solver as Solver
