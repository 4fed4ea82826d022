"""The decorators of the Functions Framework for Python, for Functions that use them and do not bring the framework.

They mark nothing: which function is called, and how, the Function's handler and signature say."""


def http(function):
    """Decorates a function that takes a Flask request."""
    return function


def cloud_event(function):
    """Decorates a function that takes a CloudEvent."""
    return function
