"""Exceptions raised by pnode.

Every error is a :class:`PnodeError`. Errors in the arguments are also ``ValueError``; errors of a
running solve are also ``RuntimeError`` and carry ``time``, ``step``, ``method`` and ``reason``, and
``rank`` where a solve of several processes failed on one of them.
"""

from pnode.base.errors import *  # noqa: F403
from pnode.base.errors import __all__ as __all__
