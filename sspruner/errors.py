"""Errors and remarks that a user can meet. Messages are one line with place, problem and remedy."""


def install(extra: str) -> str:
    """Return how to install an optional part of sspruner."""
    return f"in a clone of sspruner, pip install '.[{extra}]'"


class Remark(UserWarning):
    """What a user should know of a result that is right as far as it goes. The command line prints it as one line."""


class SSPrunerError(Exception):
    """Root of all errors that the user can fix. The command line prints them without a traceback."""

    exit_code = 2


class InputError(SSPrunerError):
    """A wrong argument: a path, a text, a number out of range."""


class AlreadyMet(InputError):
    """Limits that the dense model is within: nothing has to be removed. The command line ends with success."""

    exit_code = 0


class ModelError(SSPrunerError):
    """A model that cannot be read, or that sspruner cannot prune."""


class PlanError(SSPrunerError):
    """A plan that is malformed, impossible, or made for another model."""


class PluginError(SSPrunerError):
    """A plugin that cannot be imported or that breaks its contract."""


class ProofError(SSPrunerError):
    """A cut that differs from its plan's prediction. Never the user's fault; nothing is written."""

    exit_code = 1


class ProcessError(SSPrunerError):
    """Another process of this run has ended, so this one cannot go on."""

    exit_code = 1
