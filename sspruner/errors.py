"""The errors a user can meet: one root, few leaves, each a single line that says where, what, and what to do."""


class SSPrunerError(Exception):
    """Root of every error that is the user's to fix. The command line prints it without a traceback."""

    exit_code = 2


class InputError(SSPrunerError):
    """A wrong argument: a path, a text, a number out of range."""


class ModelError(SSPrunerError):
    """A model that cannot be read or that sspruner cannot prune."""


class PlanError(SSPrunerError):
    """A plan that is malformed, impossible, or made for another model."""


class PluginError(SSPrunerError):
    """A plugin that cannot be imported or that breaks its contract."""


class ProofError(SSPrunerError):
    """A cut that did not do what its plan predicts. Never the user's fault; nothing is written."""

    exit_code = 1


class ProcessError(SSPrunerError):
    """Another process of this run is gone, so that this one cannot go on."""

    exit_code = 1
