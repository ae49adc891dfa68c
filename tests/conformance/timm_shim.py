"""What TORCH_BACKEND names when timm's own tests run: timm imports it before it lists the models to test."""

import timm.models._registry as registry

import growshrink.models  # noqa: F401  (importing registers)

# Three of timm's tests take their models from a fixed list of timm's modules; one of those has to lend its name.
for family in ("reducenet", "vanillanet", "deq"):
    registry._module_to_models["byobnet"] |= registry._module_to_models[family]
