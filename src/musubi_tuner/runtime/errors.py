"""The one exception that is meant for the person at the screen."""


class UserError(ValueError):
    """Something that the user can fix: the text names the file, the value, the rule and the remedy."""
