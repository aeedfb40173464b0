"""Bookkeeping of pages: what is shared, what is kept, and that no page is in two places."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moezoo.generation.pages import PAGE_SIZE, Allocation, PageAllocator, num_pages


def tokens(num_tokens, seed=0):
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(num_tokens)]


def allocate(pages, prompt, num_tokens):
    """An allocation whose prompt is computed at once."""
    allocation = pages.allocate(prompt, num_tokens)
    assert allocation is not None
    pages.written(allocation)
    return allocation


def state(pages):
    return (
        sorted(pages._free),
        list(pages._unused),
        list(pages._users),
        dict(pages._page_of),
        dict(pages._key_of),
        set(pages._unwritten),
    )


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 200])
def test_a_repeated_prompt_shares_its_full_pages_but_never_all_of_it(length):
    pages = PageAllocator(20)
    prompt = tokens(length)
    first = allocate(pages, prompt, length + 10)
    second = pages.allocate(prompt, length + 10)
    shared = (length - 1) // PAGE_SIZE
    assert first.num_cached == 0
    assert second.num_cached == shared * PAGE_SIZE < length
    assert second.pages[:shared] == first.pages[:shared]
    assert not set(second.pages[shared:]) & set(first.pages)
    assert len(first.pages) == len(second.pages) == num_pages(length + 10)


def test_only_what_begins_alike_is_shared():
    pages = PageAllocator(40)
    prompt = tokens(200)
    first = allocate(pages, prompt, 200)
    other_page = [*prompt[:64], -1, *prompt[65:]]
    assert pages.allocate(other_page, 200).pages[0] == first.pages[0]
    assert pages.allocate([-1, *prompt[1:]], 200).num_cached == 0
    assert pages.allocate(prompt[64:], 136).num_cached == 0, "the same tokens after others"
    longer = pages.allocate([*prompt, *tokens(100, seed=1)], 300)
    assert longer.num_cached == 192
    assert longer.pages[:3] == first.pages[:3]


def test_without_sharing_every_page_is_one_sequence_s():
    pages = PageAllocator(4, share=False)
    first = allocate(pages, tokens(100), 100)
    second = allocate(pages, tokens(100), 100)
    assert (first.num_cached, second.num_cached) == (0, 0)
    assert sorted(first.pages + second.pages) == [0, 1, 2, 3]
    pages.release(first)
    assert pages.num_available == 2


def test_pages_come_back_when_the_last_user_is_done():
    pages = PageAllocator(6)
    first = allocate(pages, tokens(129), 129)
    second = allocate(pages, tokens(129), 129)
    assert pages.num_available == 6 - 4
    pages.release(first)
    assert pages.num_available == 6 - 3
    assert pages.allocate(tokens(200, seed=1), 200) is None, "two shared pages are in use"
    pages.release(second)
    assert pages.num_available == 6
    assert allocate(pages, tokens(129), 129).num_cached == 128, "remembered after both"


def test_the_longest_unused_pages_go_first_and_later_pages_before_earlier_ones():
    pages = PageAllocator(6)
    old, new = tokens(150, seed=1), tokens(150, seed=2)
    for prompt in (old, new):
        pages.release(allocate(pages, prompt, 150))
    pages.release(allocate(pages, old[:70], 70))  # the first page of `old` is used once more
    pages.release(allocate(pages, tokens(180, seed=3), 180))
    # two free pages, and the second page of `old`, gave way
    assert pages.allocate(new, 150).num_cached == 128
    assert pages.allocate(old, 150).num_cached == 64


def test_pages_that_are_being_written_are_waited_for():
    pages = PageAllocator(10)
    prompt = tokens(100)
    first = pages.allocate(prompt, 100)
    before = state(pages)
    assert pages.allocate(prompt, 100) is None
    assert state(pages) == before
    assert pages.allocate(tokens(100, seed=1), 100) is not None, "another prompt need not wait"
    pages.written(first)
    assert pages.allocate(prompt, 100).num_cached == 64


def test_what_was_never_written_is_forgotten():
    pages = PageAllocator(10)
    written = allocate(pages, tokens(70), 70)
    longer = tokens(70) + tokens(100, seed=1)
    unwritten = pages.allocate(longer, 170)
    assert unwritten.num_cached == 64
    pages.release(unwritten)
    assert pages.num_available == 10 - 2
    again = pages.allocate(longer, 170)
    assert again.num_cached == 64, "of the written sequence only"
    pages.release(again)
    pages.release(written)
    assert sorted(pages._free + list(pages._unused)) == list(range(10))


def test_without_room_nothing_changes():
    pages = PageAllocator(5)
    kept = allocate(pages, tokens(150), 150)
    pages.release(allocate(pages, tokens(80, seed=1), 80))
    before = state(pages)
    assert pages.allocate(tokens(10, seed=2), 3 * PAGE_SIZE) is None
    # of two available pages one is the prompt's own: it cannot be evicted for the rest
    assert pages.allocate(tokens(80, seed=1), 4 * PAGE_SIZE) is None
    assert state(pages) == before
    assert pages.allocate(tokens(80, seed=1), 2 * PAGE_SIZE).num_cached == 64
    pages.release(kept)


class Sequences(RuleBasedStateMachine):
    """Sequences come, are computed and go in any order, many of them alike."""

    TOTAL = 12

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(self.TOTAL)
        self.running: list[tuple[Allocation, list[int]]] = []
        self.unwritten: list[Allocation] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """Of each page that was written: all tokens up to its end."""

    @rule(
        parts=st.lists(st.integers(0, 1), max_size=3),
        rest=st.integers(1, 65),
        more=st.integers(0, 100),
    )
    def begin(self, parts, rest, more):
        prompt = [part for part in parts for _ in range(PAGE_SIZE)] + [7] * rest
        available = self.pages.num_available
        before = state(self.pages)
        allocation = self.pages.allocate(prompt, len(prompt) + more)
        if allocation is None:
            assert state(self.pages) == before
            assert self.unwritten or num_pages(len(prompt) + more) > available
            return
        assert len(allocation.pages) == num_pages(len(prompt) + more)
        assert allocation.num_cached < len(prompt)
        num_shared = allocation.num_cached // PAGE_SIZE
        for i, page in enumerate(allocation.pages):
            if i < num_shared:
                assert self.content[page] == tuple(prompt[: (i + 1) * PAGE_SIZE])
            else:
                assert all(page not in other.pages for other, _ in self.running)
                self.content.pop(page, None)
        self.running.append((allocation, prompt))
        self.unwritten.append(allocation)

    @precondition(lambda self: self.unwritten)
    @rule(data=st.data())
    def write(self, data):
        allocation = data.draw(st.sampled_from(self.unwritten))
        self.unwritten.remove(allocation)
        prompt = next(prompt for other, prompt in self.running if other is allocation)
        for i, page in enumerate(allocation.pages[: len(prompt) // PAGE_SIZE]):
            self.content[page] = tuple(prompt[: (i + 1) * PAGE_SIZE])
        self.pages.written(allocation)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.running) - 1))
        allocation, _ = self.running.pop(index)
        self.unwritten = [other for other in self.unwritten if other is not allocation]
        self.pages.release(allocation)

    @invariant()
    def every_page_is_free_used_or_remembered_once(self):
        users = Counter(page for allocation, _ in self.running for page in allocation.pages)
        assert self.pages._users == [users[page] for page in range(self.TOTAL)]
        places = [*self.pages._free, *self.pages._unused, *users]
        assert sorted(places) == list(range(self.TOTAL))
        assert self.pages.num_available == self.TOTAL - len(users)

    @invariant()
    def keys_and_pages_name_each_other(self):
        assert {page: key for key, page in self.pages._page_of.items()} == self.pages._key_of
        assert set(self.pages._unused) <= set(self.pages._key_of)
        assert self.pages._unwritten <= set(self.pages._key_of)
        assert not set(self.pages._free) & set(self.pages._key_of)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
