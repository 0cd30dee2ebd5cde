"""The errors that reach a user: one sentence with what was wrong, the offending value and what to do.

The command line prints the sentence and exits with 2; a server answers 4xx with the same sentence.
"""


class FoveateError(Exception):
    """Base of every error that foveate raises on purpose."""


class InputError(FoveateError, ValueError):
    """The caller's image, box, mask, label, file or option is wrong."""


class CheckpointError(FoveateError, RuntimeError):
    """A checkpoint is missing, truncated, corrupt, of another layout, or gives non-finite numbers."""


class RecipeError(FoveateError, ValueError):
    """A recipe has an unknown key, a wrong type, or settings that cannot be combined."""
