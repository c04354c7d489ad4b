"""Invocation policies under their public name: `vismem.invocation.Random`, `vismem.invocation.Forced`, ..."""

from vismem.decoding.policies import After, Forced, Learned, Off, Only, Policy, Random

__all__ = ["After", "Forced", "Learned", "Off", "Only", "Policy", "Random"]
