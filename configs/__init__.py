"""Configuration: what the user asks for, as plain dataclasses. Imports neither torch nor Hydra.

Read next: `schema` (every key, with its meaning and default), then `load` (YAML and overrides to `Config`).
"""
