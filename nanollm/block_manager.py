"""Hand out memory for keys and values in blocks: who holds which, how often, which are free."""

__all__ = ['BlockManager']

from collections import Counter, OrderedDict
from collections.abc import Iterable

from .request import Request


class BlockManager:
    "A free list, counts, a block table per request. Source: Kwon et al. 2023, section 4."

    def __init__(
        self,
        num_blocks: int,
        block_size: int, # tokens per block
    ):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, "
                             f"got {num_blocks} and {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks)) # next to be used first

    @property
    def max_tokens(self) -> int: return self.num_blocks * self.block_size
    @property
    def num_free(self) -> int: return len(self._free)
    @property
    def usage(self) -> float: return 1 - len(self._free) / self.num_blocks # held by requests

    def match(self, request: Request) -> int: # tokens
        "Nothing is found: without a prefix cache every token has to be computed."
        return 0

    def allocate(self, request: Request, num_tokens: int) -> bool:
        "Lengthen the block table to `num_tokens`; False, and no change, if too few are free."
        num_new = -(-num_tokens // self.block_size) - len(request.block_table)
        if num_new > len(self._free):
            return False
        for _ in range(num_new):
            block = self._take()
            self.ref_counts[block] = 1
            request.block_table.append(block)
        return True

    def commit(self, request: Request, num_tokens: int) -> None:
        "Nothing to do: without a prefix cache nobody looks for computed blocks."

    def rewind(self, request: Request) -> None:
        "Give back the blocks beyond the known tokens, which held drafts."
        self._drop(request, -(-request.num_tokens // self.block_size))

    def free(self, request: Request) -> None:
        "Give back all blocks, the last one first."
        self._drop(request, 0)

    def check(self, requests: Iterable[Request]) -> None:
        "Raise RuntimeError unless the blocks held are those in the tables of `requests`."
        held = Counter(block for request in requests for block in request.block_table)
        for block, count in enumerate(self.ref_counts):
            if count != held[block] or (count == 0) != (block in self._free):
                state = "free" if block in self._free else "not free"
                raise RuntimeError(f"block {block} is counted {count} times, stands in "
                                   f"{held[block]} block tables and is {state}")

    def _take(self):
        return self._free.popitem(last=False)[0]

    def _drop(self, request, num_kept):
        while len(request.block_table) > num_kept:
            block = request.block_table.pop()
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self._free[block] = None
