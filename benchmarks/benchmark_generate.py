"""Compare naive, cached and batched generation; the last line of stdout is one JSON object. See chapter 28."""

from nanollm.benchmark import main

if __name__ == "__main__":
    main()
