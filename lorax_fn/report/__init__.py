"""What people read: tables of a model and its adapters."""
