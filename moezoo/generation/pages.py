"""Allocation of the pages of a KV cache, with prefix sharing; on the host, without tensors.

A page has room for PAGE_SIZE tokens of a sequence. Prompts with the same beginning share its full
pages. A page is found by a digest of its tokens and all before them, also after its sequences have
finished, until its room is needed (Kwon et al., 2023, with the prefix cache of vLLM).
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

PAGE_SIZE = 64


def num_pages(num_tokens: int) -> int:
    """Return the number of pages that so many tokens take."""
    return -(-num_tokens // PAGE_SIZE)


@dataclass
class Allocation:
    """The pages of one sequence, in order; they hold its first `num_cached` tokens already."""

    pages: list[int]
    num_cached: int


class PageAllocator:
    """Hands out the pages 0 to total - 1; with `share`, sequences share those of a prefix."""

    def __init__(self, total: int, *, share: bool = True) -> None:
        self.total = total
        self.share = share
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and without a user, the least recently used first."""
        self._unwritten: set[int] = set()
        """Pages with a key whose tokens are not computed yet."""

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._unused)

    def allocate(self, prompt: Sequence[int], num_tokens: int) -> Allocation | None:
        """Allocate pages for a sequence of `num_tokens` that begins with `prompt`.

        At least one token of the prompt is left to compute, for its logits. Returns None where
        there is no room, and where shared pages are not computed yet: ask again after `written`.
        """
        keys = _page_keys(prompt) if self.share else []
        shared: list[int] = []
        for key in keys[: (len(prompt) - 1) // PAGE_SIZE]:
            page = self._page_of.get(key)
            if page is None:
                break
            if page in self._unwritten:
                return None
            shared.append(page)
        needed = num_pages(num_tokens) - len(shared)
        revived = sum(page in self._unused for page in shared)
        if needed > self.num_available - revived:
            return None
        for page in shared:
            self._users[page] += 1
            self._unused.pop(page, None)
        pages = shared + [self._take() for _ in range(needed)]
        for key, page in zip(keys[len(shared) :], pages[len(shared) :], strict=False):
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key
                self._unwritten.add(page)
        return Allocation(pages, len(shared) * PAGE_SIZE)

    def written(self, allocation: Allocation) -> None:
        """Mark the prompt's pages as computed: other sequences may share them from now on."""
        self._unwritten.difference_update(allocation.pages)

    def release(self, allocation: Allocation) -> None:
        """Give a sequence's pages back; those with computed prefixes can still be found."""
        for page in reversed(allocation.pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of and page not in self._unwritten:
                self._unused[page] = None
            else:
                self._forget(page)
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def _forget(self, page: int) -> None:
        self._unwritten.discard(page)
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]


def _page_keys(prompt: Sequence[int]) -> list[bytes]:
    """Return a digest for each full page of the prompt: of its tokens and all before them."""
    keys = []
    key = b""
    for start in range(0, len(prompt) - PAGE_SIZE + 1, PAGE_SIZE):
        key = sha256(key + array("q", prompt[start : start + PAGE_SIZE]).tobytes()).digest()
        keys.append(key)
    return keys
