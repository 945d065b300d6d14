"""Keep full blocks under the hash of their tokens, so that the next request finds them."""

__all__ = ['root_hash', 'block_hash', 'PrefixCachingBlockManager']

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from .block_manager import BlockManager
from .request import Request


def root_hash(adapter: str | None, cache_salt: str) -> bytes:
    "Return what the chain starts with: all besides the tokens that decides who may share."
    return hashlib.sha256(repr((adapter, cache_salt)).encode()).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    "Return the hash of a full block that follows the one with the hash `parent`."
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCachingBlockManager(BlockManager):
    "A block manager whose full blocks can be found by what they hold."

    def __init__(self, num_blocks: int, block_size: int):
        super().__init__(num_blocks, block_size)
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def cached_blocks(self) -> list[int]: # that nobody holds; next to be reused first
        return [block for block in self._free if block in self._hash_of]

    def match(self, request: Request) -> int: # tokens; one at least is left to compute
        "Let a request share the longest run of named blocks that its tokens begin with."
        if not request.use_prefix_cache:
            return 0
        most = (request.num_tokens - 1) // self.block_size
        for digest in self._hashes(request, most):
            if digest not in self._block_of:
                break
            block = self._block_of[digest]
            self.ref_counts[block] += 1
            self._free.pop(block, None)
            request.block_table.append(block)
        return len(request.block_table) * self.block_size

    def commit(self, request: Request, num_tokens: int) -> None:
        "Name the blocks that `num_tokens` tokens fill, the last of them in the coming step."
        num_hashed = len(request.block_hashes) # drafts that were right fill blocks in between
        first = min(request.num_computed_tokens // self.block_size, num_hashed)
        end = num_tokens // self.block_size
        if first == end: # as in most decodes
            return
        new = zip(request.block_table[first:end], self._hashes(request, end)[first:])
        for block, digest in new:
            if digest not in self._block_of:
                self._block_of[digest], self._hash_of[block] = block, digest

    def free(self, request: Request) -> None:
        "Give back all blocks; those whose tokens have not been computed lose their names."
        for block in request.block_table[request.num_computed_tokens // self.block_size:]:
            self._forget(block)
        super().free(request)

    def reset(self) -> None:
        "Forget all contents. Raises RuntimeError while requests hold blocks."
        if self.usage: # they would go on and mix new keys and values with old ones
            num_held = self.num_blocks - self.num_free
            raise RuntimeError(f"{num_held} blocks are held by requests: reset the prefix cache "
                               "when all have ended")
        self._block_of.clear()
        self._hash_of.clear()

    def check(self, requests: Iterable[Request]) -> None:
        "Raise RuntimeError unless blocks add up and every name leads to its block."
        super().check(requests)
        if {block: digest for digest, block in self._block_of.items()} != self._hash_of:
            raise RuntimeError("the maps from names to blocks and back contradict each other")

    def _hashes(self, request, num_blocks):
        "The hashes of the first `num_blocks` blocks, each computed once in a request's life."
        size, hashes = self.block_size, request.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else root_hash(request.adapter, request.cache_salt)
            hashes.append(block_hash(parent, request.token_ids[i * size:(i + 1) * size]))
        return hashes[:num_blocks]

    def _forget(self, block):
        self._block_of.pop(self._hash_of.pop(block, None), None)

    def _take(self):
        block = super()._take()
        self._forget(block)
        return block

    def _drop(self, request, num_kept):
        dropped = request.block_table[num_kept:]
        super()._drop(request, num_kept)
        for block in dropped:
            if block in self._free and block not in self._hash_of:
                self._free.move_to_end(block, last=False) # nothing is lost by using it first
