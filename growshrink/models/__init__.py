"""The project's own timm models. Importing this package registers them."""

from growshrink.models.deq import EquilibriumNet as EquilibriumNet
from growshrink.models.reducenet import ReduceNet as ReduceNet
from growshrink.models.vanillanet import VanillaNet as VanillaNet
