"""What a grown net is made of: vanishing activations, bottlenecks, branches, grown and online layers, widths."""

from growshrink.layers.activations import Fading as Fading
from growshrink.layers.activations import VanishingReLU as VanishingReLU
from growshrink.layers.bottleneck import PureBottleneck as PureBottleneck
from growshrink.layers.branch import Branch as Branch
from growshrink.layers.equilibrium import ConvEquilibrium as ConvEquilibrium
from growshrink.layers.equilibrium import ImplicitReLU as ImplicitReLU
from growshrink.layers.equilibrium import equilibrium as equilibrium
from growshrink.layers.grown import GrownConv2d as GrownConv2d
from growshrink.layers.grown_linear import GrownLinear as GrownLinear
from growshrink.layers.online import merge_once as merge_once
from growshrink.layers.recompute import recompute as recompute
from growshrink.layers.swaps import attach as attach
from growshrink.layers.swaps import to_plain as to_plain
from growshrink.layers.widths import WidthSpace as WidthSpace
from growshrink.layers.widths import get_width as get_width
