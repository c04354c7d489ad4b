"""Invocation policies under their public name: `vismem.invocation.Random`, `vismem.invocation.Forced`, ..."""

from vismem.decoding.invocation import Forced, Learned, Off, Only, Policy, Random

__all__ = ["Forced", "Learned", "Off", "Only", "Policy", "Random"]
