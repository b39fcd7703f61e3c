"""A server of many adapters over one model."""
