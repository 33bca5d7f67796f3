"""What a model will weigh, before any weight is read."""

from tersor.planning.sizes import Plan, Size, machine_ram, parse_bytes, plan

__all__ = ["Plan", "Size", "machine_ram", "parse_bytes", "plan"]
