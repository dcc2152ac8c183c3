"""What CLNP refuses, and why."""


class CLNPError(Exception):
    """Base of everything that :mod:`clnp` refuses; the message says what, where and what to do."""


class UnsupportedNetwork(CLNPError):
    """The network has a layer, or a use of one, for which zero forgetting can't be proved."""


class Incompatible(CLNPError):
    """Something beside the plugin (replay, DDP, torch.compile, ...) would break its promise."""


class CapacityExhausted(CLNPError):
    """No free unit is left in a layer without which a new task can't be learnt."""
