"""Target plug-ins: one class per processor, one TOML file per SoC."""
