"""Compare naive, cached and batched generation; the last line of stdout is one JSON object.

See nbs/26_benchmark.ipynb.
"""

from nanollm.benchmark import main

if __name__ == "__main__":
    main()
