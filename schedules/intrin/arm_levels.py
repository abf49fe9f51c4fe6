"""The levels of AArch64, best first: the order in which a library tries them at load."""

from __future__ import annotations

from llamac.schedules.intrin.arm import ArmDotprod, ArmI8mm, ArmNeon
from llamac.schedules.intrin.arm_scalable import ArmSme, ArmSve

ARM_LEVELS: tuple[ArmNeon, ...] = (ArmSme(), ArmSve(), ArmI8mm(), ArmDotprod(), ArmNeon())
