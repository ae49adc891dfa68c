"""The project's own timm models. Importing this package registers them."""

from growshrink.models.reducenet import ReduceNet as ReduceNet
