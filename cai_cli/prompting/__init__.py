"""Every request text that is sent to a model, one module a kind of prompt."""
