"""How ranks go through a model that they share: the first leads, and the others do what it tells them."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from step35_trt.errors import RankLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.runtime.programs.ranks import Ranks
    from step35_trt.runtime.session import Ids

T = TypeVar("T")


class Order(Protocol):
    """What all ranks are to do."""

    def encoded(self) -> Ids:
        """As one vector."""
        ...


def lead(ranks: Ranks | None, order: Order, work: Callable[[], T]) -> T:
    """Rank 0: have all others do what `work` does here.

    Args:
        ranks: The others; None where there are none.
        order: What followers are told. They cannot refuse it: whatever may, has to be asked before.
        work: Done in the same way by all.
    """
    if ranks is None:
        return work()
    with ranks.working():
        ranks.tell(order.encoded())
        return work()


def follow(ranks: Ranks, obey: Callable[[Ids], object]) -> NoReturn:
    """What all ranks but the first do: what they are told until there is no more.

    Args:
        ranks: The others.
        obey: Takes an order as it was encoded.

    Raises:
        RankLostError: a rank ended, and it is for this one to say so.
        SystemExit: the work is done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's processes rank 0 decides
    try:
        while (order := ranks.hear()) is not None:
            with ranks.working():
                obey(order)
        ranks.part()
    except RankLostError as error:
        if ranks.speaks:
            raise
        sys.exit(error.exit_code)
    sys.exit(0)
