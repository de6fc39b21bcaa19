"""The networks: attention, transformer, the ECLIPSE prior, the diffusion baseline."""
