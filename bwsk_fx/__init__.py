"""bwsk-fx: label what operators preserve or erase, and rebuild activations in the backward pass."""

from bwsk_fx.capture import capture

__all__ = ["capture"]
