"""The process that owns the store: what it does (engine), how it is asked (app), how it lives (daemon)."""
