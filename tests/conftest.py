"""The order of the files: `make test` hands them to two workers, each file to one of them."""

# The longest first, so that no worker starts one of them when the other has nothing left to do.
LONGEST = ("test_oracle.py", "test_page_in_browser.py", "test_package.py", "test_ray.py",
           "test_tensor_parallel.py", "test_under_fire.py", "test_parallel_llm.py",
           "test_llm.py")


def pytest_collection_modifyitems(items):
    "Put the longest files in front; within a file, tests keep their order."
    last = len(LONGEST)
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, last))
