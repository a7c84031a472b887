"""Which keys must go so that the rest fits: a pure function of the books."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TypeVar

from proteus_pipeline.eviction.policies import Policy

K = TypeVar("K", bound=Hashable)


def to_evict(
    policy: Policy[K], total: int, limit: int, *, time: float, protected: Collection[K] = frozenset()
) -> list[K]:
    """Return the keys to evict, in the order to evict them: what has expired, and then no more than is needed.

    What is left fits into the limit, or only protected keys are left. The books stay as they are: whoever carries an
    eviction out tells the policy, by `Policy.evicted`.

    Parameters
    ----------
    policy
        The books.
    total
        Bytes that count against the limit now; what is about to be added, or still being freed, may be among them.
    limit
        Bytes that there may be.
    time
        Now, on the policy's clock.
    protected
        Keys that are in use and may not go, expired or not; those the policy does not know are passed over.

    >>> from proteus_pipeline.eviction.policies import make_policy
    >>> policy = make_policy("fifo")
    >>> for second, key in enumerate("abcd"):
    ...     policy.added(key, size=10, cost=1.0, time=second)
    >>> to_evict(policy, total=40, limit=25, time=4.0, protected={"a"})
    ['b', 'c']

    """
    held = frozenset(protected)
    chosen = {key: None for key in policy.expired(time) if key not in held}
    total -= sum(policy.size(key) for key in chosen)
    if total > limit:
        for key in policy.order():
            if key not in held and key not in chosen:
                chosen[key] = None
                total -= policy.size(key)
                if total <= limit:
                    break
    return list(chosen)
