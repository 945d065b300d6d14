"""Spend each step's token budget on decodes first, and fill it up with pieces of prompts."""

__all__ = ['ChunkedPrefill']

from .scheduler import Plan


class ChunkedPrefill:
    "Shortest gaps first, then pieces of the long ones. Source: Agrawal et al. 2024 (Sarathi)."

    def __init__(
        self,
        long_prefill_token_threshold: int | None = None, # tokens of one request in a step
    ):
        self.limit = long_prefill_token_threshold

    def plan(self, plan: Plan) -> None:
        for request in sorted(plan.running, key=lambda request: request.gap):
            plan.extend(request, self.limit)
        for request in plan.waiting:
            if not plan.admit(request, self.limit):
                break
